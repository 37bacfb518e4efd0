"""The plain HTTP API: upscale one image, follow a job, cancel it, get its result."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from seesr.serving import responses
from seesr.serving.job import DONE, PRIORITIES, WAITING, Job, Unavailable
from seesr.serving.middleware import owner
from seesr.serving.refusal import Refused
from seesr.serving.requests import UpscaleRequest, is_empty, is_json, parse, read_json
from seesr.serving.service import Service, media_type
from seesr.serving.uploads import Stored, store_image
from seesr.settings import Settings

IMAGES = ("image/", "application/octet-stream")
EVENTS_INTERVAL = 0.25  # seconds between two looks for changes of an owner's jobs
KEEP_ALIVE = 10.0  # seconds without a change after which the stream sends a comment
NO_CHANGE = ": no change\n\n"
RECENT_JOBS = 200  # with which a stream of all jobs begins


def service_of(request: Request) -> Service:
    return request.app.state.service


def describe(service: Service, base: str, job: Job, ahead: int | None = None) -> responses.Job:
    """A job for people and programs."""
    here = f"{base}/jobs/{job.id}"
    return {
        "id": job.id,
        "status": job.status,
        "name": job.name,
        "stage": job.stage,
        "done": job.done,
        "total": job.total,
        "progress": 1.0 if job.status == DONE else job.progress,
        "seconds_left": None if job.ended else job.seconds_left,
        "ahead": ahead,
        "error": job.error,
        "settings": job.settings,
        "metrics": job.metrics,
        "created": job.created,
        "started": job.started,
        "completed": job.completed,
        "result": service.link(base, job) if job.status == DONE else None,
        "urls": {"self": here, "events": f"{here}/events", "result": f"{here}/result"},
    }


async def take(request: Request) -> UpscaleRequest:
    """What a request says, in its query and its body: a form, JSON, or the image itself.

    Raises:
        ValueError, Refused: one line.
    """
    kind = request.headers.get("content-type", "").lower()
    values: dict[str, Any] = dict(request.query_params)
    if kind.startswith("multipart/form-data"):
        form = await request.form(max_files=2, max_fields=100)
        values |= form
        values["image"] = values.get("image") or values.pop("file", None)
    elif is_json(request):
        values |= await read_json(request)
    elif kind.startswith(IMAGES) or not kind:
        values["image"] = request.stream()
    else:
        raise Refused("unsupported_media_type", "send an image body, a multipart form with a file named image, or JSON")
    return parse(UpscaleRequest, values)


async def store_both(request: Request, image: Any, mask: Any) -> tuple[Stored, Stored | None]:
    """The image of a request and its mask, if there is one, as files that last as long as the request.

    Raises:
        ValueError, Refused: one line.
    """
    service = service_of(request)
    if is_empty(image):
        raise Refused("invalid_input", "image is required", "image")
    image, mask = [await run_in_threadpool(service.source, request, source) for source in (image, mask)]
    stored = await store_image(image, service.part(request), service.configuration.allow_urls)
    if is_empty(mask):
        return stored, None
    try:
        return stored, await store_image(mask, service.part(request), service.configuration.allow_urls, "mask")
    except (ValueError, Refused) as error:
        raise Refused(getattr(error, "code", "invalid_input"), f"the mask cannot be used: {error}", "mask") from None


async def received(request: Request) -> tuple[UpscaleRequest, Settings, Stored, Stored | None]:
    """A request for one image: its fields, settings, and the checked files of image and mask.

    Raises:
        ValueError, Refused: one line.
    """
    try:
        body = await take(request)
        settings = body.settings()
        stored, mask = await store_both(request, body.image, body.mask)
    finally:
        await request.close()  # removes the files of a form
    await service_of(request).check(stored, settings, mask)
    return body, settings, stored, mask


async def upscale(request: Request) -> Response:
    """POST of one image: the result, or 202 with the job after `wait`. A client that disconnects cancels its job."""
    service = service_of(request)
    body, settings, stored, mask = await received(request)
    job = await run_in_threadpool(service.submit, request, stored, settings, body.options(), mask)
    return await finished(request, job, body.wait, body.answer == "link")


async def quote(request: Request) -> Response:
    """POST of the same request as `/upscale`: the quote. Nothing is queued."""
    service = service_of(request)
    body, settings, stored, _ = await received(request)
    job = Job.of(owner(request), settings, priority=PRIORITIES[body.priority], deadline=body.deadline)
    if (reason := service.jobs.ready()) is not None:
        raise Unavailable(reason, "not_ready")
    quoted = await run_in_threadpool(service.jobs.quote, job, stored.path)
    if quoted is None and service.configuration.redis is None:
        raise Unavailable("the weights were unloaded for another model; an image loads them again", "not_ready")
    if quoted is None:
        raise Refused("no_quotes", "no worker publishes its rates; update the workers of this fleet")
    deadline = body.deadline
    met = None if deadline is None else quoted.promised is None or quoted.promised <= deadline
    answer: responses.Quote = {**dataclasses.asdict(quoted), "promised": quoted.promised, "meets_deadline": met}  # type: ignore[typeddict-item]
    return JSONResponse(answer)


async def finished(request: Request, job: Job, wait: float, link: bool = False) -> Response:
    """The file of a job once it is there, or {"file_key", "public_url"}."""
    service = service_of(request)
    job = await service.wait(job, wait, request)
    if not job.ended:
        base = service.base(request)
        return JSONResponse(describe(service, base, job), 202, {"Location": f"{base}/jobs/{job.id}"})
    if link and job.status == DONE:
        link_to: responses.ResultLink = {"file_key": job.output, "public_url": service.link(service.base(request), job)}
        return JSONResponse(link_to)
    return await run_in_threadpool(file_of, service, job)


def file_of(service: Service, job: Job) -> Response:
    """The result of a job that has ended.

    Raises:
        Refused: it failed, or was canceled.
    """
    if job.status != DONE:
        raise Refused("job_failed" if job.error else "canceled", job.error or "the job was canceled")
    stem = job.name.rpartition(".")[0] or job.name
    settings = Settings(**job.settings)
    name = f"{stem}-{settings.label}.{settings.suffix}"
    headers = {"X-Job-Id": job.id, "X-Seed": str(job.settings["seed"])}
    return FileResponse(service.result(job), media_type=media_type(job), filename=name, headers=headers)


def show(request: Request) -> Response:
    """A job; one that waits also has `ahead`, the number of jobs of all keys before it."""
    service = service_of(request)
    job = service.owned(request, request.path_params["id"])
    ahead = service.jobs.ahead([job.id]) if job.status == WAITING else {}
    return JSONResponse(describe(service, service.base(request), job, ahead.get(job.id)))


def result(request: Request) -> Response:
    service = service_of(request)
    job = service.owned(request, request.path_params["id"])
    if not job.ended:
        raise Refused("not_finished", f"the job has no result yet: its status is {job.status}")
    return file_of(service, job)


def delete(request: Request) -> Response:
    service = service_of(request)
    job = service.owned(request, request.path_params["id"])
    service.jobs.cancel(job.id)
    return JSONResponse(describe(service, service.base(request), service.owned(request, job.id)), 202)


async def events(request: Request) -> Response:
    """Streams a job as server-sent events; with `cancel_on_close` it ends when the caller hangs up."""
    service, base = service_of(request), service_of(request).base(request)
    first = await run_in_threadpool(service.owned, request, request.path_params["id"])
    attached = request.query_params.get("cancel_on_close") in ("1", "true", "on")

    async def stream() -> AsyncIterator[str]:
        job = first
        try:
            async for change in changes_of(service, first):
                job = change or job
                name = "end" if job.ended else "progress"
                yield event(name, json.dumps(describe(service, base, job))) if change else NO_CHANGE
        finally:
            if attached and not job.ended and not service.jobs.closing:
                with anyio.CancelScope(shield=True):  # the caller that hung up has ended this task
                    await run_in_threadpool(service.jobs.cancel, job.id)

    return event_stream(stream())


async def changes_of(service: Service, job: Job) -> AsyncIterator[Job | None]:
    """The job as it is, and again after each change until its end; None after KEEP_ALIVE seconds without a change.

    A job that waits when the server stops is not followed to its end.
    """
    while True:
        yield job
        if job.ended or (service.jobs.closing and job.status == WAITING):
            return
        before = job.revision
        while job.revision == before and not job.ended:
            job = await service.jobs.changed(job.id, before, KEEP_ALIVE) or job
            if service.jobs.closing and job.status == WAITING:
                break
            if job.revision == before:
                yield None


def event(name: str, data: str, id: int | None = None) -> str:
    """One server-sent event."""
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"event: {name}\n{'' if id is None else f'id: {id}{chr(10)}'}{lines}\n"


def event_stream(events: AsyncIterator[str]) -> Response:
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx passes events on at once
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


async def all_events(request: Request) -> Response:
    """Streams all jobs of the caller's key over one connection, as server-sent events.

    It begins with an event "job" for each recent job, then "ready". Each later change of a job is another "job" event.
    An event "queue" has, for each waiting job by its id, the number of jobs of all keys before it; it is sent when
    that changes. Closing the stream cancels nothing.
    """
    service, base, name = service_of(request), service_of(request).base(request), owner(request)

    async def stream() -> AsyncIterator[str]:
        revisions: dict[str, int] = {}
        active: dict[str, Job] = {}
        first, latest = True, time.monotonic()
        places: dict[str, int] = {}
        while True:
            jobs = await asyncio.to_thread(changes, service, name, revisions, active)
            waiting = [job.id for job in active.values() if job.status == WAITING]
            before, places = places, await asyncio.to_thread(service.jobs.ahead, waiting) if waiting else {}
            if jobs:
                yield "".join(event("job", json.dumps(describe(service, base, job))) for job in jobs)
            if places and places != before:
                yield event("queue", json.dumps(places))
            if first:
                yield event("ready", "{}")
            elif not jobs and time.monotonic() - latest > KEEP_ALIVE:
                yield NO_CHANGE
            if jobs or time.monotonic() - latest > KEEP_ALIVE:
                latest = time.monotonic()
            if service.jobs.closing:
                return
            first = False
            await asyncio.sleep(EVENTS_INTERVAL)

    return event_stream(stream())


def changes(service: Service, owner: str, revisions: dict[str, int], active: dict[str, Job]) -> list[Job]:
    """Jobs of an owner that are new or have changed since the last call, oldest first.

    Args:
        revisions: of all jobs that were reported, by id; updated.
        active: those that had not ended then; updated.
    """
    limit = 10 if revisions else RECENT_JOBS
    candidates, before = [], None
    while page := service.jobs.recent(owner, limit, before):
        candidates += [job for job in page if job.id not in revisions]
        if not revisions or page[-1].id in revisions or len(page) < limit:
            break
        before = page[-1].created
    candidates += [job for id in list(active) if (job := service.jobs.find(id)) is not None]
    changed = []
    for job in sorted(candidates, key=lambda job: job.created):
        if revisions.get(job.id) == job.revision:
            continue
        revisions[job.id] = job.revision
        changed.append(job)
        if job.ended:
            active.pop(job.id, None)
        else:
            active[job.id] = job
    return changed


ROUTES = [
    Route("/events", all_events),
    Route("/upscale", upscale, methods=["POST"]),
    Route("/quote", quote, methods=["POST"]),
    Route("/jobs/{id}", show),
    Route("/jobs/{id}", delete, methods=["DELETE"]),
    Route("/jobs/{id}/result", result),
    Route("/jobs/{id}/events", events),
]
