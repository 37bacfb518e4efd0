"""The fleet's images in its object store: inputs, results and uploads."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import obstore

from seesr.object_store import Store
from seesr.serving.job import Away, Job
from seesr.serving.metadata_store import remove_older

log = logging.getLogger(__name__)

LOOK = 5.0  # seconds for which an answer of the store is believed
MISSING = (FileNotFoundError, obstore.exceptions.NotFoundError)


class Objects:
    """Files by name, under in/, out/ and uploads/.

    Args:
        store: of the configuration.
        cache: folder of this machine for what was fetched.
    """

    def __init__(self, store: Store, cache: Path) -> None:
        self.store, self.cache = store.store, cache
        self.looked: tuple[float, str | None] = (0.0, None)
        cache.mkdir(parents=True, exist_ok=True)

    def put(self, name: str, data: bytes | Path, once: bool = False) -> None:
        """Writes a file; `once`: the first writer wins, and a second one is no error.

        Raises:
            Away: the store does not take it.
        """
        try:
            obstore.put(self.store, name, data, mode="create" if once else "overwrite")
        except obstore.exceptions.AlreadyExistsError:
            return
        except (obstore.exceptions.BaseError, OSError) as error:
            raise away(error) from None

    def get(self, name: str) -> Path:
        """The file, on this machine.

        Raises:
            FileNotFoundError: it has expired.
            Away: the store does not give it.
        """
        path = self.cache / name.replace("/", "-")
        if path.exists():
            return path
        part = path.with_name(f"{path.name}.{time.monotonic_ns()}")
        try:
            with part.open("wb") as file:
                for piece in obstore.get(self.store, name).stream():
                    file.write(piece)
            part.replace(path)
        except MISSING:
            part.unlink()
            raise FileNotFoundError(name) from None
        except (obstore.exceptions.BaseError, OSError) as error:
            part.unlink(missing_ok=True)
            raise away(error) from None
        return path

    def drop(self, name: str) -> None:
        """Removes a file, here and there; one that is gone is no error."""
        (self.cache / name.replace("/", "-")).unlink(missing_ok=True)
        try:
            obstore.delete(self.store, name)
        except MISSING:
            return
        except (obstore.exceptions.BaseError, OSError) as error:
            raise away(error) from None

    def exists(self, name: str) -> bool:
        """Whether the store has a file.

        Raises:
            Away: the store does not answer.
        """
        try:
            obstore.head(self.store, name)
        except MISSING:
            return False
        except (obstore.exceptions.BaseError, OSError) as error:
            raise away(error) from None
        return True

    def forget_inputs(self, job: Job) -> None:
        """Removes this machine's copies."""
        for name in (f"in-{job.id}", f"in-{job.id}-mask"):
            (self.cache / name).unlink(missing_ok=True)

    def drop_inputs(self, job: Job) -> None:
        self.drop(f"in/{job.id}")
        if job.masked:
            self.drop(f"in/{job.id}-mask")

    def away(self) -> str | None:
        """None if the store answers, else what it says; asked at most every LOOK seconds."""
        if time.monotonic() - self.looked[0] > LOOK:
            reason = None
            try:
                obstore.head(self.store, "out/none")
            except MISSING:
                pass
            except (obstore.exceptions.BaseError, OSError) as error:
                reason = str(away(error))
            self.looked = time.monotonic(), reason
        return self.looked[1]

    def trim(self, seconds: float) -> None:
        """Removes what was fetched longer ago than this."""
        remove_older(self.cache, time.time() - seconds)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.cache).free


def away(error: BaseException) -> Away:
    """What callers are told; the log says more, and names paths."""
    log.warning("object store: %s", " ".join(str(error).split())[:300])
    return Away("the object store is away")
