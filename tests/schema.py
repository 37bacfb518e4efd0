"""Reads predict.py as Cog does (statically) and builds the OpenAPI schema that Cog would. For tests and for

python tests/schema.py        which writes .cog/openapi_schema.json
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / ".cog/openapi_schema.json"
TYPES = {"float": "number", "int": "integer", "str": "string", "bool": "boolean"}
LIMITS = {"ge": "minimum", "le": "maximum", "min_length": "minLength", "max_length": "maxLength", "regex": "pattern"}


def run_function() -> ast.FunctionDef:
    tree = ast.parse((ROOT / "predict.py").read_text())
    predictor = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Predictor")
    return next(n for n in predictor.body if isinstance(n, ast.FunctionDef) and n.name == "run")


def inputs() -> dict[str, tuple[str, dict[str, Any]]]:
    """name -> (annotation, keyword literals of Input). Raises ValueError where a value is no literal."""
    arguments = run_function().args
    found = {}
    for argument, default in zip(arguments.args[1:], arguments.defaults, strict=True):
        assert isinstance(default, ast.Call) and not default.args
        keywords = {k.arg or "": ast.literal_eval(k.value) for k in default.keywords}
        assert argument.annotation is not None
        found[argument.arg] = (ast.unparse(argument.annotation), keywords)
    return found


def input_schema() -> dict[str, Any]:
    properties: dict[str, Any] = {}
    enums: dict[str, Any] = {}
    required = []
    for order, (name, (annotation, given)) in enumerate(inputs().items()):
        kind = annotation.removeprefix("Optional[").removesuffix("]")
        title = name.replace("_", " ").title()
        entry: dict[str, Any] = {"x-order": order}
        if "choices" in given:
            enums[name] = {
                "title": name,
                "description": "An enumeration.",
                "type": TYPES[kind],
                "enum": given["choices"],
            }
            entry["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        elif kind == "Path":
            entry |= {"type": "string", "format": "uri", "title": title}
        else:
            entry |= {"type": TYPES[kind], "title": title}
        if "description" in given:
            entry["description"] = given["description"]
        if "accept" in given:
            entry["x-cog-accept"] = given["accept"]
        entry |= {LIMITS[key]: value for key, value in given.items() if key in LIMITS}
        if annotation.startswith("Optional"):
            entry["nullable"] = True
        if "default" in given:
            entry["default"] = given["default"]
        else:
            required.append(name)
        properties[name] = entry
    return {"Input": {"title": "Input", "type": "object", "properties": properties, "required": required}, **enums}


def build() -> dict[str, Any]:
    """The whole document, in the shape of `cog build`."""
    text = {"type": "string"}
    time = {"type": "string", "format": "date-time"}
    ref = "#/components/schemas/"
    common = {
        "id": {"title": "Id", **text},
        "created_at": {"title": "Created At", **time},
        "input": {"$ref": f"{ref}Input"},
    }
    request = {
        **common,
        "context": {"title": "Context", "type": "object", "additionalProperties": text, "nullable": True},
        "webhook": {"title": "Webhook", "type": "string", "format": "uri", "minLength": 1, "maxLength": 65536},
        "webhook_events_filter": {
            "type": "array",
            "items": {"type": "string", "enum": ["start", "output", "logs", "completed"]},
        },
    }
    response = {
        **common,
        "output": {"$ref": f"{ref}Output"},
        "status": {"$ref": f"{ref}Status"},
        "error": {"title": "Error", **text},
        "logs": {"title": "Logs", "default": "", **text},
        "metrics": {"title": "Metrics", "type": "object", "additionalProperties": True},
        "started_at": {"title": "Started At", **time},
        "completed_at": {"title": "Completed At", **time},
        "version": {"title": "Version", **text},
    }
    statuses = ["starting", "processing", "succeeded", "canceled", "failed"]
    place = {"title": "Location", "type": "array", "items": {"anyOf": [text, {"type": "integer"}]}}
    fault = {"loc": place, "msg": {"title": "Message", **text}, "type": {"title": "Error Type", **text}}
    faults = {"detail": {"title": "Detail", "type": "array", "items": {"$ref": f"{ref}ValidationError"}}}
    schemas = {
        **input_schema(),
        "Output": {"title": "Output", "type": "string", "format": "uri"},
        "PredictionRequest": {"title": "PredictionRequest", "type": "object", "properties": request},
        "PredictionResponse": {"title": "PredictionResponse", "type": "object", "properties": response},
        "Status": {"title": "Status", "description": "An enumeration.", "type": "string", "enum": statuses},
        "HTTPValidationError": {"title": "HTTPValidationError", "type": "object", "properties": faults},
        "ValidationError": {"title": "ValidationError", "type": "object", "properties": fault, "required": list(fault)},
    }

    def body(name: str) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": {"$ref": f"{ref}{name}"}}}}

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
    SCHEMA.parent.mkdir(exist_ok=True)
    SCHEMA.write_text(json.dumps(build(), indent=1) + "\n")
