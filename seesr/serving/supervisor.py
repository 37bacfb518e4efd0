"""Background threads and tasks: an error in one is logged and counted, and the thread or task is started again."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds before a restart, doubled at each failure in a row
RECOVERED_AFTER = 60.0  # seconds without a failure after which the next one counts as the first again
log = logging.getLogger(__name__)


@dataclasses.dataclass
class BackgroundTask:
    """One thread or asyncio task.

    Attributes:
        failures: how often it raised.
        error: type of the latest exception, or None if there was none.
        failed: when that was, in seconds of time.monotonic.
        pause: seconds between the latest failure and the restart.
    """

    failures: int = 0
    error: str | None = None
    failed: float = 0.0
    pause: float = 0.0

    @property
    def down(self) -> bool:
        """Whether it waits for its restart, or has run for a shorter time than it waited."""
        return self.error is not None and time.monotonic() - self.failed < 2 * self.pause


class Supervisor:
    """The background threads and tasks of one process.

    `thread` and `run` are the only ways to start one in `seesr.serving` and `seesr.fleet`.
    """

    def __init__(self) -> None:
        self.tasks: dict[str, BackgroundTask] = {}
        self.stopping = threading.Event()

    def thread(self, name: str, work: Callable[[], None]) -> threading.Thread:
        """Runs `work` on a daemon thread until it returns."""
        task = self.tasks.setdefault(name, BackgroundTask())

        def loop() -> None:
            while not self.stopping.is_set():
                with guarded(name, task):
                    work()
                    return
                self.stopping.wait(task.pause)

        thread = threading.Thread(target=loop, name=name, daemon=True)
        thread.start()
        return thread

    async def run(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` on this event loop until it returns or the caller is cancelled."""
        task = self.tasks.setdefault(name, BackgroundTask())
        while True:
            with guarded(name, task):
                return await work()
            await asyncio.sleep(task.pause)

    def stop(self) -> None:
        """Starts no thread again."""
        self.stopping.set()

    def down(self) -> str | None:
        """One line that names every task that is down, or None."""
        names = [f"{name} ({task.error})" for name, task in list(self.tasks.items()) if task.down]
        if not names:
            return None
        return f"background task {', '.join(names)} failed and will be restarted; the log has the traceback"


@contextmanager
def guarded(name: str, task: BackgroundTask) -> Iterator[None]:
    """Logs and counts an exception, and sets the pause before the restart."""
    try:
        yield
    except Exception as error:
        now, cause = time.monotonic(), error
        while isinstance(cause, ExceptionGroup):  # of a TaskGroup
            cause = cause.exceptions[0]
        again = task.error is not None and now - task.failed < RECOVERED_AFTER
        task.pause = min(LONGEST_PAUSE, 2 * task.pause) if again else FIRST_PAUSE
        task.failures, task.error, task.failed = task.failures + 1, type(cause).__name__, now
        log.exception("background task %s failed; it restarts in %.1f s", name, task.pause)
