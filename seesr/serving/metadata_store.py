"""Interface of the store for uploads, idempotency keys and batch notes: SQLite on one server, Redis in a fleet."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

USAGE_DAYS = 40  # for which the usage of keys is kept


class MetadataStore(Protocol):
    def file(self, kind: str, name: str) -> Path:
        """A path on this machine for an incoming file ("parts") or an archive ("zips")."""
        ...

    def keep_upload(self, owner: str, record: dict[str, Any], path: Path) -> None:
        """Takes over the file at `path`; record["id"] names it."""
        ...

    def uploads(self, owner: str, id: str | None = None) -> list[dict[str, Any]]:
        """The owner's records, newest first, or the one of this id."""
        ...

    def upload_file(self, id: str) -> Path:
        """The file of an upload, to be read."""
        ...

    def drop_upload(self, owner: str, id: str) -> None: ...

    def claim(self, owner: str, key: str, digest: str, id: str) -> tuple[str, str] | None:
        """Gives an Idempotency-Key to the job `id`: None, or (digest, id) of the request that has it already."""
        ...

    def release(self, owner: str, key: str, id: str) -> None:
        """Frees an Idempotency-Key if the job or batch `id` has it."""
        ...

    def add_usage(self, owner: str, day: str, images: int, megapixels: float, quota: float | None) -> bool:
        """Adds to what an owner used on a UTC day, unless its megapixels would then exceed `quota`; whether it did."""
        ...

    def usage(self, owner: str) -> list[tuple[str, int, float]]:
        """(day, images, megapixels) of the last USAGE_DAYS, newest first."""
        ...

    def keep_note(self, id: str, note: dict[str, Any]) -> None:
        """What is to be known of a batch beside its jobs."""
        ...

    def note(self, id: str) -> dict[str, Any] | None: ...

    def free_bytes(self) -> int:
        """Room on the disk of this machine."""
        ...

    def expire(self, seconds: float) -> None:
        """Removes what is older."""
        ...

    def close(self) -> None: ...


def remove_older(folder: Path, limit: float, exceptions: Collection[str | None] = ()) -> None:
    """Removes files last written before `limit`, seconds since 1970, except those whose names are in `exceptions`.

    Another thread may remove the same files.
    """
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.name not in exceptions and path.stat().st_mtime < limit:
                path.unlink()
