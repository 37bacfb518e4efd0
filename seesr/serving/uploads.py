"""Pictures on their way in: bodies, forms, data URIs, uploads and URLs, each to a file on disk, within its limits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path, PurePosixPath
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request

from seesr.images.limits import LARGEST_FILE
from seesr.serving.fetch import fetch
from seesr.serving.middleware import JSON_TOO_LARGE, LARGEST_JSON
from seesr.serving.refusal import Refused
from seesr.settings.parsing import from_data_uri

TOO_LARGE = f"the image file is larger than {LARGEST_FILE / 2**20:.0f} MiB"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file that was taken in: where it lies, what it was called, its SHA-256."""

    path: Path
    name: str
    digest: str


async def store(chunks: AsyncIterator[bytes], part: Path, name: str) -> Stored:
    """Writes a stream to disk, piece by piece.

    Raises:
        Refused: 413, it is larger than a picture's file may be; nothing is left.
    """
    digest, size = hashlib.sha256(), 0
    try:
        with part.open("xb") as file:
            async for chunk in chunks:
                size += len(chunk)
                if size > LARGEST_FILE:
                    raise Refused(413, TOO_LARGE)
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
    """The last part of a file name, without what could harm a terminal, a header or a folder."""
    last = PurePosixPath(name.replace("\\", "/")).name
    kept = "".join(c for c in last if c.isprintable() and c not in '"\\/:*?<>|')[:120]
    return kept.strip(". ") or "image"


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: too large, or no JSON object.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_JSON:
            raise Refused(413, JSON_TOO_LARGE)
    try:
        value = json.loads(body, parse_constant=lambda name: _no_number(name))
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


async def from_words(words: Any, part: Path, allowed: str) -> Stored:
    """An image that was named in JSON: a data URI, or an http(s) URL where those are allowed.

    Raises:
        ValueError, Refused: one line.
    """
    if not isinstance(words, str):
        raise ValueError("image must be a data URI, an upload of this server or an http(s) URL")
    if words.startswith("data:"):
        return await store(once(from_data_uri(words)), part, "image")
    if words.startswith(("http://", "https://")):
        return await store(fetch(words, allowed), part, urllib.parse.urlsplit(words).path)
    raise ValueError("image must be a data URI, an upload of this server or an http(s) URL")
