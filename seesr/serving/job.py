"""The `Job` record of one image request, and the interface of job queues."""

from __future__ import annotations

import dataclasses
import errno
import secrets
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from seesr.engine.rates import Quote
from seesr.runtime.progress import Deadline
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

URGENT, NORMAL, LATER = 0, 5, 9
PRIORITIES = {"urgent": URGENT, "normal": NORMAL, "low": LATER}
WAITING, RUNNING = "starting", "processing"  # Replicate's names
DONE, FAILED, CANCELED = "succeeded", "failed", "canceled"
ENDED = {DONE, FAILED, CANCELED}


@dataclasses.dataclass
class Job:
    """One image request in a queue.

    Attributes:
        id: unguessable; also its files' name.
        owner: name of the key that asked; only it may look.
        settings: values of Settings, the seed drawn already: a second run gives the same bytes.
        masked: whether a mask was sent beside the image.
        name: of the file that was sent, for people.
        priority: URGENT, NORMAL or LATER.
        deadline: seconds from `created` within which the result must be there; None: the engine's own.
        quote: what it should take, see seesr.engine.rates.Quote; None: not known.
        batch: id of the batch it belongs to.
        version: of the bundle and the program that took the job; only the same ones make the same bytes.
        share: of the queue that the owner may have while others wait; None: the server's.
        webhook, events: the address that receives webhooks, and for which events (start, output, logs, completed).
        attempts: how often it was started, including runs of a server that was killed.
        stage, done, total: how far it came.
        progress, seconds_left: of the whole image, see seesr.runtime.estimate; seconds_left is None where it is not
            known.
        output: file name of the result.
        revision: counts the changes.
        created, started, completed: seconds since 1970.
    """

    owner: str
    settings: dict[str, Any]
    masked: bool = False
    name: str = "image"
    priority: int = NORMAL
    deadline: float | None = None
    quote: dict[str, Any] | None = None
    batch: str | None = None
    version: str | None = None
    share: float | None = None
    webhook: str | None = None
    events: list[str] | None = None
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16))
    status: str = WAITING
    attempts: int = 0
    stage: str = ""
    done: int = 0
    total: int = 0
    progress: float = 0.0
    seconds_left: float | None = None
    cancel: bool = False
    error: str | None = None
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    logs: str = ""
    output: str | None = None
    revision: int = 0
    created: float = dataclasses.field(default_factory=time.time)
    started: float | None = None
    completed: float | None = None

    @classmethod
    def of(cls, owner: str, settings: Settings, **more: Any) -> Job:
        """A job of these settings, its seed drawn now if none was given."""
        return cls(owner, dataclasses.asdict(settings.seeded()), **more)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Job:
        """A job that was written as a dict. Fields that only another version knows are left out.

        Raises:
            TypeError: the record is not a dict, or lacks a field.
        """
        if not isinstance(record, dict):
            raise TypeError(f"the record is a {type(record).__name__}, not an object")
        return cls(**known_fields(cls, record))

    def reset(self) -> None:
        """Makes it wait again from its start."""
        self.status, self.stage, self.done, self.total = WAITING, "", 0, 0
        self.progress, self.seconds_left = 0.0, None

    @property
    def suffix(self) -> str:
        """Of the result's name."""
        return Settings(**known_fields(Settings, self.settings)).suffix

    @property
    def receiver(self) -> str:
        """Whose webhooks are sent in order: those of one owner to one host and port."""
        return f"{self.owner} {urlsplit(self.webhook or '').netloc.rpartition('@')[2].lower()}"

    def wants(self, event: str) -> bool:
        """Whether its webhook is to be called for this event."""
        return self.webhook is not None and (not self.events or event in self.events)

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    @property
    def limit(self) -> Deadline | None:
        """The deadline as a watcher."""
        return None if self.deadline is None else Deadline(self.deadline, time.time() - self.created)

    def with_quote(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of its result, with the quote that it was taken with, and the seconds that it waited."""
        if self.quote is None or self.started is None or "actual" not in metrics:
            return dict(metrics)
        quote = {**Quote(**self.quote).short(), "wait": self.quote["wait"]}
        actual = {**metrics["actual"], "wait": round(self.started - self.created, 3)}
        return {**metrics, "quote": quote, "actual": actual}


def known_fields(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's own fields."""
    return {field.name: values[field.name] for field in dataclasses.fields(kind) if field.name in values}


class QueueFull(Exception):
    """The queue is full.

    Attributes:
        code: of the error that callers get.
        seconds: after which there should be room, from measured times.
    """

    code = "queue_full"

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the queue is full; try again in {seconds:.0f} s")
        self.seconds = seconds


class Late(Exception):
    """A deadline cannot be met.

    Attributes:
        code: of the error that callers get.
        quote: the job's.
    """

    code = "deadline_too_short"

    def __init__(self, deadline: float, promised: float, quote: dict[str, Any]) -> None:
        super().__init__(
            f"a deadline of {deadline:g} s cannot be met: the queue and this image can take {promised:.1f} s; allow "
            "more time, or use a smaller scale or fewer steps"
        )
        self.quote = quote


def check_deadline(job: Job) -> None:
    """Refuses a job whose quote says that its deadline cannot be met.

    Raises:
        Late: with the quote.
    """
    promised = None if job.quote is None else Quote(**job.quote).promised
    if job.quote is not None and job.deadline is not None and promised is not None and promised > job.deadline:
        raise Late(job.deadline, promised, job.quote)


class Unavailable(Exception):
    """A service that the jobs need (Redis, object store, disk) is unavailable; names it.

    Args:
        code: of the error that callers get.
    """

    def __init__(self, message: str, code: str = "unavailable") -> None:
        super().__init__(message)
        self.code = code


FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def storage_failure(error: Exception) -> Unavailable | None:
    """The error that callers see for a full or read-only disk, without paths; None for any other error."""
    if isinstance(error, sqlite3.OperationalError):
        reason = str(error)
    elif isinstance(error, OSError) and error.errno in FULL_DISK:
        reason = error.strerror
    else:
        return None
    return Unavailable(f"the server cannot write to its disk ({reason}); free space under SEESR_DATA", "disk_full")


class Jobs(Protocol):
    """Interface to the job queue: in this process or in a fleet of workers. Routes work with both."""

    closing: bool  # whether it was stopped
    quotes_every_job: bool  # whether the waits of later jobs need the quotes of all; else only of those with a deadline

    def start(self, supervisor: Supervisor) -> None:
        """Starts its background threads."""
        ...

    def ready(self) -> str | None:
        """None if images can be upscaled now, otherwise the reason in one line."""
        ...

    def submit(self, job: Job, image: Path, mask: Path | None = None) -> None:
        """Takes over the files and puts the job into the queue, unless it has a job of this id.

        Raises:
            QueueFull, Late, Unavailable: it was not taken.
        """
        ...

    def quote(self, job: Job, image: Path) -> Quote | None:
        """What a job would take if it was submitted now, its wait included; None: this queue cannot say.

        Raises:
            ValueError: the image cannot be upscaled so.
        """
        ...

    def find(self, id: str) -> Job | None:
        """The job as it is now."""
        ...

    def recent(self, owner: str, limit: int, before: float | None = None) -> list[Job]:
        """The owner's jobs, newest first, created before `before`."""
        ...

    def batch(self, owner: str, id: str) -> list[Job]:
        """The jobs of a batch, in the order in which they were sent."""
        ...

    def cancel(self, id: str) -> None:
        """Asks the job to end: at once if it waits, at the next tile if it runs."""
        ...

    def ahead(self, ids: list[str]) -> dict[str, int]:
        """For each of these jobs that waits: how many jobs of all owners run or will run before it."""
        ...

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        """The job once its revision is above `revision`, or as it is after `seconds`."""
        ...

    def result(self, job: Job) -> Path:
        """The file of a job that succeeded."""
        ...

    def counts(self) -> tuple[dict[tuple[str, ...], float], dict[tuple[str, ...], tuple[str, float, float]]]:
        """What the ended jobs add up to, and its exemplars: see seesr.serving.job_counts."""
        ...

    def status(self) -> dict[str, Any]:
        """Queue length, running jobs and workers, for people and metrics."""
        ...

    def stop(self) -> None:
        """Stops accepting and starting jobs."""
        ...

    def close(self, seconds: float | None = None) -> None:
        """Stops, and returns when the running job has ended; after `seconds` that job is left to the next server."""
        ...
