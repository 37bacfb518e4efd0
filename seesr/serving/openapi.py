"""Inputs and routes as data, made from Settings: for the page, and as an OpenAPI document."""

from __future__ import annotations

import dataclasses
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from seesr.images.formats import FORMATS, MEDIA_TYPES
from seesr.images.limits import LARGEST_FILE, LARGEST_OUTPUT
from seesr.serving.job import PRIORITIES
from seesr.serving.requests import LONGEST_WAIT
from seesr.settings import Settings, cog_schema
from seesr.settings.presets import PRESETS
from seesr.settings.view_specs import ALL, VIEWS
from seesr.version import __version__

KINDS = {float: "float", int: "int", str: "text", bool: "switch"}
ROUTES_IN_WORDS = {
    (
        "get",
        "/jobs/{id}",
    ): "A job: status, stage, progress and seconds_left of the whole job, error, metrics, link to the result",
    ("delete", "/jobs/{id}"): "Cancels a job: at once if it waits, at the next tile if it runs",
    ("get", "/jobs/{id}/result"): "The file of a job that is done",
    ("get", "/jobs/{id}/events"): "Server-sent events: progress, then end",
    ("get", "/events"): "Server-sent events of all jobs of the key: job, for each recent job and each change; ready",
    ("post", "/batches"): "Many files (multipart), or a zip: a job each; a bad file fails alone",
    ("get", "/batches/{id}"): "The jobs of a batch",
    ("get", "/batches/{id}/result"): "A zip of the results, with failed.txt",
    ("get", "/live"): "The process answers",
    ("get", "/ready"): "200 when images can be upscaled, else 503 and the reason",
    ("get", "/status"): "Versions, bundle, device, queue",
    ("get", "/metrics"): "For Prometheus",
}


def fields() -> list[dict[str, Any]]:
    """Every setting: name, kind, default, limits, choices, description."""
    found = []
    for field in dataclasses.fields(Settings):
        about = dict(field.metadata)
        about["kind"] = KINDS[about["kind"]]
        if "choices" in about:
            about["choices"] = list(about["choices"])
        found.append({"name": field.name, "default": field.default, **about})
    return found


def limits() -> dict[str, Any]:
    """What a result may have: pixels in all, pixels on a side by format, and images side by side by view."""
    views = {name: view.columns for name, view in VIEWS.items()}
    return {
        "pixels": LARGEST_OUTPUT,
        "longest_side": {name: known.longest_side for name, known in FORMATS.items()},
        "columns": {**views, ALL: max(views.values())},
    }


def openapi() -> dict[str, Any]:
    """The plain API."""
    inputs = cog_schema.inputs()["Input"]["properties"]
    enums = {name: value for name, value in cog_schema.inputs().items() if name != "Input"}
    query = [
        {"name": name, "in": "query", "description": entry["description"], "schema": enums.get(name, entry)}
        for name, entry in inputs.items()
        if name not in ("image", "mask")
    ]
    own = {
        "wait": ("seconds to wait for the result before 202 is answered", {"type": "number", "maximum": LONGEST_WAIT}),
        "priority": ("who comes first", {"type": "string", "enum": list(PRIORITIES)}),
        "answer": ("the file, or {file_key, public_url} of it", {"type": "string", "enum": ["file", "link"]}),
        "deadline": ("longest run, seconds; the time in the queue does not count", {"type": "number"}),
    }
    query += [
        {"name": name, "in": "query", "description": words, "schema": kind} for name, (words, kind) in own.items()
    ]
    binary = {"schema": {"type": "string", "format": "binary"}}
    files = {name: {"type": "string", "format": "binary"} for name in ("image", "mask")}
    form = {"schema": {"type": "object", "properties": files, "required": ["image"]}}
    upscale = {
        "summary": "Upscale an image",
        "parameters": query,
        "requestBody": {"content": {"image/*": binary, "multipart/form-data": form}},
        "responses": {
            "200": {"description": "The result", "content": dict.fromkeys(MEDIA_TYPES.values(), binary)},
            "202": {"description": "Not done yet: the job"},
            "413": {"description": f"More than {LARGEST_FILE} bytes"},
            "422": {"description": "It cannot be made; why, in one line"},
            "429": {"description": "The queue is full, or too many requests; see Retry-After"},
            "503": {"description": "Not now; see Retry-After"},
        },
    }
    paths: dict[str, Any] = {"/upscale": {"post": upscale}}
    for (method, path), words in ROUTES_IN_WORDS.items():
        entry: dict[str, Any] = {"summary": words, "responses": {"200": {"description": words}}}
        if "{id}" in path:
            entry["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths.setdefault(path, {})[method] = entry
    security = {"bearer": {"type": "http", "scheme": "bearer"}}
    info = {"title": "SeeSR super-resolution", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": {"securitySchemes": security}}


async def show_fields(request: Request) -> Response:
    return JSONResponse({"fields": fields(), "presets": PRESETS, "limits": limits()})


async def show_openapi(request: Request) -> Response:
    return JSONResponse(openapi())


ROUTES = [Route("/settings", show_fields), Route("/openapi.json", show_openapi)]
