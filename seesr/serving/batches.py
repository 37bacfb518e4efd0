"""The batch routes: many images in one request, one job for each, one zip of results."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import zipfile
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from seesr.serving.api import describe, service_of
from seesr.serving.archives import MAX_FILES, unpack
from seesr.serving.job import DONE, Job, Late, QueueFull
from seesr.serving.middleware import owner
from seesr.serving.refusal import Refused
from seesr.serving.requests import BatchRequest, parse
from seesr.serving.responses import Batch, NewBatch, RefusedFile
from seesr.serving.service import Service, check_priority, is_id
from seesr.serving.uploads import Stored, pieces, store
from seesr.settings import Settings


async def create_batch(request: Request) -> Response:
    """POST of many files, or of a zip: a job each. A bad file fails alone, with its name."""
    service, kind = service_of(request), request.headers.get("content-type", "").lower()
    values: dict[str, Any] = dict(request.query_params)
    files: list[Stored] = []
    refused: list[RefusedFile] = []  # entries of a zip that cannot be unpacked
    try:
        if kind.startswith("multipart/form-data"):
            async with request.form(max_files=MAX_FILES, max_fields=100) as form:
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        files.append(await store(pieces(value), service.part(request), value.filename or "image"))
                    else:
                        values[name] = value
        elif kind.startswith("application/zip"):
            archive = await store(request.stream(), service.part(request), "archive.zip")
            try:
                prefix = secrets.token_hex(16)
                files, refused = await asyncio.to_thread(unpack, archive.path, archive.path.parent, prefix)
            finally:
                archive.path.unlink()
        else:
            raise Refused("unsupported_media_type", "send a multipart form of files, or a zip")
        if not files and not refused:
            raise Refused("invalid_input", "the batch has no files", "image")
        batch_body = parse(BatchRequest, values)
        return JSONResponse(
            await queue_batch(request, files, refused, batch_body.settings(), batch_body.options()), 202
        )
    finally:
        for stored in files:
            stored.path.unlink(missing_ok=True)


async def queue_batch(
    request: Request,
    files: list[Stored],
    refused: list[RefusedFile],
    settings: Settings,
    values: dict[str, Any],
) -> NewBatch:
    """Queues every file that can be read, or finds the batch of the same Idempotency-Key."""
    service, base, batch = service_of(request), service_of(request).base(request), secrets.token_hex(16)
    check_priority(request, values)
    batch_body = [[stored.digest for stored in files], dataclasses.asdict(settings), values]
    before = await run_in_threadpool(service.claim, request, batch_body, batch)
    if before is not None:
        note = await run_in_threadpool(service.store.note, before)
        if note is None:
            raise Refused(
                "idempotency_expired", "the batch of this Idempotency-Key is still being received, or has expired"
            )
        jobs = await run_in_threadpool(service.jobs.batch, owner(request), before)
        return listed(service, base, before, jobs, note["refused"])
    queued = []
    try:
        for stored in files:
            try:
                await service.check(stored, settings)
                queued.append(await run_in_threadpool(service.submit, request, stored, settings, values, batch=batch))
            except (ValueError, Refused, QueueFull, Late) as error:
                code = getattr(error, "code", "invalid_input")
                refused.append({"name": stored.name, "code": code, "error": str(error)})
        note = {"refused": refused, "owner": owner(request)}
        await run_in_threadpool(service.store.keep_note, batch, note)
    except BaseException:  # the answer names no batch: a retry sends all of it again
        for job in queued:
            await run_in_threadpool(service.jobs.cancel, job.id)
        await run_in_threadpool(service.release, request, batch)
        raise
    return listed(service, base, batch, queued, refused)


def listed(service: Service, base: str, id: str, jobs: list[Job], refused: list[RefusedFile]) -> NewBatch:
    """A batch as its sender sees it."""
    result = [describe(service, base, job) for job in jobs]
    return {"id": id, "jobs": result, "refused": refused, "urls": {"self": f"{base}/batches/{id}"}}


def batch_of(request: Request) -> tuple[list[Job], list[RefusedFile]]:
    """Jobs and refused files of a batch.

    Raises:
        Refused: 404.
    """
    service, id = service_of(request), request.path_params["id"]
    note = service.store.note(id) if is_id(id) else None
    if note is None or note["owner"] != owner(request):
        raise Refused("not_found", "there is no batch of this id")
    return service.jobs.batch(owner(request), id), note["refused"]


def show_batch(request: Request) -> Response:
    service, base = service_of(request), service_of(request).base(request)
    jobs, refused = batch_of(request)
    done = all(job.ended for job in jobs)
    listed = [describe(service, base, job) for job in jobs]
    batch_info: Batch = {
        "id": request.path_params["id"],
        "status": "ended" if done else "processing",
        "jobs": listed,
        "refused": refused,
        "result": f"{base}{request.url.path}/result" if done else None,
    }
    return JSONResponse(batch_info)


def batch_result(request: Request) -> Response:
    """A zip of all results, and a text that names what failed."""
    service = service_of(request)
    jobs, refused = batch_of(request)
    if not all(job.ended for job in jobs):
        raise Refused("not_finished", "the batch is not done")
    path = service.store.file("zips", f"{request.path_params['id']}.zip")
    if not path.exists():
        write_zip(service, service.part(request), path, jobs, refused)
    return FileResponse(path, media_type="application/zip", filename="results.zip")


def write_zip(service: Service, part: Path, path: Path, jobs: list[Job], refused: list[RefusedFile]) -> None:
    used = set()
    failed = [f"{file['name']}: {file['error']}" for file in refused]
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for job in jobs:
            if job.status != DONE:
                failed.append(f"{job.name}: {job.error or job.status}")
                continue
            stem = job.name.rpartition(".")[0] or job.name
            name = f"{stem}.{job.suffix}"
            if name in used:
                name = f"{stem}-{job.id[:8]}.{job.suffix}"
            used.add(name)
            try:
                archive.write(service.result(job), name)
            except Refused as error:
                failed.append(f"{job.name}: {error}")
        if failed:
            archive.writestr("failed.txt", "\n".join(failed) + "\n")
    part.replace(path)


ROUTES = [
    Route("/batches", create_batch, methods=["POST"]),
    Route("/batches/{id}", show_batch),
    Route("/batches/{id}/result", batch_result),
]
