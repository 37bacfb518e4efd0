"""The fleet's images in its object store: inputs, results and uploads."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
from prometheus_client import Histogram

from seesr.object_store import Store
from seesr.serving.job import Job, Unavailable
from seesr.serving.metadata_store import remove_older

log = logging.getLogger(__name__)

PROBE_INTERVAL = 5.0  # seconds between two probes of the store
FOLDERS = ("in", "out", "uploads", "tiles")
MAX_CALLS = 16  # calls of the store at the same time; a gateway's other routes have the rest of its 40 threads
SLOW = 2.0  # seconds of a call after which further ones do not wait for its place


class CallLimit:
    """Limits the calls of a store that run at the same time, so that a store that hangs does not take every thread."""

    def __init__(self, max_running: int, slow: float) -> None:
        self.max_running, self.slow = max_running, slow
        self.started: dict[int, float] = {}  # call -> when it began
        self.number = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """One call, once there is a place for it.

        Raises:
            Unavailable: every place is taken, and the oldest call has run for longer than `slow` seconds.
        """
        with self.changed:
            while len(self.started) >= self.max_running:
                left = min(self.started.values()) + self.slow - time.monotonic()
                if left <= 0:
                    raise Unavailable("the object store is too slow")
                self.changed.wait(left)
            self.number += 1
            number = self.number
            self.started[number] = time.monotonic()
        try:
            yield
        finally:
            with self.changed:
                del self.started[number]
                self.changed.notify()


class FileStore:
    """Files by name, under the folders in/, out/, uploads/ and tiles/.

    Args:
        store: of the configuration.
        cache: folder of this machine for what was fetched.
    """

    def __init__(self, store: Store, cache: Path) -> None:
        self.store, self.cache = store.store, cache
        self.probed: tuple[float, str | None] = (0.0, None)
        self.limit = CallLimit(MAX_CALLS, SLOW)
        description = "Duration of one object store call by this gateway, including its wait for a free slot"
        self.seconds = Histogram("seesr_store_seconds", description, ["operation"], registry=None)
        cache.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, data: bytes | Path, once: bool = False) -> None:
        """Writes a file; `once`: the first writer wins, and a second one is no error.

        Raises:
            Unavailable: the store does not take it.
        """
        with contextlib.suppress(obstore.exceptions.AlreadyExistsError), self.call("put"):
            obstore.put(self.store, name, data, mode="create" if once else "overwrite")

    @contextlib.contextmanager
    def call(self, operation: str) -> Iterator[None]:
        """A call of the store.

        Args:
            operation: get, put, head, delete or list, for the metrics.

        Raises:
            FileNotFoundError: there is no such file.
            Unavailable: the store does not answer, or does not do it.
        """
        try:
            with self.seconds.labels(operation).time(), self.limit.call():
                yield
        except obstore.exceptions.NotFoundError as error:
            raise FileNotFoundError(str(error)) from None
        except (FileNotFoundError, obstore.exceptions.AlreadyExistsError):
            raise
        except (obstore.exceptions.BaseError, OSError) as error:
            raise unavailable(error) from None

    def get(self, name: str) -> Path:
        """The file, on this machine.

        Raises:
            FileNotFoundError: it has expired.
            Unavailable: the store does not give it.
        """
        path = self.cache / name.replace("/", "-")
        if path.exists():
            return path
        part = path.with_name(f"{path.name}.{time.monotonic_ns()}")
        try:
            with self.call("get"), part.open("wb") as file:
                for piece in obstore.get(self.store, name).stream():
                    file.write(piece)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return path

    def read(self, name: str) -> bytes:
        """The bytes of a file, without a copy on this machine.

        Raises:
            FileNotFoundError: it has been removed.
            Unavailable: the store does not give it.
        """
        with self.call("get"):
            return bytes(obstore.get(self.store, name).bytes())

    def drop(self, name: str) -> None:
        """Removes a file, here and there; one that is gone is no error."""
        (self.cache / name.replace("/", "-")).unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError), self.call("delete"):
            obstore.delete(self.store, name)

    def exists(self, name: str) -> bool:
        """Whether the store has a file.

        Raises:
            Unavailable: the store does not answer.
        """
        try:
            with self.call("head"):
                obstore.head(self.store, name)
        except FileNotFoundError:
            return False
        return True

    def older(self, seconds: float) -> Iterator[list[str]]:
        """Names of files that were written longer ago than this, some hundred at a time.

        Raises:
            Unavailable: the store does not answer.
        """
        limit = time.time() - seconds
        for folder in FOLDERS:
            pages: Any = obstore.list(self.store, folder, chunk_size=500)
            while True:
                with self.call("list"):
                    page = next(pages, None)
                if page is None:
                    break
                yield [entry["path"] for entry in page if entry["last_modified"].timestamp() < limit]

    def forget_inputs(self, job: Job) -> None:
        """Removes this machine's copies."""
        for name in (f"in-{job.id}", f"in-{job.id}-mask"):
            (self.cache / name).unlink(missing_ok=True)

    def drop_inputs(self, job: Job) -> None:
        self.drop(f"in/{job.id}")
        if job.masked:
            self.drop(f"in/{job.id}-mask")

    def unavailable(self) -> str | None:
        """None if the store answers, otherwise its error; checked at most every PROBE_INTERVAL seconds."""
        if time.monotonic() - self.probed[0] > PROBE_INTERVAL:
            reason = None
            try:
                self.exists("out/none")
            except Unavailable as error:
                reason = str(error)
            self.probed = time.monotonic(), reason
        return self.probed[1]

    def trim(self, seconds: float) -> None:
        """Removes files that were fetched more than `seconds` ago."""
        remove_older(self.cache, time.time() - seconds)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.cache).free


def unavailable(error: BaseException) -> Unavailable:
    """The error that callers see; the log has the details and paths."""
    log.warning("object store: %s", " ".join(str(error).split())[:300])
    return Unavailable("the object store is unavailable")
