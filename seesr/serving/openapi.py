"""The OpenAPI document of the HTTP API, made from the routes, the request and response types and Settings.

python -m lab.docs      writes docs/openapi.json
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from seesr.images.formats import FORMATS, MEDIA_TYPES
from seesr.images.limits import LARGEST_OUTPUT
from seesr.serving import api, batches, files, health, pages, platforms, replicate, requests, responses
from seesr.serving.access import OPEN
from seesr.serving.middleware import TITLES
from seesr.serving.refusal import ERRORS
from seesr.settings import Settings
from seesr.settings.presets import PRESETS
from seesr.settings.view_specs import ALL, VIEWS
from seesr.version import __version__

KINDS = {float: "float", int: "int", str: "text", bool: "switch"}
TYPES = {float: "number", int: "integer", str: "string", bool: "boolean"}
LIMITS = {"ge": "minimum", "le": "maximum", "max_length": "maxLength"}
REF = "#/components/schemas/"
JSON, FORM, EVENTS, TEXT, HTML = (
    "application/json",
    "multipart/form-data",
    "text/event-stream",
    "text/plain",
    "text/html",
)
FILE = {"type": "string", "format": "binary"}
STRING = {"type": "string"}
DATA_URI = "data:image/png;base64,iVBORw0KGgo="
ABOUT = """Upscales images. `POST /upscale` is the short way; the routes below `/v1` are Replicate's API.

Send `Authorization: Bearer TOKEN`. A server without keys answers this machine alone and needs no token.
Every error has the form of `Error`; `code` is stable. Every response has the header `X-Request-Id`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """What the document says of one handler.

    Attributes:
        tag: the group it is listed in.
        summary: one sentence.
        answers: of each successful status the content types, with a type, a schema, or None for an empty body.
        body: content types of the request, with a type or a schema.
        example: of a JSON request.
        query: query parameters, schemas by name.
        headers: request headers, schemas by name.
        errors: codes beside those that every route has.
    """

    tag: str
    summary: str
    answers: Mapping[int, Mapping[str, Any]]
    body: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    example: Any = None
    query: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    errors: tuple[str, ...] = ()


def ref(kind: Any) -> dict[str, Any]:
    """A schema, or the reference to the one of a type."""
    return kind if isinstance(kind, dict) else {"$ref": REF + kind.__name__}


def setting_schemas() -> dict[str, Any]:
    """The schema of every setting."""
    results = {}
    for field in dataclasses.fields(Settings):
        about = field.metadata
        entry: dict[str, Any] = {"type": TYPES[about["kind"]]}
        if field.default is None:
            entry["type"] = [entry["type"], "null"]
        if "choices" in about:
            entry["enum"] = list(about["choices"])
        entry |= {LIMITS[key]: value for key, value in about.items() if key in LIMITS}
        results[field.name] = {**entry, "description": about["description"], "default": field.default}
    return results


def form(model: type[requests.JobRequest], many: bool = False) -> dict[str, Any]:
    """The schema of a form: files, options and settings."""
    options = {name: entry for name, entry in properties(model).items() if name not in ("image", "mask")}
    image = {"type": "array", "items": FILE} if many else FILE
    names = {"image": image} if many else {"image": image, "mask": FILE}
    return {"type": "object", "properties": {**names, **options, **setting_schemas()}, "required": ["image"]}


def properties(model: type[requests.JobRequest]) -> dict[str, Any]:
    """The named fields of a request model."""
    return {
        name: entry
        for name, entry in model.model_json_schema(ref_template=REF + "{model}")["properties"].items()
        if model.model_fields[name].annotation is not Any or name in ("image", "mask")
    }


def options(model: type[requests.JobRequest]) -> dict[str, Any]:
    """Query parameters: the options and settings of a job."""
    return {name: entry for name, entry in form(model)["properties"].items() if name not in ("image", "mask")}


INFERENCE = ("invalid_input", "job_failed", "queue_full", "url_not_allowed")
IDEMPOTENCY = {"Idempotency-Key": {**STRING, "description": "A repeated request with this key returns the first job."}}
SUBMIT = (*INFERENCE, "quota_exceeded", "priority_not_allowed", "idempotency_reused", "idempotency_expired")
IMAGE_FILES = dict.fromkeys((*MEDIA_TYPES.values(),), FILE)
PREFER = {"Prefer": {**STRING, "description": "wait, or wait=SECONDS (60 at most)."}}
PREDICT = {
    "version": "you/seesr",
    "input": {"image": DATA_URI, "scale_factor": 4, "seed": 1},
    "webhook_events_filter": ["completed"],
}
HUGGING_FACE_EXAMPLE = {"inputs": "iVBORw0KGgo=", "parameters": {"scale_factor": 4, "seed": 1}}
VERTEX = {"instances": [{"image": "iVBORw0KGgo="}], "parameters": {"seed": 1}}


async def show_fields(request: Request) -> Response:
    return JSONResponse(description())


async def show_openapi(request: Request) -> Response:
    return JSONResponse(document(operations_of(request.app.routes)))


async def show_docs(request: Request) -> Response:
    return pages.documentation(document(operations_of(request.app.routes)))


OPERATIONS: dict[Callable[..., Any], Operation] = {
    api.upscale: Operation(
        tag="Images", summary="Upscales one image; 202 with the job if it takes longer than `wait` seconds.",
        answers={200: {**IMAGE_FILES, JSON: responses.ResultLink}, 202: {JSON: responses.Job}},
        body={"image/*": FILE, "application/octet-stream": FILE, FORM: form(requests.UpscaleRequest),
              JSON: requests.UpscaleRequest},
        example={"image": DATA_URI, "scale_factor": 4, "seed": 1}, query=options(requests.UpscaleRequest),
        headers=IDEMPOTENCY,
        errors=(*SUBMIT, "canceled", "not_found", "expired", "deadline_too_short"),
    ),
    api.quote: Operation(
        tag="Images", summary="Quotes time, size, memory and price of one image from its header; queues nothing.",
        answers={200: {JSON: responses.Quote}},
        body={"image/*": FILE, "application/octet-stream": FILE, FORM: form(requests.UpscaleRequest),
              JSON: requests.UpscaleRequest},
        example={"image": DATA_URI, "scale_factor": 4, "deadline": 30}, query=options(requests.UpscaleRequest),
        errors=("invalid_input", "url_not_allowed", "not_found", "expired", "not_ready", "no_quotes"),
    ),
    api.show: Operation(tag="Images", summary="Reads a job.", answers={200: {JSON: responses.Job}}),
    api.delete: Operation(
        tag="Images", summary="Cancels a job: at once if it waits, at the next tile if it runs.",
        answers={202: {JSON: responses.Job}},
    ),
    api.result: Operation(
        tag="Images", summary="Downloads the file of a job that succeeded.", answers={200: IMAGE_FILES},
        errors=("not_finished", "canceled", "job_failed", "expired"),
    ),
    api.events: Operation(
        tag="Images", summary="Streams a job: events `progress` and `end`, each with the job as JSON.",
        answers={200: {EVENTS: STRING}},
        query={"cancel_on_close": {"type": "boolean", "description": "Cancel the job when this stream is closed."}},
    ),
    api.all_events: Operation(
        tag="Images", summary="Streams all jobs of the key: `job` for each recent job and each change, `ready` once.",
        answers={200: {EVENTS: STRING}},
    ),
    batches.create_batch: Operation(
        tag="Batches", summary="Queues many files, or a zip, as one job each; a file that cannot be used fails alone.",
        answers={202: {JSON: responses.NewBatch}},
        body={FORM: form(requests.BatchRequest, many=True), "application/zip": FILE},
        query=options(requests.BatchRequest), headers=IDEMPOTENCY, errors=SUBMIT,
    ),
    batches.show_batch: Operation(tag="Batches", summary="Reads a batch.", answers={200: {JSON: responses.Batch}}),
    batches.batch_result: Operation(
        tag="Batches", summary="Downloads a zip of the results; failed.txt names what failed.",
        answers={200: {"application/zip": FILE}}, errors=("not_finished",),
    ),
    replicate.create: Operation(
        tag="Replicate", summary="Creates a prediction.", answers={201: {JSON: responses.Prediction}},
        body={JSON: requests.PredictionRequest}, example=PREDICT, headers={**IDEMPOTENCY, **PREFER},
        errors=(*SUBMIT, "not_found", "version_not_found", "expired"),
    ),
    replicate.index: Operation(
        tag="Replicate", summary="Lists the predictions of the key, newest first.",
        answers={200: {JSON: responses.Predictions}},
        query={"cursor": {**STRING, "description": "From `next` of the page before."}}, errors=("invalid_cursor",),
    ),
    replicate.show: Operation(
        tag="Replicate", summary="Reads a prediction.", answers={200: {JSON: responses.Prediction}}
    ),
    replicate.stream: Operation(
        tag="Replicate", summary="Streams a prediction: `logs`, `output`, `error`, `done`; the link is `urls.stream`.",
        answers={200: {EVENTS: STRING}}, query={"expires": STRING, "signature": STRING}, errors=("expired",),
    ),
    replicate.cancel: Operation(
        tag="Replicate", summary="Cancels a prediction.", answers={200: {JSON: responses.Prediction}}
    ),
    replicate.show_model: Operation(
        tag="Replicate", summary="Reads the model, or its version.",
        answers={200: {JSON: {"anyOf": [ref(responses.Model), ref(responses.Version)]}}}, errors=("version_not_found",),
    ),
    replicate.versions: Operation(
        tag="Replicate", summary="Lists the versions of the model, of which there is one.",
        answers={200: {JSON: responses.Versions}},
    ),
    replicate.webhook_secret: Operation(
        tag="Replicate", summary="Reads the secret that webhooks of this key are signed with.",
        answers={200: {JSON: responses.WebhookSecret}},
    ),
    files.create_file: Operation(
        tag="Files", summary="Uploads a file; its URL can be the image of a prediction.",
        answers={201: {JSON: responses.File}},
        body={FORM: {"type": "object", "required": ["content"], "properties": {
            "content": FILE, "metadata": {"type": "string", "description": "A JSON object, at most 64 KiB."}}}},
        errors=("invalid_input",),
    ),
    files.list_files: Operation(
        tag="Files", summary="Lists the uploads of the key, newest first.", answers={200: {JSON: responses.Files}}
    ),
    files.show_file: Operation(tag="Files", summary="Describes an upload.", answers={200: {JSON: responses.File}}),
    files.delete_file: Operation(tag="Files", summary="Removes an upload.", answers={204: {}}),
    files.download_file: Operation(
        tag="Files", summary="Downloads an upload.", answers={200: {"application/octet-stream": FILE}},
        errors=("expired",),
    ),
    files.output: Operation(
        tag="Files", summary="Downloads a result by its signed link.", answers={200: IMAGE_FILES},
        query={"expires": STRING, "signature": STRING}, errors=("expired",),
    ),
    platforms.hugging_face: Operation(
        tag="Platforms", summary="Hugging Face: base64 in, base64 out; or an image body in, a file out.",
        answers={200: {JSON: responses.InferenceResult, **IMAGE_FILES}, 202: {JSON: responses.Job}},
        body={JSON: requests.HuggingFaceRequest, "image/*": FILE}, example=HUGGING_FACE_EXAMPLE,
        errors=(*SUBMIT, "canceled", "expired"),
    ),
    platforms.invocations: Operation(
        tag="Platforms", summary="SageMaker: an image body, or the JSON of Hugging Face or Vertex AI.",
        answers={200: {JSON: {"anyOf": [ref(responses.InferenceResult), ref(responses.InferenceResults)]},
                       **IMAGE_FILES}, 202: {JSON: responses.Job}},
        body={JSON: {"anyOf": [ref(requests.HuggingFaceRequest), ref(requests.VertexRequest)]}, "image/*": FILE},
        example=HUGGING_FACE_EXAMPLE, errors=(*SUBMIT, "canceled", "expired"),
    ),
    platforms.vertex: Operation(
        tag="Platforms", summary="Vertex AI: instances in, predictions out.",
        answers={200: {JSON: responses.InferenceResults}}, body={JSON: requests.VertexRequest}, example=VERTEX,
        errors=(*SUBMIT, "expired"),
    ),
    platforms.ping: Operation(
        tag="Health", summary="SageMaker and RunPod: 200 ready, 204 while the weights load, 503 on failure.",
        answers={200: {}, 204: {}}, errors=("not_ready",),
    ),
    health.live: Operation(tag="Health", summary="Answers while the process runs.", answers={200: {TEXT: STRING}}),
    health.ready: Operation(
        tag="Health", summary="200 when images can be upscaled, else 503 and why.", answers={200: {TEXT: STRING}},
        errors=("not_ready",),
    ),
    health.status: Operation(
        tag="Health", summary="Queue, device, bundle and version.", answers={200: {JSON: {"type": "object"}}}
    ),
    health.usage: Operation(
        tag="Health", summary="Limits and use of the key that asks, by UTC day.", answers={200: {JSON: responses.Usage}}
    ),
    health.metrics: Operation(tag="Health", summary="Prometheus metrics.", answers={200: {TEXT: STRING}}),
    show_fields: Operation(
        tag="Description", summary="Settings, presets and limits.", answers={200: {JSON: responses.Description}}
    ),
    show_openapi: Operation(
        tag="Description", summary="The OpenAPI document of this server.", answers={200: {JSON: {"type": "object"}}}
    ),
    show_docs: Operation(tag="Description", summary="The OpenAPI document as a page.", answers={200: {HTML: STRING}}),
    pages.page: Operation(tag="Page", summary="The web page.", answers={200: {HTML: STRING}}),
    pages.asset: Operation(
        tag="Page", summary="A file of the web page.",
        answers={200: {**dict.fromkeys(pages.ASSETS.values(), STRING), JSON: {"type": "object"}}},
    ),
}  # fmt: skip
PATH = {"id": "Id of the job, batch or file.", "owner": "Any owner, or that of a model of SEESR_BUNDLES.",
        "name": "seesr or the name of a model of SEESR_BUNDLES; or the file name of a result.",
        "version": "Id of the version."}  # fmt: skip


def operations_of(routes: Iterable[BaseRoute]) -> tuple[tuple[str, str, Callable[..., Any]], ...]:
    """(method, path, handler) of every route, without HEAD."""
    return tuple(
        (method, route.path, route.endpoint)
        for route in routes
        if isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"})
    )


def errors_of(method: str, path: str, operation: Operation) -> list[str]:
    """The codes that an operation can answer with, in the order of ERRORS."""
    codes = {"wrong_host", "internal_error", "unavailable", "disk_full", *operation.errors}
    if (method, path) not in OPEN:
        codes.add("unauthorized")
    if "{" in path:
        codes.add("not_found")
    if method != "GET":
        codes |= {"forbidden_origin", "unsupported_media_type"}
    if method == "POST":
        codes |= {"rate_limited", "too_large", "body_too_slow", "invalid_body"}
    return [code for code in ERRORS if code in codes]


def error_answers(codes: Iterable[str]) -> dict[str, Any]:
    """The responses of these codes by status."""
    results: dict[str, Any] = {}
    for code in codes:
        status, meaning = ERRORS[code][:2]
        entry = results.setdefault(str(status), {"description": "", "content": {JSON: {
            "schema": ref(responses.Error), "examples": {}}}})  # fmt: skip
        entry["description"] = f"{entry['description']} `{code}`: {meaning}".strip()
        entry["content"][JSON]["examples"][code] = {"$ref": f"#/components/examples/{code}"}
        if status in (429, 503):
            entry["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    return results


def error_examples() -> dict[str, Any]:
    """One example of each code."""
    results = {}
    for code, (status, meaning, remedy, setting) in ERRORS.items():
        example = {"code": code, "title": TITLES[status], "detail": f"{meaning} {remedy}", "status": status}
        results[code] = {"value": {**example, "field": None, "setting": setting}}
    return results


def content(types: Mapping[str, Any], example: Any = None) -> dict[str, Any]:
    """Media types with their schemas."""
    results: dict[str, Any] = {name: {"schema": ref(kind)} for name, kind in types.items()}
    if example is not None and JSON in results:
        results[JSON]["example"] = example
    return results


def described(method: str, path: str, operation: Operation) -> dict[str, Any]:
    """One operation of the document."""
    parameters = [
        {"name": name, "in": "path", "required": True, "description": PATH[name], "schema": STRING}
        for name in re.findall(r"{(\w+)}", path)
    ]
    for place, schemas in (("query", operation.query), ("header", operation.headers)):
        for name, schema in schemas.items():
            described = {"description": schema["description"]} if "description" in schema else {}
            parameters.append({"name": name, "in": place, **described, "schema": schema})
    answers = {
        str(status): {"description": TITLES[status], **({"content": content(types)} if types else {})}
        for status, types in operation.answers.items()
    }
    results: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path}").rstrip("_"),
        "responses": {**answers, **error_answers(errors_of(method, path, operation))},
    }
    if parameters:
        results["parameters"] = parameters
    if operation.body:
        results["requestBody"] = {"required": True, "content": content(operation.body, operation.example)}
    if (method, path) in OPEN:
        results["security"] = []
    return results


def schemas() -> dict[str, Any]:
    """The schemas of the request and response types."""
    kinds = [kind for kind in vars(responses).values() if getattr(kind, "__total__", None) is not None]
    kinds += [requests.UpscaleRequest, requests.PredictionRequest, requests.HuggingFaceRequest, requests.VertexRequest]
    adapters = [(kind.__name__, "validation", TypeAdapter(kind)) for kind in kinds]
    result = TypeAdapter.json_schemas(adapters, ref_template=REF + "{model}")[1]["$defs"]  # type: ignore[arg-type]
    uri = requests.URI
    image = {"image": uri, "mask": {**uri, "type": ["string", "null"]}}
    result["Input"] = {"type": "object", "properties": {**image, **setting_schemas()}, "required": ["image"]}
    result["Parameters"] = {"type": "object", "properties": {"mask": STRING, **setting_schemas()}}
    result["PredictionRequest"]["properties"]["input"] = {"$ref": f"{REF}Input"}
    for name in ("HuggingFaceRequest", "VertexRequest"):
        result[name]["properties"]["parameters"] = {"$ref": f"{REF}Parameters"}
    result["UpscaleRequest"] |= {
        "properties": {**properties(requests.UpscaleRequest), **setting_schemas()}, "required": ["image"],
        "additionalProperties": False,
    }  # fmt: skip
    result["Error"]["properties"]["code"]["enum"] = list(ERRORS)
    return dict(sorted(result.items()))


@functools.lru_cache
def document(operations: tuple[tuple[str, str, Callable[..., Any]], ...]) -> dict[str, Any]:
    """The whole document.

    Args:
        operations: of operations_of.

    Raises:
        KeyError: a handler is missing in OPERATIONS.
    """
    paths: dict[str, Any] = {}
    for method, path, handler in operations:
        paths.setdefault(path, {})[method.lower()] = described(method, path, OPERATIONS[handler])
    tags = dict.fromkeys(operation.tag for operation in OPERATIONS.values())
    security = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "SeeSR super-resolution", "version": __version__, "description": ABOUT},
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}],
        "tags": [{"name": tag} for tag in tags],
        "paths": paths,
        "components": {"schemas": schemas(), "examples": error_examples(), "securitySchemes": security},
    }


def fields() -> list[dict[str, Any]]:
    """Every setting: name, kind, default, limits, choices, description."""
    results = []
    for field in dataclasses.fields(Settings):
        about = dict(field.metadata)
        about["kind"] = KINDS[about["kind"]]
        if "choices" in about:
            about["choices"] = list(about["choices"])
        results.append({"name": field.name, "default": field.default, **about})
    return results


def limits() -> dict[str, Any]:
    """What a result may have: pixels in all, pixels on a side by format, and images side by side by view."""
    views = {name: view.columns for name, view in VIEWS.items()}
    return {
        "pixels": LARGEST_OUTPUT,
        "longest_side": {name: known.longest_side for name, known in FORMATS.items()},
        "columns": {**views, ALL: max(views.values())},
    }


def description() -> responses.Description:
    """What `/settings` answers."""
    return {"fields": fields(), "presets": PRESETS, "limits": limits()}


ROUTES = [
    Route("/settings", show_fields),
    Route("/openapi.json", show_openapi),
    Route("/docs", show_docs),
]
