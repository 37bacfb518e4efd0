"""Stores incoming images (bodies, forms, data URIs, uploads and URLs) as files on disk, within limits."""

from __future__ import annotations

import dataclasses
import hashlib
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from seesr.images.limits import LARGEST_FILE
from seesr.serving.fetch import fetch
from seesr.serving.refusal import Refused
from seesr.settings.parsing import from_data_uri
from seesr.settings.validation import FieldError

TOO_LARGE = f"the image file is larger than {LARGEST_FILE / 2**20:.0f} MiB"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A stored file: its path, its original name and its SHA-256."""

    path: Path
    name: str
    digest: str


class Uploaded(NamedTuple):
    """An earlier upload: its file and its record."""

    path: Path
    record: dict[str, Any]


async def store(chunks: AsyncIterator[bytes], part: Path, name: str) -> Stored:
    """Writes a stream to disk, piece by piece.

    Raises:
        Refused: 413, it is larger than an image's file may be; nothing is left.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with part.open("xb") as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > LARGEST_FILE:
                    raise Refused("too_large", TOO_LARGE)
                digest.update(chunk)
                file.write(chunk)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Stored(part, clean_name(name), digest.hexdigest())


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def pieces(upload: UploadFile) -> AsyncIterator[bytes]:
    while chunk := await upload.read(2**20):
        yield chunk


def clean_name(name: str) -> str:
    """The last part of a file name, without characters that are unsafe in a terminal, a header or a path."""
    last = PurePosixPath(name.replace("\\", "/")).name
    cleaned = "".join(c for c in last if c.isprintable() and c not in '"\\/:*?<>|')[:120]
    return cleaned.strip(". ") or "image"


async def store_image(source: Any, part: Path, allowed: str, name: str = "image") -> Stored:
    """An image however it was sent: an uploaded file, a stream, a data URI, or an http(s) URL where those are allowed.

    Raises:
        ValueError, Refused: one line.
    """
    if isinstance(source, Uploaded):
        part.hardlink_to(source.path)
        return Stored(part, source.record["name"], source.record["checksums"]["sha256"])
    if isinstance(source, UploadFile):
        return await store(pieces(source), part, source.filename or name)
    if isinstance(source, AsyncIterator):
        return await store(source, part, name)
    scheme = source.strip()[:8].lower() if isinstance(source, str) else ""
    if scheme.startswith("data:"):
        return await store(once(await run_in_threadpool(from_data_uri, source)), part, name)
    if scheme.startswith(("http://", "https://")):
        return await store(fetch(source.strip(), allowed), part, urllib.parse.urlsplit(source).path)
    raise FieldError(f"{name} must be a data URI, an upload of this server or an http(s) URL", name)
