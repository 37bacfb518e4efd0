"""Platform adapters for Hugging Face, SageMaker, Vertex AI and RunPod.

Hugging Face's JSON on POST /, SageMaker's /ping and /invocations, Vertex's instances (AIP_ variables name its routes),
RunPod's 204 while the weights load.
"""

from __future__ import annotations

import base64
import os
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seesr.serving import responses
from seesr.serving.api import service_of, store_both, upscale
from seesr.serving.job import DONE, Job
from seesr.serving.refusal import Refused
from seesr.serving.requests import (
    LONGEST_WAIT,
    HuggingFaceRequest,
    Parameters,
    VertexRequest,
    is_json,
    parse,
    read_json,
)
from seesr.serving.service import Service
from seesr.serving.uploads import once
from seesr.settings.parsing import from_data_uri, settings_of


async def run_job(request: Request, image: str, parameters: dict[str, Any]) -> responses.InferenceResult:
    """An image in base64 and its settings -> its result.

    Raises:
        ValueError, Refused: one line.
    """
    service, options = service_of(request), parse(Parameters, parameters, "parameters.")
    settings = settings_of(options.model_extra or {})
    source, mask = image and once(await run_in_threadpool(from_data_uri, image)), options.mask
    if isinstance(mask, str) and mask and ":" not in mask:
        mask = f"data:;base64,{mask}"
    stored, mask = await store_both(request, source, mask)
    await service.check(stored, settings, mask)
    job = await run_in_threadpool(service.submit, request, stored, settings, {}, mask)
    job = await service.wait(job, LONGEST_WAIT, request)
    if job.status != DONE:
        raise Refused("job_failed" if job.error else "unavailable", job.error or "the image was not finished in time")
    return await run_in_threadpool(result_of, service, job)


def result_of(service: Service, job: Job) -> responses.InferenceResult:
    """A job that succeeded, with its file in base64."""
    return {
        "image": base64.b64encode(service.result(job).read_bytes()).decode(),
        "format": job.suffix,
        "seed": job.settings["seed"],
        "metrics": job.metrics,
    }


async def hugging_face(request: Request) -> Response:
    """{"inputs": base64, "parameters": {...}} -> {"image", "format", "seed", "metrics"}; an image body -> a file."""
    if not is_json(request):
        return await upscale(request)
    return await answer_inputs(request, await read_json(request))


async def answer_inputs(request: Request, body: dict[str, Any]) -> Response:
    payload = parse(HuggingFaceRequest, body)
    result = await run_job(request, payload.inputs, payload.parameters)
    return await run_in_threadpool(JSONResponse, result)


async def vertex(request: Request) -> Response:
    """{"instances": [{"image": base64}], "parameters": {...}} -> {"predictions": [...]}, in their order."""
    return await answer_instances(request, await read_json(request))


async def answer_instances(request: Request, body: dict[str, Any]) -> Response:
    payload = parse(VertexRequest, body)
    predictions = [await run_job(request, instance.image, payload.parameters) for instance in payload.instances]
    return await run_in_threadpool(JSONResponse, {"predictions": predictions})


async def invocations(request: Request) -> Response:
    """SageMaker: an image body, or JSON with inputs or instances."""
    if not is_json(request):
        return await upscale(request)
    body = await read_json(request)
    return await (answer_instances if "instances" in body else answer_inputs)(request, body)


def ping(request: Request) -> Response:
    """200 when images can be made, 204 while the weights load, 503 when they never will be."""
    service = service_of(request)
    reason = service.ready()
    if reason is None:
        return Response(status_code=200)
    return Response(status_code=204 if "loading" in reason else 503)


def routes() -> list[Route]:
    """With those that Vertex asks for by its variables."""
    health, predict = os.environ.get("AIP_HEALTH_ROUTE"), os.environ.get("AIP_PREDICT_ROUTE")
    routes = [Route(health, ping)] if health else []
    routes += [Route(predict, vertex, methods=["POST"])] if predict else []
    return [
        *routes,
        Route("/", hugging_face, methods=["POST"]),
        Route("/ping", ping),
        Route("/invocations", invocations, methods=["POST"]),
    ]
