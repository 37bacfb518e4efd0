"""The OpenAPI schema of a prediction, in the shape of Cog and Replicate, made from Settings.

python -m seesr.settings.cog_schema      writes .cog/openapi_schema.json
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from seesr.settings import Settings

FILE = Path(__file__).resolve().parents[2] / ".cog/openapi_schema.json"
IMAGE = (
    "JPEG, PNG, WebP, AVIF, TIFF, HEIC or JPEG XL image to upscale, at most 67.1 megapixels, "
    "32768 pixels per side and 100 MiB."
)
MASK = (
    "Where the model may change the image: white is enhanced, black stays the bicubic upscale, grey blends. "
    "An image of any size with the same aspect ratio."
)
TYPES = {float: "number", int: "integer", str: "string", bool: "boolean"}
LIMITS = {"ge": "minimum", "le": "maximum", "max_length": "maxLength"}
TEXT = {"type": "string"}
TIME = {"type": "string", "format": "date-time"}
REF = "#/components/schemas/"


def title(name: str) -> str:
    return name.replace("_", " ").title()


def inputs() -> dict[str, Any]:
    """The schemas of the input and of its enumerations."""
    uri = {"type": "string", "format": "uri", "title": "Image", "description": IMAGE}
    properties: dict[str, Any] = {"image": {"x-order": 0, **uri, "x-cog-accept": "image/*"}}
    mask = {**uri, "title": "Mask", "description": MASK, "x-cog-accept": "image/*", "nullable": True, "default": None}
    properties["mask"] = {"x-order": 1, **mask}
    enums: dict[str, Any] = {}
    for order, field in enumerate(dataclasses.fields(Settings), 2):
        about, name = field.metadata, field.name
        kind = {"type": TYPES[about["kind"]]}
        entry: dict[str, Any] = {"x-order": order}
        if "choices" in about:
            enums[name] = {"title": name, **kind, "description": "An enumeration.", "enum": list(about["choices"])}
            entry["allOf"] = [{"$ref": f"{REF}{name}"}]
        else:
            entry |= {**kind, "title": title(name)}
        entry["description"] = about["description"]
        entry |= {LIMITS[key]: value for key, value in about.items() if key in LIMITS}
        entry |= {"nullable": True} if field.default is None else {}
        entry["default"] = field.default
        properties[name] = entry
    return {"Input": {"title": "Input", "type": "object", "properties": properties, "required": ["image"]}, **enums}


def document() -> dict[str, Any]:
    """The whole document, as `cog build` writes it."""
    common = {
        "id": {"title": "Id", **TEXT},
        "created_at": {"title": "Created At", **TIME},
        "input": {"$ref": f"{REF}Input"},
    }
    events = {"type": "string", "enum": ["start", "output", "logs", "completed"]}
    request = {
        **common,
        "context": {"title": "Context", "type": "object", "additionalProperties": TEXT, "nullable": True},
        "webhook": {"title": "Webhook", "type": "string", "format": "uri", "minLength": 1, "maxLength": 65536},
        "webhook_events_filter": {"type": "array", "items": events},
    }
    response = {
        **common,
        "output": {"$ref": f"{REF}Output"},
        "status": {"$ref": f"{REF}Status"},
        "error": {"title": "Error", **TEXT},
        "logs": {"title": "Logs", "default": "", **TEXT},
        "metrics": {"title": "Metrics", "type": "object", "additionalProperties": True},
        "started_at": {"title": "Started At", **TIME},
        "completed_at": {"title": "Completed At", **TIME},
        "version": {"title": "Version", **TEXT},
    }
    statuses = ["starting", "processing", "succeeded", "canceled", "failed"]
    place = {"title": "Location", "type": "array", "items": {"anyOf": [TEXT, {"type": "integer"}]}}
    fault = {"loc": place, "msg": {"title": "Message", **TEXT}, "type": {"title": "Error Type", **TEXT}}
    faults = {"detail": {"title": "Detail", "type": "array", "items": {"$ref": f"{REF}ValidationError"}}}
    schemas = {
        **inputs(),
        "Output": {"title": "Output", "type": "string", "format": "uri"},
        "PredictionRequest": {"title": "PredictionRequest", "type": "object", "properties": request},
        "PredictionResponse": {"title": "PredictionResponse", "type": "object", "properties": response},
        "Status": {"title": "Status", "description": "An enumeration.", "type": "string", "enum": statuses},
        "HTTPValidationError": {"title": "HTTPValidationError", "type": "object", "properties": faults},
        "ValidationError": {"title": "ValidationError", "type": "object", "properties": fault, "required": list(fault)},
    }

    def body(name: str) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"{REF}{name}"}}}}

    answers = {
        "200": {"description": "Successful Response", **body("PredictionResponse")},
        "422": {"description": "Validation Error", **body("HTTPValidationError")},
    }
    predict = {
        "summary": "Predict",
        "operationId": "predict_predictions_post",
        "requestBody": body("PredictionRequest"),
        "responses": answers,
    }
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": {"/predictions": {"post": predict}},
        "components": {"schemas": dict(sorted(schemas.items()))},
    }


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(document(), indent=1) + "\n")
