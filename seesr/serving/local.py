"""Jobs on this machine: one thread takes them from a priority queue and runs them on the Engine in this process."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seesr.images import write
from seesr.serving.job import CANCELED, DONE, FAILED, RUNNING, WAITING, Away, Full, Job
from seesr.serving.listeners import Listeners
from seesr.serving.reporter import Canceled, Reporter
from seesr.serving.sqlite_store import Journal
from seesr.settings import Settings

if TYPE_CHECKING:
    from seesr.engine.engine import Engine

FAILURE = "the engine cannot be loaded"
ATTEMPTS = 3
POLITE = 5  # niceness of all that computes
log = logging.getLogger(__name__)


class LocalJobs:
    """The queue of one server.

    Args:
        load: makes the engine; called on the worker's thread, so that the server answers while weights load.
        journal: keeps jobs over restarts.
        most: jobs that may wait.
        told: is given every change that a webhook may want, on the worker's thread.
    """

    def __init__(
        self, load: Callable[[], Engine], journal: Journal, most: int, told: Callable[[Job, str], None] | None = None
    ) -> None:
        self.load, self.journal, self.most, self.told = load, journal, most, told or (lambda job, event: None)
        self.engine: Engine | None = None
        self.failure: str | None = None
        self.jobs: dict[str, Job] = {}  # those that have not ended, and those that ended lately
        self.waiting: list[Job] = []
        self.running: Job | None = None
        self.since = time.time()
        self.times: collections.deque[float] = collections.deque(maxlen=50)
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.waited = 0.0
        self.tiles = self.retries = 0
        self.changes = threading.Condition()
        self.listeners = Listeners(self.find)
        self.closing = False
        for job in journal.unfinished():
            self.requeue(job)
        self.thread = threading.Thread(target=self.work, name="jobs", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def requeue(self, job: Job) -> None:
        """A job that a server before this one left behind runs again, unless it has been tried too often."""
        if job.attempts >= ATTEMPTS:
            self.end(job, FAILED, error=f"the server died {ATTEMPTS} times on this picture")
        elif not self.input(job).exists():
            self.end(job, FAILED, error="the server died before the picture was stored; send it again")
        else:
            job.status, job.stage, job.done, job.total = WAITING, "", 0, 0
            self.jobs[job.id] = job
            self.waiting.append(job)
            self.journal.keep(job)

    def input(self, job: Job, kind: str = "") -> Path:
        """The picture, or with "-mask" its mask."""
        return self.journal.file("inputs", job.id + kind)

    def ready(self) -> str | None:
        if self.failure:
            return self.failure
        if self.closing:
            return "the server is shutting down"
        return None if self.engine else "the weights are loading"

    def submit(self, job: Job, image: Path, mask: Path | None = None) -> None:
        with self.changes:
            if self.closing:
                raise Away("the server is shutting down")
            if len(self.waiting) >= self.most:
                raise Full(self.expected_seconds(len(self.waiting)))
            image.replace(self.input(job))
            if mask is not None:
                mask.replace(self.input(job, "-mask"))
            self.journal.keep(job)
            own = dataclasses.replace(job)  # ours changes while the caller reads its own
            self.jobs[job.id] = own
            self.waiting.append(own)
            self.changes.notify()

    def expected_seconds(self, ahead: int) -> float:
        """How long that many pictures should take, by those that were made lately."""
        return max(1.0, ahead * (statistics.median(self.times) if self.times else 5.0))

    def find(self, id: str) -> Job | None:
        running = self.jobs.get(id)
        return self.journal.job(id) if running is None else dataclasses.replace(running)

    def recent(self, owner: str, limit: int, before: float | None = None) -> list[Job]:
        where = "owner = ? AND created < ? ORDER BY created DESC LIMIT ?"
        return self.journal.jobs(where, owner, time.time() + 1 if before is None else before, limit)

    def batch(self, owner: str, id: str) -> list[Job]:
        return [
            self.find(job.id) or job for job in self.journal.jobs("owner = ? AND batch = ? ORDER BY created", owner, id)
        ]

    def cancel(self, id: str) -> None:
        with self.changes:
            job = self.jobs.get(id)
            if job is None or job.ended:
                return
            job.cancel = True
            if job in self.waiting:
                self.waiting.remove(job)
                self.end(job, CANCELED)

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        return await self.listeners.changed(id, revision, seconds)

    def result(self, job: Job) -> Path:
        assert job.output
        return self.journal.file("outputs", job.output)

    def status(self) -> dict[str, Any]:
        running = self.running
        return {
            "queue_length": len(self.waiting),
            "oldest_wait_seconds": max((time.time() - job.created for job in list(self.waiting)), default=0.0),
            "running": running and {"id": running.id, "stage": running.stage, "since": running.started},
            "since": self.since,
            "ended": dict(self.counts),
            "seconds_per_stage": dict(self.seconds),
            "queue_seconds": self.waited,
            "tiles": self.tiles,
            "retries": self.retries,
            "engine": self.engine.about() if self.engine else None,
        }

    def stop(self) -> None:
        """Takes nothing more and begins nothing more; what waits stays in the journal. May be called by a signal."""
        self.closing = True
        self.listeners.close()

    def close(self) -> None:
        """Stops, and returns once the running picture has ended."""
        self.stop()
        with self.changes:
            self.changes.notify()
        if self.thread.is_alive():
            self.thread.join()

    def work(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), POLITE)  # inherited by its threads
        try:
            self.engine = self.load()
        except Exception as error:  # anything at all: the server must say that it will never be ready
            log.exception("the engine cannot be loaded")
            self.failure = f"{FAILURE}: {error}"
            return
        while True:
            with self.changes:
                while not self.waiting and not self.closing:
                    self.changes.wait(1)
                if self.closing:
                    return
                job = min(self.waiting, key=lambda job: (job.priority, job.created))
                self.waiting.remove(job)
                self.running = job
            try:
                self.make(job)
            finally:
                self.running = None

    def make(self, job: Job) -> None:
        """Runs one job to its end, whatever that is."""
        assert self.engine is not None
        job.status, job.started, job.attempts = RUNNING, time.time(), job.attempts + 1
        self.waited += job.started - job.created
        self.journal.keep(job)
        self.tell(job, "start")
        settings, watch = Settings(**job.settings), Reporter(job, lambda: self.tell(job, "logs"))
        try:
            output = self.engine.run(
                self.input(job), settings, job.deadline, (watch,), self.input(job, "-mask") if job.masked else None
            )
            job.output = f"{job.id}.{settings.suffix}"
            write.save(output.data, self.journal.file("outputs", job.output))
            job.metrics = output.metrics
            self.times.append(time.time() - job.started)
            self.seconds.update(output.metrics["seconds"])
            self.tiles += output.metrics["tiles"] * output.metrics["steps"]
            self.retries += output.metrics["out_of_memory_retries"] + output.metrics["float32_retries"]
            self.end(job, DONE)
        except Canceled:
            self.end(job, CANCELED)
        except (ValueError, RuntimeError) as error:
            self.end(job, FAILED, error=str(error))
            if not self.engine.healthy():
                self.failure = "the device has failed"
        except Exception:
            log.exception("job %s", job.id)
            self.end(job, FAILED, error="an internal error; the log has more")

    def end(self, job: Job, status: str, error: str | None = None) -> None:
        job.status, job.error, job.completed = status, error, time.time()
        self.counts[status] += 1
        for kind in ("", "-mask"):
            self.input(job, kind).unlink(missing_ok=True)
        self.journal.keep(job)
        self.tell(job, "output" if status == DONE else "completed")
        if status == DONE:
            self.told(job, "completed")
        self.jobs.pop(job.id, None)

    def tell(self, job: Job, event: str) -> None:
        job.revision += 1
        self.told(job, event)
        self.listeners.wake(job.id)
