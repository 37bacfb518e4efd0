"""The HTML pages: the web page for people who upscale images, and the API documentation at /docs."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Route

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; frame-ancestors 'none'"
ASSETS = {  # file -> media type
    "page.css": "text/css", "page.js": "text/javascript", "blend.js": "text/javascript",
    "editor.js": "text/javascript", "texts.json": "application/json", "docs.css": "text/css",
    "sample.webp": "image/webp",
}  # fmt: skip


async def page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})


async def asset(request: Request) -> Response:
    name = request.url.path.removeprefix("/")
    return FileResponse(PAGE / name, headers={"Content-Security-Policy": POLICY}, media_type=ASSETS[name])


def documentation(document: dict[str, Any]) -> Response:
    """An OpenAPI document as a page without scripts."""
    parts = [f"<p>{html.escape(document['info']['description'])}</p>"]
    for tag in (entry["name"] for entry in document["tags"]):
        parts.append(f"<h2>{html.escape(tag)}</h2>")
        for path, methods in document["paths"].items():
            parts += [operation(path, name, about) for name, about in methods.items() if tag in about["tags"]]
    parts.append("<h2>Schemas</h2>")
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<details id="{name}"><summary><code>{name}</code></summary>{code(schema)}</details>')
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    body = f'<h1>{title}</h1><p><a href="openapi.json">openapi.json</a></p>{"".join(parts)}'
    whole = f'<!doctype html><html lang="en"><head>{head}<link rel="stylesheet" href="docs.css"></head><body><main>'
    return HTMLResponse(f"{whole}{body}</main></body></html>", headers={"Content-Security-Policy": POLICY})


def content_kinds(answer: dict[str, Any]) -> str:
    """The types of a response's bodies."""
    return ", ".join(sorted({kind(media["schema"]) for media in answer.get("content", {}).values()}))


def operation(path: str, method: str, about: dict[str, Any]) -> str:
    """One operation: parameters, request and responses, folded."""
    rows = [
        (entry["name"], entry["in"], kind(entry["schema"]), entry.get("description", ""))
        for entry in about.get("parameters", ())
    ]
    parts = [table(("parameter", "in", "type", "meaning"), rows)] if rows else []
    request = about.get("requestBody", {}).get("content", {})
    if request:
        parts.append(table(("request", "schema"), [(name, kind(media["schema"])) for name, media in request.items()]))
        parts += [code(media["example"]) for media in request.values() if "example" in media]
    rows = [(status, answer["description"], content_kinds(answer)) for status, answer in about["responses"].items()]
    parts.append(table(("status", "meaning", "schema"), rows))
    line = f"<code><b>{method.upper()}</b> {html.escape(path)}</code> {html.escape(about['summary'])}"
    return f'<details id="{about["operationId"]}"><summary>{line}</summary>{"".join(parts)}</details>'


def kind(schema: dict[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(kind(option) for option in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    span = f", {schema['minimum']:g} to {schema['maximum']:g}" if "minimum" in schema and "maximum" in schema else ""
    types = schema.get("format") or schema.get("type", "any")
    return (" or ".join(types) if isinstance(types, list) else str(types)) + span


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    names = "".join(f"<th>{name}</th>" for name in head)
    lines = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><tr>{names}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def code(value: Any) -> str:
    return f"<pre>{html.escape(json.dumps(value, indent=1))}</pre>"


SMALL = [Middleware(GZipMiddleware)]
ROUTES = [
    Route("/", page, middleware=SMALL),
    *(Route(f"/{name}", asset, middleware=SMALL) for name in ASSETS),
]
