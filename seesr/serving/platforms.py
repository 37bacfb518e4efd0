"""What platforms want to hear: each a few lines over `upscale`.

Hugging Face's JSON on POST /, SageMaker's /ping and /invocations, Vertex's instances (AIP_ variables name its routes),
RunPod's 204 while the weights load.
"""

from __future__ import annotations

import base64
import json
import os
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seesr.serving.api import mask_of, service, upscale
from seesr.serving.job import DONE, Job
from seesr.serving.refusal import Refused
from seesr.serving.uploads import once, read_json, store
from seesr.settings.parsing import from_data_uri, settings_of

LONGEST_WAIT = 600.0  # seconds; the platforms have limits of their own


async def made(request: Request, image: Any, parameters: Any) -> tuple[Job, bytes]:
    """A picture in base64 and its settings -> the job and the bytes of its result.

    Raises:
        ValueError, Refused: one line.
    """
    of = service(request)
    if not isinstance(image, str):
        raise ValueError("the image must be base64 or a data URI")
    if not isinstance(parameters, dict):
        raise ValueError("parameters must be an object")
    settings = settings_of(parameters, frozenset({"mask"}))
    stored = await store(once(from_data_uri(image)), of.part(), "image")
    mask = await mask_of(of, stored, parameters.get("mask"))
    await of.check(stored, settings, mask)
    job = await of.wait(of.submit(request, stored, settings, {}, mask), LONGEST_WAIT, request)
    if job.status != DONE:
        raise Refused(422 if job.error else 503, job.error or "the picture was not made in time")
    return job, of.jobs.result(job).read_bytes()


def told(job: Job, data: bytes) -> dict[str, Any]:
    words = base64.b64encode(data).decode()
    return {
        "image": words,
        "format": job.suffix,
        "seed": job.settings["seed"],
        "metrics": job.metrics,
    }


async def hugging_face(request: Request) -> Response:
    """{"inputs": base64, "parameters": {...}} -> {"image", "format", "seed", "metrics"}; an image body -> a file."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        return await upscale(request)
    body = await read_json(request)
    return JSONResponse(told(*await made(request, body.get("inputs"), body.get("parameters") or {})))


async def vertex(request: Request) -> Response:
    """{"instances": [{"image": base64}], "parameters": {...}} -> {"predictions": [...]}, in their order."""
    body = await read_json(request)
    instances = body.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise Refused(422, "instances must be a list of objects with an image")
    parameters = body.get("parameters") or {}
    found = [told(*await made(request, one.get("image"), parameters)) for one in instances]
    return JSONResponse({"predictions": found})


async def invocations(request: Request) -> Response:
    """SageMaker: an image body, or JSON with inputs or instances."""
    if not request.headers.get("content-type", "").lower().startswith("application/json"):
        return await upscale(request)
    body = json.loads(await request.body() or b"{}")  # kept by the request for the one that answers
    return await (vertex if isinstance(body, dict) and "instances" in body else hugging_face)(request)


async def ping(request: Request) -> Response:
    """200 when pictures can be made, 204 while the weights load, 503 when they never will be."""
    of = service(request)
    reason = of.ready()
    if reason is None:
        return Response(status_code=200)
    return Response(status_code=204 if "loading" in reason else 503)


def routes() -> list[Route]:
    """With those that Vertex asks for by its variables."""
    health, predict = os.environ.get("AIP_HEALTH_ROUTE"), os.environ.get("AIP_PREDICT_ROUTE")
    own = [Route(health, ping)] if health else []
    own += [Route(predict, vertex, methods=["POST"])] if predict else []
    return [
        *own,
        Route("/", hugging_face, methods=["POST"]),
        Route("/ping", ping),
        Route("/invocations", invocations, methods=["POST"]),
    ]
