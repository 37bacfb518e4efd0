"""Replicate's files API: uploads before a prediction, and results behind signed links."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Any, cast

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from seesr.serving import responses
from seesr.serving.api import service_of
from seesr.serving.middleware import owner
from seesr.serving.refusal import Refused
from seesr.serving.requests import Upload, parse, parse_json
from seesr.serving.service import when
from seesr.serving.uploads import pieces, store

LARGEST_METADATA = 64 * 2**10  # bytes of JSON that go with a file


def describe(request: Request, record: dict[str, Any]) -> responses.File:
    address = f"{service_of(request).base(request)}/v1/files/{record['id']}"
    return cast(responses.File, {**record, "urls": {"get": address}})


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


async def create_file(request: Request) -> Response:
    """POST of a form with `content`, as the clients send files before a prediction."""
    service = service_of(request)
    async with request.form(max_files=2, max_fields=4, max_part_size=LARGEST_METADATA) as form:
        content, metadata = form.get("content"), form.get("metadata")
        if not isinstance(content, UploadFile):
            raise Refused("invalid_input", "the form has no file named content", "content")
        if isinstance(metadata, UploadFile):  # the JavaScript client sends it as a file
            if (metadata.size or 0) > LARGEST_METADATA:
                message = f"metadata has {metadata.size} bytes; the limit is {LARGEST_METADATA}"
                raise Refused("too_large", message, "metadata")
            metadata = await metadata.read()
        try:
            value = parse_json(metadata) if metadata else {}
            json.dumps(value, allow_nan=False)  # 1e999 is no number that an answer could show
        except ValueError as error:
            raise Refused("invalid_input", f"metadata is not JSON ({error})", "metadata") from None
        metadata = parse(Upload, {"metadata": value}).metadata
        stored = await store(pieces(content), service.part(request), content.filename or "image")
        kind = content.content_type
    id, now = secrets.token_hex(16), time.time()
    size = stored.path.stat().st_size
    md5 = await asyncio.to_thread(md5_of, stored.path)
    record = {
        "id": id,
        "name": stored.name,
        "content_type": kind or "application/octet-stream",
        "size": size,
        "etag": md5,
        "checksums": {"sha256": stored.digest, "md5": md5},
        "metadata": metadata,
        "created_at": when(now),
        "expires_at": when(now + service.configuration.keep * 3600),
    }
    await run_in_threadpool(service.store.keep_upload, owner(request), record, stored.path)
    return JSONResponse(describe(request, record), 201)


def show_file(request: Request) -> Response:
    return JSONResponse(describe(request, service_of(request).upload(request, request.path_params["id"])))


def download_file(request: Request) -> Response:
    record = service_of(request).upload(request, request.path_params["id"])
    path = service_of(request).upload_file(record)
    return FileResponse(path, media_type="application/octet-stream", filename=record["name"])


def delete_file(request: Request) -> Response:
    record = service_of(request).upload(request, request.path_params["id"])
    service_of(request).store.drop_upload(owner(request), record["id"])
    return Response(status_code=204)


def list_files(request: Request) -> Response:
    records = service_of(request).store.uploads(owner(request))
    return JSONResponse({"previous": None, "next": None, "results": [describe(request, record) for record in records]})


def output(request: Request) -> Response:
    """The bytes behind a signed link."""
    path = service_of(request).linked(request.path_params["name"], request.query_params)
    return FileResponse(path, headers={"Cache-Control": "private, max-age=3600"})


ROUTES = [
    Route("/v1/files", create_file, methods=["POST"]),
    Route("/v1/files", list_files),
    Route("/v1/files/{id}", show_file),
    Route("/v1/files/{id}", delete_file, methods=["DELETE"]),
    Route("/v1/files/{id}/download", download_file),
    Route("/v1/outputs/{name}", output),
]
