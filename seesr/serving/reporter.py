"""Progress watcher of a running job: records stage and logs, and stops the job when it is canceled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from seesr.runtime.progress import Position
from seesr.serving.job import Job

INTERVAL = 0.2


class Canceled(Exception):
    """Raised in a running image whose job was canceled."""


class Interrupted(Exception):
    """Raised in a running image when the server stops."""


class Reporter:
    """A watcher that keeps a job's stage, done, total, progress, time left and logs.

    Args:
        notify: called after every report.
        interval: seconds between two reports of one stage.
        interrupted: once it is set, the image stops at its next tile.
    """

    def __init__(
        self,
        job: Job,
        notify: Callable[[], None],
        interval: float = INTERVAL,
        interrupted: threading.Event | None = None,
    ) -> None:
        self.job, self.notify, self.interval, self.latest, self.interrupted = job, notify, interval, 0.0, interrupted

    def __call__(self, position: Position) -> None:
        job, now = self.job, time.monotonic()
        if job.cancel:
            raise Canceled
        if self.interrupted is not None and self.interrupted.is_set():
            raise Interrupted
        if position.stage != job.stage or position.done == position.total or now - self.latest > self.interval:
            self.latest = now
            job.stage, job.done, job.total, job.progress, job.seconds_left = position
            job.logs += progress_line(position)
            self.notify()


def progress_line(position: Position) -> str:
    """As tqdm writes it, which Replicate's clients read."""
    share = position.done / position.total
    bar = "#" * round(10 * share)
    return f"{share:4.0%}|{bar:10}| {position.done}/{position.total} [{position.stage}]\n"
