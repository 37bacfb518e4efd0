"""ASGI middleware: request ids, authentication, rate limits, body limits, and errors as JSON."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seesr.images.limits import LARGEST_FILE
from seesr.serving.access import Access
from seesr.serving.job import Late, QueueFull, Unavailable, storage_failure
from seesr.serving.keys import Key
from seesr.serving.refusal import ERRORS, Refused, shown

LARGEST_BODY = 10 * LARGEST_FILE  # bytes, of a batch; a single image's limit is checked where it is stored
LARGEST_JSON = 16 * 2**20  # bytes: larger images come as a file, not inside of JSON
MAX_VALUES = 100_000  # in a JSON body: each costs the parser far more than its bytes
LARGEST_FORM = 2 * LARGEST_FILE + 2**20  # bytes, of an image, its mask and everything else in one request
BODY_TIMEOUT = 30.0  # seconds that a client may send nothing of a body
MIN_BODY_RATE = 16 * 2**10  # bytes a second that a body must come at, after the first BODY_TIMEOUT seconds
JSON_TOO_LARGE = (
    f"a JSON body may have {LARGEST_JSON // 2**20} MiB; send larger images as a file upload or an image body"
)
PROBES = {"/live", "/ready", "/health", "/ping", "/metrics"}
DEFAULT_HEADERS = {  # default headers of every response
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
TITLES = {
    200: "OK", 201: "Created", 202: "Accepted", 204: "No Content",
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
    408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 415: "Unsupported Media Type",
    421: "Misdirected Request", 422: "Unprocessable Content", 429: "Too Many Requests", 500: "Internal Server Error",
    501: "Not Implemented",
    503: "Service Unavailable",
}  # fmt: skip
log = logging.getLogger("seesr.serving")


def answer(
    code: str, detail: str, headers: dict[str, str] | None = None, field: str | None = None, **more: Any
) -> JSONResponse:
    """The response of an error: Replicate's members, its code, the field or setting to change, and `more`."""
    status, _, _, setting = ERRORS[code]
    body = {"code": code, "title": TITLES[status], "detail": detail, "status": status}
    return JSONResponse({**body, "field": field, "setting": setting, **more}, status, headers)


class RateLimits:
    """A bucket of requests per key that fills at a constant rate."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.buckets: dict[str, tuple[float, float]] = {}  # owner -> (requests left, when)

    def take(self, owner: str, per_minute: int | None = None) -> float:
        """Takes one request; seconds to wait if there is none.

        Args:
            per_minute: the owner's own rate; None: that of all.
        """
        rate = per_minute or self.per_minute
        left, then = self.buckets.get(owner, (float(rate), time.monotonic()))
        now = time.monotonic()
        left = min(rate, left + (now - then) * rate / 60)
        if left < 1:
            self.buckets[owner] = left, now
            return (1 - left) * 60 / rate
        self.buckets[owner] = left - 1, now
        return 0.0


class Traffic:
    """What the middleware counts: bytes of bodies, and responses of all requests except probes.

    Args:
        registry: gets the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.received = Counter("seesr_http_received_bytes", "Bytes of request bodies", registry=registry)
        self.sent = Counter("seesr_http_sent_bytes", "Bytes of response bodies", registry=registry)
        description = "Responses by status, without probes; 499: the client disconnected"
        self.responses = Counter("seesr_http_responses", description, ["code"], registry=registry)


class Gate:
    """The middleware around all routes.

    Args:
        access: decides who may call which route.
        per_minute: requests that one key may start.
        closing: whether the server is shutting down; it then rejects request bodies.
        traffic: counts the requests.
    """

    def __init__(
        self, app: ASGIApp, access: Access, per_minute: int, closing: Callable[[], bool], traffic: Traffic
    ) -> None:
        self.app, self.access, self.rates, self.closing = app, access, RateLimits(per_minute), closing
        self.traffic = traffic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not (request_id.isascii() and request_id.isalnum() and len(request_id) <= 64):
            request_id = secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id  # servers need not set it
        started, status = time.perf_counter(), 500
        started_response = False

        async def send_with_headers(message: Message) -> None:
            nonlocal status, started_response
            if message["type"] == "http.response.start":
                status, started_response = message["status"], True
                headers = MutableHeaders(raw=[*message["headers"]])
                headers["X-Request-Id"] = request_id
                for name, value in DEFAULT_HEADERS.items():
                    headers.setdefault(name, value)
                message["headers"] = headers.raw
            self.traffic.sent.inc(len(message.get("body", b"")))
            await send(message)

        try:
            self.admit(scope)
            await self.app(scope, self.counted(scope, receive), send_with_headers)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            response = respond(error)
            if response.status_code == 500:
                log.exception("request %s", request_id)
            if not started_response:
                await response(scope, receive, send_with_headers)
        finally:
            for path in scope["state"].get("parts", ()):
                path.unlink(missing_ok=True)
            fields = {"request": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            fields["client"] = (scope.get("client") or ("",))[0]
            probe = self.is_probe(scope)
            if not probe:
                self.traffic.responses.labels(str(status)).inc()
            fields["seconds"] = round(time.perf_counter() - started, 4)
            log.log(logging.DEBUG if probe and status in (200, 204, 503) else logging.INFO, "%s", fields)

    def is_probe(self, scope: Scope) -> bool:
        """Whether a platform or monitoring asks this all the time."""
        path = scope["path"]
        return path in PROBES or (scope["method"] == "GET" and ("GET", path) in self.access.platform_routes)

    def admit(self, scope: Scope) -> None:
        """Authenticates the request and applies the rate limit.

        Raises:
            Refused: it may not pass, has an encoded body, or its key has sent too many.
        """
        scope["state"]["key"] = key = self.access.admit(scope)
        encoding = Headers(scope=scope).get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            detail = f"Content-Encoding {shown(encoding)!r} is not supported; send the body as it is"
            raise Refused("unsupported_media_type", detail, **{"Accept-Encoding": "identity"})
        if scope["method"] == "POST" and key is not None:
            wait = self.rates.take(key.name, key.rate)
            if wait:
                raise Refused("rate_limited", "too many requests with this key", **{"Retry-After": str(int(wait) + 1)})

    def counted(self, scope: Scope, receive: Receive) -> Receive:
        """The body of any route, refused while it comes once it is too large or too slow."""
        headers = Headers(scope=scope)
        limit, fields = largest_body(headers.get("content-type", ""), scope["path"])
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            raise Refused("too_large", f"the body has {length} bytes: {fields}")
        is_json = headers.get("content-type", "").lower().startswith("application/json")
        received, values, finished, started = 0, 0, False, time.monotonic()

        async def count() -> Message:
            nonlocal received, values, finished
            if finished:
                return await receive()  # the disconnect, whenever it comes
            latest = min(time.monotonic() + BODY_TIMEOUT, started + BODY_TIMEOUT + received / MIN_BODY_RATE)
            while True:
                try:
                    message = await asyncio.wait_for(receive(), max(0.0, min(1.0, latest - time.monotonic())))
                    break
                except TimeoutError:
                    if self.closing():
                        raise Refused("unavailable", "the server is shutting down") from None
                    if time.monotonic() >= latest:
                        limits = (
                            f"nothing for {BODY_TIMEOUT:.0f} s, or less than {MIN_BODY_RATE / 2**10:.0f} KiB a second"
                        )
                        raise Refused("body_too_slow", f"the body is sent too slowly ({limits})") from None
            body = message.get("body", b"")
            received += len(body)
            self.traffic.received.inc(len(body))
            if is_json:
                values += body.count(b",") + body.count(b"[") + body.count(b"{")
                if values > MAX_VALUES:
                    raise Refused(
                        "too_large",
                        f"the JSON body has more than {MAX_VALUES} values; send the image as a file upload",
                    )
            finished = not message.get("more_body", False)
            if received > limit:
                raise Refused("too_large", fields)
            return message

        return count


def largest_body(content_type: str, path: str) -> tuple[int, str]:
    """Bytes that the body of a request may have, and what to say of a larger one."""
    if content_type.lower().startswith("application/json"):
        return LARGEST_JSON, JSON_TOO_LARGE
    limit = LARGEST_BODY if path == "/batches" else LARGEST_FORM
    return limit, f"the limit of this route is {limit} bytes"


def respond(error: Exception) -> Response:
    """An exception of a route as an answer."""
    if isinstance(error, Refused):
        return answer(error.code, error.detail, error.headers, error.field)
    if isinstance(error, QueueFull):
        return answer(error.code, str(error), {"Retry-After": str(int(error.seconds) + 1)})
    if isinstance(error, Late):
        return answer(error.code, str(error), field="deadline", quote=error.quote)
    error = storage_failure(error) or error
    if isinstance(error, Unavailable):
        return answer(error.code, str(error), {"Retry-After": "5"})
    if isinstance(error, ValueError):
        return answer("invalid_input", " ".join(str(error).split()), field=getattr(error, "field", None))
    return answer("internal_error", "internal error; see the server's log")


Route = Callable[[Request], Awaitable[Response]]


def owner(request: Request) -> str:
    """Name of the key that asks."""
    return key_of(request).name


def key_of(request: Request) -> Key:
    """The key that asks."""
    return request.scope["state"]["key"]
