"""What every request passes: a request id, a key, a rate, a limit for its body, and errors of one line of JSON."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seesr.images.limits import LARGEST_FILE
from seesr.serving.job import Away, Full, storage_failure

OPEN = {"/", "/live", "/ready", "/health", "/ping", "/settings", "/openapi.json", "/page.css", "/page.js"}  # no key
LARGEST_BODY = 10 * LARGEST_FILE  # bytes, of a batch; a single picture's limit is checked where it is stored
SILENCE = 30.0  # seconds that a client may say nothing while it sends a body
TITLES = {
    400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    409: "Conflict", 413: "Content Too Large", 415: "Unsupported Media Type", 422: "Unprocessable Content",
    429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip
log = logging.getLogger("seesr.serving")


class Refused(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.headers = status, " ".join(detail.split()), headers


def answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as Replicate words it."""
    return JSONResponse({"title": TITLES.get(status, "Error"), "detail": detail, "status": status}, status, headers)


def read_keys(words: str) -> dict[str, str]:
    """ "name:token,name:token" -> {token: name}; a token without a name is named by its number.

    Raises:
        ValueError: a token is shorter than 16 characters; it could be guessed.
    """
    keys: dict[str, str] = {}
    for number, part in enumerate(filter(None, (part.strip() for part in words.split(","))), 1):
        name, _, token = part.rpartition(":")
        if len(token) < 16:
            raise ValueError(f"key {number} of SEESR_API_KEYS is shorter than 16 characters")
        keys[token] = name or f"key{number}"
    return keys


class Rates:
    """A bucket of requests per key that fills at a constant rate."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self.buckets: dict[str, tuple[float, float]] = {}  # owner -> (requests left, when)

    def take(self, owner: str) -> float:
        """Takes one request; seconds to wait if there is none."""
        left, then = self.buckets.get(owner, (float(self.per_minute), time.monotonic()))
        now = time.monotonic()
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        if left < 1:
            self.buckets[owner] = left, now
            return (1 - left) * 60 / self.per_minute
        self.buckets[owner] = left - 1, now
        return 0.0


class Gate:
    """The middleware around all routes.

    Args:
        keys: {token: owner}; empty: everybody is "local".
        per_minute: requests that one key may start.
    """

    def __init__(self, app: ASGIApp, keys: dict[str, str], per_minute: int) -> None:
        self.app, self.keys, self.rates = app, keys, Rates(per_minute)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not (request_id.isascii() and request_id.isalnum() and len(request_id) <= 64):
            request_id = secrets.token_hex(8)
        scope["state"]["request_id"] = request_id
        started, status = time.perf_counter(), 500
        begun = False

        async def tell(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self.admit(scope)
            await self.app(scope, self.counted(scope, receive), tell)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            response = respond(error)
            if response.status_code == 500:
                log.exception("request %s", request_id)
            if not begun:
                await response(scope, receive, tell)
        finally:
            words = {"request": request_id, "method": scope["method"], "path": scope["path"], "status": status}
            level = logging.DEBUG if scope["path"] in OPEN and status < 400 else logging.INFO  # probes ask all the time
            log.log(level, "%s", {**words, "seconds": round(time.perf_counter() - started, 4)})

    def admit(self, scope: Scope) -> None:
        """Finds out whose key it is.

        Raises:
            Refused: no key, a wrong one, or too many requests.
        """
        scope["state"]["owner"] = owner = self.owner(Headers(scope=scope).get("authorization", ""))
        if scope["path"] in OPEN or (scope["path"].startswith("/v1/outputs/") and scope["method"] in ("GET", "HEAD")):
            return
        if owner is None:
            raise Refused(401, "You did not pass a valid authentication token", **{"WWW-Authenticate": "Bearer"})
        if scope["method"] == "POST":
            wait = self.rates.take(owner)
            if wait:
                raise Refused(429, "too many requests with this key", **{"Retry-After": str(int(wait) + 1)})

    def owner(self, header: str) -> str | None:
        if not self.keys:
            return "local"
        kind, _, given = header.partition(" ")
        owner = None
        for token, name in self.keys.items():  # all of them, so that the time does not tell which
            if hmac.compare_digest(token.encode(), given.strip().encode()) and kind.lower() in ("bearer", "token"):
                owner = name
        return owner

    def counted(self, scope: Scope, receive: Receive) -> Receive:
        """The body, refused while it comes once it is too large or its sender falls silent."""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length) > LARGEST_BODY:
            raise Refused(413, f"the body has {length} bytes; the limit is {LARGEST_BODY}")
        received, finished = 0, False

        async def count() -> Message:
            nonlocal received, finished
            if finished:
                return await receive()  # the disconnect, whenever it comes
            try:
                message = await asyncio.wait_for(receive(), SILENCE)
            except TimeoutError:
                raise Refused(408, f"nothing of the body came for {SILENCE:.0f} s") from None
            received += len(message.get("body", b""))
            finished = not message.get("more_body", False)
            if received > LARGEST_BODY:
                raise Refused(413, f"the body is larger than {LARGEST_BODY} bytes")
            return message

        return count


def respond(error: Exception) -> Response:
    """An exception of a route as an answer."""
    if isinstance(error, Refused):
        return answer(error.status, error.detail, error.headers)
    if isinstance(error, Full):
        return answer(429, str(error), {"Retry-After": str(int(error.seconds) + 1)})
    error = storage_failure(error) or error
    if isinstance(error, Away):
        return answer(503, str(error), {"Retry-After": "5"})
    if isinstance(error, ValueError):
        return answer(422, " ".join(str(error).split()))
    return answer(500, "an internal error; the log has more")


Route = Callable[[Request], Awaitable[Response]]


def owner(request: Request) -> str:
    """Name of the key that asks."""
    return request.scope["state"]["owner"]


def whole(value: Any, name: str, least: float, most: float) -> float:
    """A number of a query.

    Raises:
        ValueError: it is none, or outside its range.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {value!r}; it must be a number") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {value}; it must be from {least:g} to {most:g}")
    return number
