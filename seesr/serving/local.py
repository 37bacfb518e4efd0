"""The local job queue: one thread runs jobs in priority order on the Engine in this process."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from seesr.engine.rates import Quote
from seesr.images import write
from seesr.runtime.owner import image_of
from seesr.serving.engines import Engines
from seesr.serving.fairness import Turns, has_room
from seesr.serving.job import (
    CANCELED,
    DONE,
    FAILED,
    RUNNING,
    WAITING,
    Job,
    QueueFull,
    Unavailable,
    check_deadline,
    storage_failure,
)  # fmt: skip
from seesr.serving.job_counts import JobCounts, Name, Seen, summary
from seesr.serving.listeners import Listeners
from seesr.serving.reporter import Canceled, Interrupted, Reporter
from seesr.serving.sqlite_store import SqliteStore
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

if TYPE_CHECKING:
    from seesr.engine.engine import Engine, Output

FAILURE = "the engine cannot be loaded"
ATTEMPTS = 3
NICENESS = 5  # niceness of all that computes
LOGS_INTERVAL = 0.5  # seconds between two webhooks about the logs of one job
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between two tries to write to a full disk
STORAGE_ERRORS = (OSError, sqlite3.OperationalError)
T = TypeVar("T")
log = logging.getLogger(__name__)


class LocalJobs:
    """The queue of one server. An error in its thread puts the job back and does not end the thread.

    Args:
        load: makes the engine; called on the worker's thread, so that the server answers while weights load.
        journal: keeps jobs over restarts.
        max_queue: jobs that may wait.
        version: of the default bundle and this program.
        share: of `max_queue` that one owner may have while others wait.
        others: make the engines of other versions, at their first job. Jobs of any other version are not run.
        fits: whether a version fits into the memory beside what is loaded.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        journal: SqliteStore,
        max_queue: int,
        version: str,
        share: float = 0.5,
        others: Mapping[str, Callable[[], Engine]] | None = None,
        fits: Callable[[str], bool] = lambda version: True,
    ) -> None:
        self.journal, self.max_queue, self.version, self.share = journal, max_queue, version, share
        self.engines = Engines({**(others or {}), version: load}, fits)
        self.loaded = False  # the default engine, once
        self.turns = Turns()
        self.failure: str | None = None
        self.quotes_every_job = True
        self.jobs: dict[str, Job] = {}  # those that have not ended, and those that ended lately
        self.waiting: list[Job] = []
        self.running: Job | None = None
        self.since = time.time()
        self.times: collections.deque[float] = collections.deque(maxlen=50)
        self.ended = JobCounts()
        self.changes = threading.Condition()
        self.listeners = Listeners(self.find)
        self.closing = False
        self.interrupted = threading.Event()  # the running job is to stop at its next tile
        self.storage_error: str | None = None
        with journal.one_line():
            for job in journal.unfinished():
                self.recover(job)
        self.thread: threading.Thread | None = None

    def start(self, supervisor: Supervisor) -> None:
        self.thread = supervisor.thread("jobs", self.work)

    def recover(self, job: Job) -> None:
        """Queues a job again that waited or ran when the server before this one ended, if that can be right."""
        result = self.journal.file("outputs", f"{job.id}.{job.suffix}")
        if result.exists():  # the server was killed between the result and its record
            self.end(job, DONE, output=result.name)
        elif job.error:  # its record is damaged
            self.end(job, FAILED, error=job.error)
        elif job.version is not None and job.version not in self.engines.loads:
            message = f"this image waited for version {job.version[:12]} of the model"
            self.end(job, FAILED, error=f"{message}; this server runs {self.version[:12]}; send the image again")
        elif job.attempts >= ATTEMPTS:
            self.end(job, FAILED, error=f"the server died {ATTEMPTS} times on this image")
        elif not self.input(job).exists():
            self.end(job, FAILED, error="the server died before the image was stored; send it again")
        else:
            job.reset()
            self.jobs[job.id] = job
            self.waiting.append(job)
            self.journal.keep(job)

    def input(self, job: Job, kind: str = "") -> Path:
        """The image, or with "-mask" its mask."""
        return self.journal.file("inputs", job.id + kind)

    def ready(self) -> str | None:
        if self.failure:
            return self.failure
        if self.closing:
            return "the server is shutting down"
        if self.storage_error:
            return self.storage_error
        return None if self.loaded else "the weights are loading"

    def submit(self, job: Job, image: Path, mask: Path | None = None) -> None:
        with self.changes:
            if self.closing:
                raise Unavailable("the server is shutting down")
            if self.find(job.id) is not None:
                return
            if not has_room(
                job.owner, (other.owner for other in self.waiting), self.max_queue, job.share or self.share
            ):
                raise QueueFull(self.expected_seconds(len(self.waiting)))
            job.version = job.version or self.version
            if job.quote is not None:
                quote = dataclasses.replace(Quote(**job.quote), wait=self.wait_for(job))
                job.quote = dataclasses.asdict(quote)
                check_deadline(job)
            try:
                image.replace(self.input(job))
                if mask is not None:
                    mask.replace(self.input(job, "-mask"))
                self.journal.keep(job)
            except STORAGE_ERRORS as error:
                self.remove_inputs(job)
                log.error("job %s cannot be stored: %s", job.id, error)
                raise storage_failure(error) or error from error
            queued = dataclasses.replace(job)  # the queued job changes; the caller keeps the original
            self.jobs[job.id] = queued
            self.waiting.append(queued)
            self.changes.notify()

    def quote(self, job: Job, image: Path) -> Quote | None:
        engine = self.engines.loaded.get(job.version or self.version)
        if engine is None:
            return None
        try:
            with image_of(job.owner):
                quote = engine.quote(image, Settings(**job.settings))
        except RuntimeError:
            if engine in self.engines.loaded.values():
                raise
            return None  # it was unloaded at this moment
        with self.changes:
            return dataclasses.replace(quote, wait=self.wait_for(job))

    def wait_for(self, job: Job) -> float:
        """Seconds until the turn of a job that is submitted now. Later jobs that are more urgent are not in it."""
        wait = sum(self.seconds_of(other) for other in self.turns.before(job, self.waiting))
        if running := self.running:
            wait += max(0.0, self.seconds_of(running) - (time.time() - (running.started or time.time())))
        return round(wait, 3)

    def seconds_of(self, job: Job) -> float:
        """How long a job should take."""
        return (job.quote or {}).get("seconds") or self.expected_seconds(1)

    def expected_seconds(self, ahead: int) -> float:
        """How long that many images should take, by those that were made lately."""
        return max(1.0, ahead * (statistics.median(self.times) if self.times else 5.0))

    def find(self, id: str) -> Job | None:
        running = self.jobs.get(id)
        return self.journal.job(id) if running is None else dataclasses.replace(running)

    def recent(self, owner: str, limit: int, before: float | None = None) -> list[Job]:
        where = "owner = ? AND created < ? ORDER BY created DESC LIMIT ?"
        jobs = self.journal.jobs(where, owner, time.time() + 1 if before is None else before, limit)
        return [self.current(job) for job in jobs]

    def batch(self, owner: str, id: str) -> list[Job]:
        jobs = self.journal.jobs("owner = ? AND batch = ? ORDER BY created", owner, id)
        return [self.current(job) for job in jobs]

    def current(self, job: Job) -> Job:
        """The job as it is in memory, which is ahead of its record while it runs."""
        return self.jobs.get(job.id) or job

    def cancel(self, id: str) -> None:
        with self.changes:
            job = self.jobs.get(id)
            if job is None or job.ended:
                return
            job.cancel = True
            if job in self.waiting:
                try:
                    self.end(job, CANCELED)
                except STORAGE_ERRORS as error:
                    raise storage_failure(error) or error from error
                self.waiting.remove(job)

    def ahead(self, ids: list[str]) -> dict[str, int]:
        with self.changes:
            first = int(self.running is not None)
            places = {job.id: place for place, job in enumerate(self.turns.order(self.waiting), first)}
        return {id: places[id] for id in ids if id in places}

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        return await self.listeners.changed(id, revision, seconds)

    def result(self, job: Job) -> Path:
        assert job.output
        return self.journal.file("outputs", job.output)

    def status(self) -> dict[str, Any]:
        running, engine = self.running, self.engines.loaded.get(self.version)
        return {
            "queue_length": len(self.waiting),
            "oldest_wait_seconds": max((time.time() - job.created for job in list(self.waiting)), default=0.0),
            "running": running and {"id": running.id, "stage": running.stage, "since": running.started},
            "since": self.since,
            **summary(self.ended.snapshot()[0]),
            "engine": engine.about() if engine else None,
            "loaded": [*self.engines.loaded],
        }

    def counts(self) -> tuple[dict[Name, float], dict[Name, Seen]]:
        return self.ended.snapshot()

    def stop(self) -> None:
        """Takes nothing more and begins nothing more; what waits stays in the journal. May be called by a signal."""
        self.closing = True
        self.listeners.close()

    def close(self, seconds: float | None = None) -> None:
        """Stops, and returns once the running job has ended.

        Args:
            seconds: after which the running job stops at its next tile; the next server runs it from its start.
                None: it runs to its end.
        """
        self.stop()
        with self.changes:
            self.changes.notify()
        if self.thread is not None:
            self.thread.join(seconds)
            self.interrupted.set()
            self.thread.join()

    def work(self) -> None:
        """Runs one job after the other until the server stops."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)  # inherited by its threads
        if not self.loaded and not self.load_engine():
            return
        while job := self.take():
            try:
                self.make(job)
            except Interrupted:
                self.leave(job)
                return
            except Exception:
                self.put_back(job)
                raise
            finally:
                self.running = None

    def load_engine(self) -> bool:
        try:
            self.engines.get(self.version)
            self.loaded = True
        except Exception as error:  # anything at all: the server must say that it will never be ready
            log.exception("the engine cannot be loaded")
            self.failure = f"{FAILURE}: {error}"
        return self.loaded

    def take(self) -> Job | None:
        """The next job, waited for; None once the server stops."""
        with self.changes:
            while not self.waiting and not self.closing:
                self.changes.wait(1)
            if self.closing:
                return None
            job = self.turns.next(self.waiting)
            self.waiting.remove(job)
            self.running = job
            return job

    def leave(self, job: Job) -> None:
        """Leaves an interrupted job to the next server; this run does not count as an attempt."""
        try:
            self.journal.keep(dataclasses.replace(job, status=WAITING, attempts=job.attempts - 1, started=None))
        except STORAGE_ERRORS as error:
            log.warning("job %s: its record was not updated; the next start runs it again: %s", job.id, error)

    def put_back(self, job: Job) -> None:
        """Queues a job again after a server error during its run."""
        if job.id not in self.jobs:
            return
        if job.attempts >= ATTEMPTS:
            self.until_stored(lambda: self.end(job, FAILED, error="internal error; see the server's log"))
            return
        with self.changes:
            job.reset()
            self.waiting.append(job)

    def make(self, job: Job) -> None:
        """Runs one job to its end."""
        engine: Engine | None = None
        job.status, job.started, job.attempts = RUNNING, time.time(), job.attempts + 1
        job.revision += 1
        self.until_stored(lambda: self.journal.keep(job, "start"))
        self.listeners.wake(job.id)
        try:
            settings = Settings(**job.settings)
            engine = self.engines.get(job.version or self.version)
            output = self.run(engine, job, settings)
            name = f"{job.id}.{settings.suffix}"
            self.until_stored(lambda: self.save(output.data, name))
            ended: dict[str, Any] = {"status": DONE, "output": name, "metrics": job.with_quote(output.metrics)}
        except Interrupted:
            raise
        except Canceled:
            ended = {"status": CANCELED}
        except (ValueError, RuntimeError) as error:
            ended = {"status": FAILED, "error": str(error)}
            if engine is not None and not engine.healthy():
                self.failure = "the device has failed"
        except Exception:
            log.exception("job %s", job.id)
            ended = {"status": FAILED, "error": "internal error; see the server's log"}
        self.until_stored(lambda: self.end(job, **ended))
        if job.status == DONE:
            self.times.append(time.time() - job.started)

    def run(self, engine: Engine, job: Job, settings: Settings) -> Output:
        """The output of a job. One that needs more memory than other bundles leave runs again without them."""
        mask = self.input(job, "-mask") if job.masked else None
        with image_of(job.owner):
            try:
                return engine.run(self.input(job), settings, job.limit, (self.reporter(job),), mask)
            except RuntimeError as error:
                if not str(error).startswith("out of memory"):
                    raise
                if not self.engines.unload_others(job.version or self.version):
                    raise
            return engine.run(self.input(job), settings, job.limit, (self.reporter(job),), mask)

    def reporter(self, job: Job) -> Reporter:
        """Watches the running job for its callers and its webhook."""
        latest = 0.0

        def report() -> None:
            nonlocal latest
            job.revision += 1
            self.listeners.wake(job.id)
            now = time.monotonic()
            if job.wants("logs") and now - latest >= LOGS_INTERVAL:
                latest = now
                try:
                    self.journal.keep_progress(job)
                except STORAGE_ERRORS as error:  # the webhook of the end is what counts, and is tried until it is kept
                    log.warning("webhook about the logs of job %s dropped: %s", job.id, error)

        return Reporter(job, report, interrupted=self.interrupted)

    def save(self, data: bytes, name: str) -> None:
        """Writes a result.

        Raises:
            OSError: the disk is full or read-only.
        """
        try:
            write.save(data, self.journal.file("outputs", name))
        except RuntimeError as error:
            raise error.__cause__ or error from None

    def until_stored(self, work: Callable[[], T]) -> T:
        """Repeats `work` until the disk takes it: a full disk loses no result, and `ready` says why nothing runs.

        Raises:
            Interrupted: the server stops; the job runs again, or its result is found, at the next start.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                result = work()
            except STORAGE_ERRORS as error:
                log.error("job data cannot be written; next try in %.1f s: %s", pause, error)
                self.storage_error = str(storage_failure(error) or error)
                if self.closing or self.interrupted.wait(pause):
                    raise Interrupted from error
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                self.storage_error = None
                return result

    def end(self, job: Job, status: str, **values: Any) -> None:
        """Ends a job: its record first, then what callers see, then its inputs.

        Raises:
            OSError, sqlite3.OperationalError: the record cannot be written; nothing has changed.
        """
        values |= {"status": status, "completed": time.time(), "revision": job.revision + 1}
        events = ("output", "completed") if status == DONE else ("completed",)
        self.journal.keep(dataclasses.replace(job, **values), *events)
        for name, value in values.items():
            setattr(job, name, value)
        self.jobs.pop(job.id, None)
        self.ended.add(job)
        self.listeners.wake(job.id)
        self.remove_inputs(job)

    def remove_inputs(self, job: Job) -> None:
        for kind in ("", "-mask"):
            try:
                self.input(job, kind).unlink(missing_ok=True)
            except OSError as error:  # the next start removes it
                log.warning("input of job %s not removed: %s", job.id, error)
