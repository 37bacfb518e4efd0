"""`seesr mcp`: upscale, quote and status as tools of the Model Context Protocol (MCP), over stdio or HTTP.

A tool sends a request to the HTTP API of the server in this process: its limits, keys and errors apply.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import httpx
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from seesr.config import Configuration
from seesr.engine.rates import user_folder
from seesr.images import write
from seesr.images.formats import FORMATS, ZIP
from seesr.images.record import record_of
from seesr.networks import weights
from seesr.serving import app as serving
from seesr.serving import openapi, requests
from seesr.serving.job import ENDED, WAITING
from seesr.serving.middleware import LARGEST_JSON
from seesr.serving.refusal import Refused
from seesr.settings.parsing import from_data_uri, settings_of
from seesr.version import __version__

try:
    import mcp_types as types
    from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
    from mcp.server.auth.provider import AccessToken
    from mcp.server.context import ServerRequestContext
    from mcp.server.lowlevel import Server
    from mcp.server.stdio import stdio_server
    from mcp.server.streamable_http_manager import StreamableHTTPASGIApp, StreamableHTTPSessionManager
except ImportError as error:
    raise ValueError(f"seesr mcp needs a package: pip install -e '.[mcp]' ({error})") from None

PATH = "/mcp"
POLL = 0.25  # seconds between two looks at a running job
LARGEST_CONTENT = 4 * 2**20  # bytes of a result over HTTP that is also sent inside the answer
URIS = ("data:", "http://", "https://")
UPSCALE = "Upscales an image with SeeSR super-resolution. It can take seconds to minutes; progress is reported."
QUOTE = "Says how long upscaling an image would take, its output size, memory, file size and price. Upscales nothing."
STATUS = "Says whether images can be upscaled now, the length of the queue, the device and the versions."
SOURCES = {
    False: "A data URI, the URL of an upload or an http(s) URL.",
    True: "Path of a file, a data URI or an http(s) URL.",
}
OUTPUT = (
    "Path of the file to write; its suffix is the format. Without it the result of a file is written beside it as "
    "NAME-x4.png, and any other result is returned."
)


class Caller(NamedTuple):
    """Who calls a tool.

    Attributes:
        app: the server in this process.
        base: its address as the caller sees it.
        headers: with the caller's key.
        local: whether it may name files of this machine.
        request: that called over HTTP; None: over stdio.
    """

    app: Starlette
    base: str = "http://localhost"
    headers: dict[str, str] = {}  # noqa: RUF012
    local: bool = False
    request: Request | None = None

    async def send(self, method: str, path: str, **content: Any) -> httpx.Response:
        """The answer of the server.

        Raises:
            Refused: it is an error.
        """
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url=self.base, headers=self.headers) as client:
            response = await client.request(method, path, **content)
        if response.is_error:
            error = response.json()
            raise Refused(error["code"], error["detail"], error["field"])
        return response


Connect = Callable[[ServerRequestContext[Any, Any]], Awaitable[Caller]]
Progress = Callable[[float, float | None, str | None], Awaitable[None]]


def tools(local: bool) -> list[types.Tool]:
    """The tools.

    Args:
        local: whether they take and write files of this machine.
    """
    image = {"type": "string", "description": SOURCES[local]}
    mask = {"type": "string", "description": f"Enhances the white part of the image only. {SOURCES[local]}"}
    options = {**openapi.properties(requests.JobRequest), **openapi.setting_schemas()}
    values = {"image": image, "mask": mask, **options}
    output = {"output": {"type": "string", "description": OUTPUT}} if local else {}
    look = types.ToolAnnotations(read_only_hint=True)
    change = types.ToolAnnotations(destructive_hint=False, open_world_hint=False)

    def tool(name: str, about: str, properties: dict[str, Any], annotations: types.ToolAnnotations) -> types.Tool:
        required = ["image"] if properties else []
        schema = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        return types.Tool(name=name, description=about, input_schema=schema, annotations=annotations)

    return [
        tool("upscale", UPSCALE, {**values, **output}, change),
        tool("quote", QUOTE, values, look),
        tool("status", STATUS, {}, look),
    ]


def make_server(connect: Connect, local: bool) -> Server[Any]:
    """The MCP server.

    Args:
        connect: finds the caller of a request.
        local: see Caller.
    """

    async def list_tools(ctx: ServerRequestContext[Any, Any], params: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools(local))

    async def call_tool(
        ctx: ServerRequestContext[Any, Any], params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        try:
            values = dict(params.arguments or {})
            caller = await connect(ctx)
            if params.name == "upscale":
                return await upscale(caller, values, ctx.session.report_progress)
            if params.name == "quote":
                return result_of((await caller.send("POST", "/quote", **form(caller, values))).json())
            if params.name == "status":
                return result_of((await caller.send("GET", "/status")).json())
            raise ValueError(f"there is no tool {params.name!r}; there are upscale, quote and status")
        except Refused as error:
            about = {"code": error.code, "detail": error.detail, "field": error.field}
        except (ValueError, OSError, RuntimeError) as error:
            about = {"code": "invalid_input", "detail": str(error), "field": getattr(error, "field", None)}
        return result_of(about, is_error=True)

    return Server("seesr", version=__version__, on_list_tools=list_tools, on_call_tool=call_tool)


def result_of(values: dict[str, Any], *content: types.ContentBlock, is_error: bool = False) -> types.CallToolResult:
    """An answer: the values as JSON, and what goes with them."""
    text = types.TextContent(text=json.dumps(values))
    return types.CallToolResult(content=[text, *content], structured_content=values, is_error=is_error)


def form(caller: Caller, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a tool as the body of a request: a form with its files and data URIs, or JSON without any.

    Raises:
        OSError, ValueError: a file cannot be read, or a data URI is wrong.
    """
    fields = {name: value for name, value in values.items() if value is not None}
    files: dict[str, Any] = {}
    for name in ("image", "mask"):
        source = fields.get(name)
        if isinstance(source, str) and source.strip().lower().startswith("data:"):
            files[name] = (name, from_data_uri(fields.pop(name)))
        elif caller.local and is_path(source):
            path = Path(fields.pop(name)).expanduser()
            files[name] = (path.name, path.read_bytes())
    if not files:
        return {"json": fields}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    return {"data": texts, "files": files}


def is_path(source: Any) -> bool:
    return isinstance(source, str) and bool(source) and not source.strip().lower().startswith(URIS)


async def upscale(caller: Caller, values: dict[str, Any], progress: Progress) -> types.CallToolResult:
    """Queues an image, follows its job and returns the result. A canceled call cancels the job.

    Raises:
        Refused, ValueError, OSError, RuntimeError: one line.
    """
    target = target_of(values) if caller.local else None
    job = (await caller.send("POST", "/upscale", params={"wait": 0}, **form(caller, values))).json()
    path = f"/jobs/{job['id']}"
    jobs, share = caller.app.state.service.jobs, -1.0
    try:
        while job["status"] not in ENDED:
            if jobs.closing and job["status"] == WAITING:
                raise Refused("unavailable", "the server is shutting down; send the image again")
            if caller.request is not None and await caller.request.is_disconnected():
                raise Refused("canceled", "the caller has closed the connection")
            if job["progress"] > share:
                share = job["progress"]
                await progress(share, 1.0, job["stage"] or job["status"])
            await asyncio.sleep(POLL)
            job = (await caller.send("GET", path)).json()
    except BaseException:
        with anyio.CancelScope(shield=True):
            await caller.send("DELETE", path)
        raise
    response = await caller.send("GET", f"{path}/result")
    data, kind = response.content, response.headers["content-type"]
    about = {
        "job": job["id"],
        "media_type": kind,
        "bytes": len(data),
        "seed": job["settings"]["seed"],
        "seconds": round(job["completed"] - job["started"], 3),
    }
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(write.save, data, target)
        return result_of({"path": str(target), **about})
    link = {} if caller.local else {"url": job["result"]}
    if not kind.startswith("image/") or (link and len(data) > LARGEST_CONTENT):
        return result_of({**link, **about})
    image = types.ImageContent(data=base64.b64encode(data).decode(), mime_type=kind)
    return result_of({**link, **about}, image)


def target_of(values: dict[str, Any]) -> Path | None:
    """The file to write; takes `output` out of the values, and sets the format that it names. None: no file.

    Raises:
        ValueError: it cannot be written, or was not written by seesr; one line.
    """
    source, output = values.get("image"), values.pop("output", None)
    names = openapi.setting_schemas()
    settings = settings_of({name: value for name, value in values.items() if name in names})
    if output:
        target = Path(output).expanduser().absolute()
        suffix = target.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        expected = [ZIP] if settings.suffix == ZIP else list(FORMATS)
        if suffix not in expected:
            raise ValueError(f"output is {output!r}; its suffix must be one of {', '.join(expected)}")
        if suffix != ZIP:
            values["output_format"] = suffix
    elif is_path(source):
        path = Path(str(source)).expanduser().absolute()
        target = path.with_name(f"{path.stem}-{settings.label}.{settings.suffix}")
    elif settings.suffix == ZIP:
        raise ValueError("output_view all makes a zip: name a file in output")
    else:
        return None
    if target.is_dir():
        raise ValueError(f"{target} is a folder: name a file in output")
    if target.exists() and record_of(target) is None:
        raise ValueError(f"{target} exists and was not written by seesr: choose another output")
    if is_path(source) and target.exists() and target.samefile(Path(str(source)).expanduser()):
        raise ValueError(f"{target} is the image itself: choose another output")
    return target


async def over_http(ctx: ServerRequestContext[Any, Any]) -> Caller:
    """The caller of a request over HTTP, with its key."""
    request = ctx.request
    assert request is not None
    key = request.headers.get("authorization")
    return Caller(request.app, str(request.base_url), {"Authorization": key} if key else {}, request=request)


class Owned:
    """The route of the tools. A session belongs to the owner of the key that began it."""

    def __init__(self, manager: StreamableHTTPSessionManager) -> None:
        self.inner = StreamableHTTPASGIApp(manager)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = AccessToken(token="", client_id=scope["state"]["key"].name, scopes=[])
        await self.inner({**scope, "user": AuthenticatedUser(token)}, receive, send)


def http_parts(sessions: bool) -> serving.Addition:
    """The route of the tools, and what runs as long as the server.

    Hosts, origins and keys are checked by the server's own middleware, as for every route. There is no stream of
    messages outside of a call (GET): it would hold up the end of the server.

    Args:
        sessions: whether a client of an earlier protocol has a session, in which it can cancel a call. Servers that
            share their callers have none.
    """
    server = make_server(over_http, local=False)
    manager = StreamableHTTPSessionManager(server, stateless=not sessions, max_request_body_size=LARGEST_JSON)
    return serving.Addition([Route(PATH, Owned(manager), methods=["POST", "DELETE"])], manager.run)


def run_stdio(configuration: Configuration, bundle: Path | None, device: str | None) -> int:
    """Serves the program that started this one until it closes standard input; returns the exit code.

    Raises:
        WeightsError: there is no bundle.
    """
    path = bundle or configuration.weights or weights.locate()
    with tempfile.TemporaryDirectory(prefix="seesr-mcp-") as folder:
        unset = {"api_keys": SecretStr(""), "keys_file": None, "platform": None, "bundles": ""}
        private = configuration.model_copy(update={"data": Path(folder), **unset})
        load = functools.partial(serving.load_engine, path, device, user_folder())
        app = serving.build(
            private,
            Caller(Starlette()).base,
            path,
            lambda send: serving.local(private, load, path, send),
        )
        asyncio.run(talk(app))
    return 0


async def talk(app: Starlette) -> None:
    """Answers on standard output what comes on standard input."""
    async with contextlib.AsyncExitStack() as stack:
        start = asyncio.Lock()
        started = False

        async def connect(ctx: ServerRequestContext[Any, Any]) -> Caller:
            nonlocal started
            async with start:  # the weights load at the first call
                if not started:
                    await stack.enter_async_context(app.router.lifespan_context(app))
                    started = True
            jobs = app.state.service.jobs
            while not jobs.loaded and jobs.failure is None:
                await asyncio.sleep(POLL)
            if jobs.failure is not None:
                raise Refused("not_ready", jobs.failure)
            return Caller(app, local=True)

        server = make_server(connect, local=True)
        try:
            async with stdio_server() as (read, send):
                await server.run(read, send, server.create_initialization_options())
        finally:
            app.state.stop_by = time.monotonic()
