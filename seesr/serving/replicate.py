"""Replicate's HTTP API: official clients work after changing the base URL and the token."""

from __future__ import annotations

import json
import math
import re
from collections.abc import AsyncIterator

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seesr.serving import files, responses
from seesr.serving.api import NO_CHANGE, changes_of, event, event_stream, service_of, store_both
from seesr.serving.job import CANCELED, DONE, RUNNING, WAITING, Job
from seesr.serving.middleware import owner
from seesr.serving.models import Model
from seesr.serving.refusal import Refused
from seesr.serving.requests import Input, PredictionRequest, parse, read_json
from seesr.serving.service import Service, when
from seesr.serving.webhooks import check_target, whsec
from seesr.settings import cog_schema
from seesr.settings.parsing import settings_of

PAGE = 100
LONGEST_WAIT = 60.0  # seconds


def prediction(service: Service, base: str, job: Job, whole: bool = True) -> responses.Prediction:
    """A job as Replicate shows it.

    Args:
        whole: with the output. Over plain http that is a data URI, since the clients take only https links for files.
    """
    output, removed = output_of(service, base, job, whole)
    metrics = dict(job.metrics)
    if job.started and job.completed:
        metrics |= {"predict_time": job.completed - job.started, "total_time": job.completed - job.created}
    here = f"{base}/v1/predictions/{job.id}"
    version = job.version or service.models.default.version
    model = service.models.by_version.get(version, service.models.default)
    return {
        "id": job.id,
        "model": model.title_for(job.owner),
        "version": version,
        "input": {"image": job.name, **job.settings},
        "logs": job.logs,
        "output": output,
        "data_removed": removed,
        "error": job.error,
        "status": job.status,
        "source": "api",
        "metrics": metrics,
        "created_at": when(job.created),
        "started_at": when(job.started),
        "completed_at": when(job.completed),
        "urls": {
            "get": here,
            "cancel": f"{here}/cancel",
            "stream": f"{here}/stream?{service.signed_query(stream_name(job.id))}",
            "web": f"{base}/",
        },
    }


def output_of(service: Service, base: str, job: Job, whole: bool = True) -> tuple[str | None, bool]:
    """(address of the result, whether it was removed): a link over https, a data URI over http if `whole`."""
    if job.status != DONE or not job.output:
        return None, False
    try:
        return service.link(base, job) if base.startswith("https:") or not whole else service.data_uri(job), False
    except Refused:
        return None, True


def stream_name(id: str) -> str:
    """What the link to a prediction's stream is signed for."""
    return f"{id}/stream"


async def create(request: Request) -> Response:
    """POST of a prediction: queues it, and waits for it as long as `Prefer: wait` says."""
    service, body = service_of(request), parse(PredictionRequest, await read_json(request))
    model = model_of(request, body.version)
    inputs = parse(Input, body.input, "input.")
    settings = settings_of(inputs.model_extra or {})
    if body.webhook is not None:
        check_target(body.webhook, service.configuration.local_webhooks)
    stored, mask = await store_both(request, inputs.image, inputs.mask)
    await service.check(stored, settings, mask)
    more = {"webhook": body.webhook, "events": body.webhook_events_filter, "version": model.version}
    job = await run_in_threadpool(service.submit, request, stored, settings, {}, mask, **more)
    job = await service.wait(job, preferred_wait(request))
    return await run_in_threadpool(created, service, service.base(request), job)


def created(service: Service, base: str, job: Job) -> Response:
    """The answer to a new prediction, on a worker thread: the output may be many megabytes of base64."""
    record = prediction(service, base, job)
    if record["status"] == RUNNING:  # the clients take "processing" after a wait for the end
        record["status"] = WAITING
    return JSONResponse(record, 201)


def model_of(request: Request, version: str | None) -> Model:
    """The model that a request names in its path, in `version` (an id, owner/name or owner/name:id), or in both.

    Raises:
        Refused: 404 or 422.
    """
    models, path = service_of(request).models, request.path_params
    named = models.named(path["owner"], path["name"]) if "name" in path else None
    if "name" in path and named is None:
        detail = f"there is no model {path['owner']}/{path['name']} here; there are {models.examples}"
        raise Refused("not_found", detail)
    if version is None:
        if named is None:
            raise Refused("invalid_input", "version is required", "version")
        return named
    requested = version.rpartition(":")[2]
    owner, slash, name = requested.partition("/")
    model = models.named(owner, name) if slash else models.by_version.get(requested)
    if model is None or (named is not None and model.version != named.version):
        known = named or models.default
        detail = f"version {requested[:80]!r} does not exist; use {known.version} or one of {models.examples}"
        raise Refused("version_not_found", detail, "version")
    return named or model


def preferred_wait(request: Request) -> float:
    """Seconds of a header `Prefer: wait` or `Prefer: wait=N`; 0 without one."""
    for part in request.headers.get("prefer", "").split(","):
        name, _, value = part.strip().partition("=")
        if name == "wait":
            return min(LONGEST_WAIT, float(value)) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?", value) else LONGEST_WAIT
    return 0.0


def show(request: Request) -> Response:
    service = service_of(request)
    return JSONResponse(prediction(service, service.base(request), service.owned(request, request.path_params["id"])))


async def stream(request: Request) -> Response:
    """Streams a prediction as Replicate does, with the events logs, output, error and done. Its link is signed."""
    service, base, id = service_of(request), service_of(request).base(request), request.path_params["id"]
    service.check_link(stream_name(id), request.query_params)
    first = await run_in_threadpool(service.jobs.find, id)
    if first is None:
        raise Refused("not_found", "there is no prediction of this id")

    async def events() -> AsyncIterator[str]:
        job, sent = first, 0
        async for change in changes_of(service, first):
            job = change or job
            if change is None:
                yield NO_CHANGE
            elif job.logs[sent:]:
                yield event("logs", job.logs[sent:].rstrip("\n"), job.revision)
                sent = len(job.logs)
        output, removed = await run_in_threadpool(output_of, service, base, job)
        if output is not None:
            yield event("output", output, job.revision)
        error = "the result was removed" if removed else job.error
        if error or not job.ended:
            yield event("error", error or "the server is shutting down", job.revision)
        reason = {"reason": "canceled"} if job.status == CANCELED else {"reason": "error"} if error else {}
        if job.ended:
            yield event("done", json.dumps(reason), job.revision)

    return event_stream(events())


def cancel(request: Request) -> Response:
    service = service_of(request)
    job = service.owned(request, request.path_params["id"])
    service.jobs.cancel(job.id)
    record = prediction(service, service.base(request), service.owned(request, job.id))
    if not job.ended:
        record["status"] = CANCELED
    return JSONResponse(record)


def index(request: Request) -> Response:
    """The caller's predictions, newest first, PAGE at a time."""
    service, base = service_of(request), service_of(request).base(request)
    cursor = request.query_params.get("cursor")
    try:
        before = None if cursor is None else float(cursor)
    except ValueError:
        before = math.nan
    if before is not None and not math.isfinite(before):
        raise Refused("invalid_cursor", "cursor is invalid; use the URL in next")
    jobs = service.jobs.recent(owner(request), PAGE + 1, before)
    more = f"{base}/v1/predictions?cursor={jobs[PAGE - 1].created!r}" if len(jobs) > PAGE else None
    results = [prediction(service, base, job, whole=False) for job in jobs[:PAGE]]
    page: responses.Predictions = {"previous": None, "next": more, "results": results}
    return JSONResponse(page)


def model_version(model: Model) -> responses.Version:
    return {
        "id": model.version,
        "created_at": when(model.created),
        "cog_version": "0.23.1",
        "openapi_schema": cog_schema.document(),
    }


async def show_model(request: Request) -> Response:
    owner, name = request.path_params["owner"], request.path_params["name"]
    version = request.path_params.get("version")
    record = model_version(model_of(request, version))
    if version is not None:
        return JSONResponse(record)
    about: responses.Model = {
        "owner": owner,
        "name": name,
        "description": "SeeSR super-resolution",
        "visibility": "private",
        "url": f"{service_of(request).base(request)}/",
        "cover_image_url": None,
        "default_example": None,
        "run_count": 0,
        "latest_version": record,
    }
    return JSONResponse(about)


async def versions(request: Request) -> Response:
    results = [model_version(model_of(request, None))]
    record: responses.Versions = {"previous": None, "next": None, "results": results}
    return JSONResponse(record)


async def webhook_secret(request: Request) -> Response:
    secret: responses.WebhookSecret = {"key": whsec(service_of(request).webhook_secret(owner(request)))}
    return JSONResponse(secret)


ROUTES = [
    Route("/v1/predictions", create, methods=["POST"]),
    Route("/v1/predictions", index),
    Route("/v1/predictions/{id}", show),
    Route("/v1/predictions/{id}/stream", stream),
    Route("/v1/predictions/{id}/cancel", cancel, methods=["POST"]),
    Route("/v1/models/{owner}/{name}", show_model),
    Route("/v1/models/{owner}/{name}/predictions", create, methods=["POST"]),
    Route("/v1/models/{owner}/{name}/versions", versions),
    Route("/v1/models/{owner}/{name}/versions/{version}", show_model),
    Route("/v1/deployments/{owner}/{name}/predictions", create, methods=["POST"]),
    *files.ROUTES,
    Route("/v1/webhooks/default/secret", webhook_secret),
]
