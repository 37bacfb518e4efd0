"""Wakes requests that wait for a job to change, across threads and event loops."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable

from starlette.concurrency import run_in_threadpool

from seesr.serving.job import Job


class Listeners:
    """Those of one gateway.

    Args:
        find: the job as it is now.
        longest: seconds that a request relies on being woken before it looks for itself.
    """

    def __init__(self, find: Callable[[str], Job | None], longest: float = math.inf) -> None:
        self.find, self.longest = find, longest
        self.waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self.closing = False

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        """The job once its revision is above `revision`, or as it is after `seconds` or at the moment this closes."""
        event, end = asyncio.Event(), time.monotonic() + seconds
        listener = (asyncio.get_running_loop(), event)
        self.waiting.setdefault(id, set()).add(listener)
        try:
            while True:
                event.clear()
                job = await run_in_threadpool(self.find, id)
                left = end - time.monotonic()
                if job is None or job.ended or job.revision > revision or left <= 0:
                    return job
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(event.wait(), min(left, self.longest))
                    if self.closing:  # woken by that; who asks again, for a job that still runs, waits again
                        return await run_in_threadpool(self.find, id)
        finally:
            others = self.waiting.get(id, set())
            others.discard(listener)
            if not others:
                self.waiting.pop(id, None)

    def wake(self, id: str) -> None:
        for loop, event in list(self.waiting.get(id, ())):
            loop.call_soon_threadsafe(event.set)

    def wake_all(self) -> None:
        """Lets every request look: changes may have been missed."""
        for id in list(self.waiting):
            self.wake(id)

    def close(self) -> None:
        """Lets all of them go."""
        self.closing = True
        self.wake_all()
