"""The plain API: a picture in, a picture out; or a job to ask about; or many pictures at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
import zipfile
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from seesr.serving.gate import Refused, owner, whole
from seesr.serving.intake import MOST_FILES, Stored, from_words, pieces, read_json, settings_of, store, unpack
from seesr.serving.job import DONE, WAITING, Full, Job
from seesr.serving.service import COMMON, Service, media_type
from seesr.settings import Settings

LONGEST_WAIT = 600.0  # seconds
LOOK = 0.25  # seconds between two looks whether the caller is still there
IMAGES = ("image/", "application/octet-stream")


def service(request: Request) -> Service:
    return request.app.state.service


def shown(of: Service, base: str, job: Job) -> dict[str, Any]:
    """A job for people and programs."""
    left = None
    if job.started and job.total and not job.ended and job.done:
        left = round((time.time() - job.started) * (job.total / job.done - 1), 1)  # of this stage, at its pace so far
    here = f"{base}/jobs/{job.id}"
    return {
        "id": job.id,
        "status": job.status,
        "name": job.name,
        "stage": job.stage,
        "done": job.done,
        "total": job.total,
        "seconds_left": left,
        "error": job.error,
        "settings": job.settings,
        "metrics": job.metrics,
        "created": job.created,
        "started": job.started,
        "completed": job.completed,
        "result": of.link(base, job) if job.status == DONE else None,
        "urls": {"self": here, "events": f"{here}/events", "result": f"{here}/result"},
    }


async def take(request: Request) -> tuple[Stored, dict[str, Any]]:
    """The image of a request and everything else that it says: body, form or JSON, and the query.

    Raises:
        ValueError, Refused: one line.
    """
    of, kind = service(request), request.headers.get("content-type", "").lower()
    given: dict[str, Any] = dict(request.query_params)
    if kind.startswith("multipart/form-data"):
        async with request.form(max_files=1, max_fields=100) as form:
            image = form.get("image") or form.get("file")
            if not isinstance(image, UploadFile):
                raise Refused(422, "the form has no file named image")
            given |= {name: value for name, value in form.items() if isinstance(value, str)}
            return await store(pieces(image), of.part(), image.filename or "image"), given
    if kind.startswith("application/json"):
        body = await read_json(request)
        if "image" not in body:
            raise Refused(422, "image is required")
        stored = await from_words(body["image"], of.part(), of.configuration.allow_urls)
        return stored, {**given, **body}
    if kind.startswith(IMAGES) or not kind:
        return await store(request.stream(), of.part(), "image"), given
    raise Refused(415, "send an image body, a multipart form with a file named image, or JSON")


async def upscale(request: Request) -> Response:
    """POST of one picture: the result, or 202 and a job when `wait` runs out. Hanging up cancels while it waits."""
    of = service(request)
    stored, given = await take(request)
    try:
        settings = settings_of(given, COMMON)
        wait = whole(given.get("wait", 60), "wait", 0, LONGEST_WAIT)
        of.check(stored, settings)
    except ValueError:
        stored.path.unlink(missing_ok=True)
        raise
    return await finished(request, of.submit(request, stored, settings, given), wait)


async def finished(request: Request, job: Job, wait: float) -> Response:
    """The file of a job once it is there."""
    of, end = service(request), time.monotonic() + wait
    while not job.ended and time.monotonic() < end and not (of.jobs.closing and job.status == WAITING):
        job = await of.jobs.changed(job.id, job.revision, min(LOOK, end - time.monotonic())) or job
        if await request.is_disconnected():
            of.jobs.cancel(job.id)
            return Response(status_code=204)
    if not job.ended:
        base = of.base(request)
        return JSONResponse(shown(of, base, job), 202, {"Location": f"{base}/jobs/{job.id}"})
    return file_of(of, job)


def file_of(of: Service, job: Job) -> Response:
    """The result of a job that has ended.

    Raises:
        Refused: it failed, or was canceled.
    """
    if job.status != DONE:
        raise Refused(422 if job.error else 409, job.error or "the job was canceled")
    name = (
        f"{job.name.rpartition('.')[0] or job.name}-x{job.settings['scale_factor']:g}.{job.settings['output_format']}"
    )
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.settings["seed"])}
    return FileResponse(of.jobs.result(job), media_type=media_type(job), filename=name, headers=headers)


async def show(request: Request) -> Response:
    of = service(request)
    return JSONResponse(shown(of, of.base(request), of.owned(request, request.path_params["id"])))


async def result(request: Request) -> Response:
    of = service(request)
    job = of.owned(request, request.path_params["id"])
    if not job.ended:
        raise Refused(409, f"the job is not done ({job.status})")
    return file_of(of, job)


async def delete(request: Request) -> Response:
    of = service(request)
    job = of.owned(request, request.path_params["id"])
    of.jobs.cancel(job.id)
    return JSONResponse(shown(of, of.base(request), of.owned(request, job.id)), 202)


async def events(request: Request) -> Response:
    """The job's way as server-sent events; `cancel_on_close` ends it when nobody listens any more."""
    of, base = service(request), service(request).base(request)
    first = of.owned(request, request.path_params["id"])
    attached = request.query_params.get("cancel_on_close") in ("1", "true", "on")

    async def stream() -> AsyncIterator[str]:
        job = first
        try:
            while True:
                name = "end" if job.ended else "progress"
                yield f"event: {name}\ndata: {json.dumps(shown(of, base, job))}\n\n"
                if job.ended or (of.jobs.closing and job.status == WAITING):
                    return
                before = job.revision
                while job.revision == before and not job.ended:
                    job = await of.jobs.changed(job.id, before, 10) or job
                    if job.revision == before:
                        yield ": still here\n\n"
                    if of.jobs.closing and job.status == WAITING:
                        break
        finally:
            if attached and not job.ended and not of.jobs.closing:
                of.jobs.cancel(job.id)

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


async def create_batch(request: Request) -> Response:
    """POST of many files, or of a zip: a job each. A bad file fails alone, with its name."""
    of, kind = service(request), request.headers.get("content-type", "").lower()
    given: dict[str, Any] = dict(request.query_params)
    files: list[Stored] = []
    try:
        if kind.startswith("multipart/form-data"):
            async with request.form(max_files=MOST_FILES, max_fields=100) as form:
                for name, value in form.multi_items():
                    if isinstance(value, UploadFile):
                        files.append(await store(pieces(value), of.part(), value.filename or "image"))
                    else:
                        given[name] = value
        elif kind.startswith("application/zip"):
            archive = await store(request.stream(), of.part(), "archive.zip")
            try:
                folder, prefix = archive.path.parent, secrets.token_hex(16)
                for stored in unpack(archive.path, folder, prefix):
                    files.append(stored)
                    await asyncio.sleep(0)  # others have their turn
            finally:
                archive.path.unlink()
        else:
            raise Refused(415, "send a multipart form of files, or a zip")
        if not files:
            raise Refused(422, "the batch has no files")
        settings = settings_of(given, COMMON)
        return JSONResponse(queue_batch(request, files, settings, given), 202)
    finally:
        for stored in files:
            stored.path.unlink(missing_ok=True)


def queue_batch(request: Request, files: list[Stored], settings: Settings, given: dict[str, Any]) -> dict[str, Any]:
    """Queues every file that can be read."""
    of, base, batch = service(request), service(request).base(request), secrets.token_hex(16)
    queued, refused = [], []
    for stored in files:
        try:
            of.check(stored, settings)
            queued.append(of.submit(request, stored, settings, given, batch=batch))
        except (ValueError, Full) as error:
            refused.append({"name": stored.name, "error": str(error)})
    kept = {"refused": refused, "owner": owner(request)}
    of.journal.file("outputs", f"{batch}.json").write_text(json.dumps(kept))
    jobs = [shown(of, base, job) for job in queued]
    return {"id": batch, "jobs": jobs, "refused": refused, "urls": {"self": f"{base}/batches/{batch}"}}


def batch_of(request: Request) -> tuple[list[Job], list[dict[str, str]]]:
    """Jobs and refused files of a batch.

    Raises:
        Refused: 404.
    """
    of, id = service(request), request.path_params["id"]
    note = of.journal.file("outputs", f"{id}.json") if id.isalnum() else None
    if note is None or not note.exists():
        raise Refused(404, "there is no batch of this id")
    kept = json.loads(note.read_text())
    if kept["owner"] != owner(request):
        raise Refused(404, "there is no batch of this id")
    return of.jobs.batch(owner(request), id), kept["refused"]


async def show_batch(request: Request) -> Response:
    of, base = service(request), service(request).base(request)
    jobs, refused = batch_of(request)
    done = all(job.ended for job in jobs)
    listed = [shown(of, base, job) for job in jobs]
    found = {"id": request.path_params["id"], "status": "ended" if done else "processing", "jobs": listed}
    return JSONResponse({**found, "refused": refused, "result": f"{base}{request.url.path}/result" if done else None})


async def batch_result(request: Request) -> Response:
    """A zip of all results, and a text that names what failed."""
    of = service(request)
    jobs, refused = batch_of(request)
    if not all(job.ended for job in jobs):
        raise Refused(409, "the batch is not done")
    path = of.journal.file("outputs", f"{request.path_params['id']}.zip")
    if not path.exists():
        await asyncio.to_thread(write_zip, of, path, jobs, refused)
    return FileResponse(path, media_type="application/zip", filename="results.zip")


def write_zip(of: Service, path: Any, jobs: list[Job], refused: list[dict[str, str]]) -> None:
    part, used = of.part(), set()
    failed = [f"{file['name']}: {file['error']}" for file in refused]
    with contextlib.suppress(FileNotFoundError), zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for job in jobs:
            if job.status != DONE:
                failed.append(f"{job.name}: {job.error or job.status}")
                continue
            stem = job.name.rpartition(".")[0] or job.name
            name = f"{stem}.{job.settings['output_format']}"
            if name in used:
                name = f"{stem}-{job.id[:8]}.{job.settings['output_format']}"
            used.add(name)
            archive.write(of.jobs.result(job), name)
        if failed:
            archive.writestr("failed.txt", "\n".join(failed) + "\n")
    part.replace(path)


ROUTES = [
    Route("/upscale", upscale, methods=["POST"]),
    Route("/jobs/{id}", show),
    Route("/jobs/{id}", delete, methods=["DELETE"]),
    Route("/jobs/{id}/result", result),
    Route("/jobs/{id}/events", events),
    Route("/batches", create_batch, methods=["POST"]),
    Route("/batches/{id}", show_batch),
    Route("/batches/{id}/result", batch_result),
]
