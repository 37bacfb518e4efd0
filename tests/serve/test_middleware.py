"""The middleware around all routes: request ids, limits of bodies and rates, what is counted and logged."""

from __future__ import annotations

import asyncio
import http
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from lab.report import ROOT
from seesr.images.limits import LARGEST_FILE
from seesr.serving import middleware
from seesr.serving.job import Late, QueueFull, Unavailable
from seesr.serving.keys import Key
from seesr.serving.middleware import Gate, RateLimits, Traffic, answer, largest_body, respond
from seesr.serving.openapi import OPERATIONS
from seesr.serving.refusal import ERRORS, Refused

SECURITY = (ROOT / "docs/security.md").read_text()
ANN = Key(name="ann", sha256="")


class Server:
    """A gate around one route, called as a web server does.

    Args:
        route: the application.
        admit: gives the key of a request.
    """

    def __init__(self, route: Any, admit: Callable[[Any], Key | None] = lambda scope: ANN, per_minute: int = 9) -> None:
        self.registry = CollectorRegistry()
        access: Any = SimpleNamespace(admit=admit, platform_routes={("GET", "/healthz"), ("POST", "/predict")})
        self.closing = False
        self.gate = Gate(route, access, per_minute, lambda: self.closing, Traffic(self.registry))
        self.messages: list[Any] = []

    def request(
        self, method: str = "GET", path: str = "/x", body: tuple[bytes, ...] = (b"",), **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer."""
        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": pairs, "query_string": b""}
        parts = [{"type": "http.request", "body": part, "more_body": True} for part in body]
        parts[-1]["more_body"] = False
        self.messages = []

        async def receive() -> Any:
            return parts.pop(0) if parts else {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.messages.append(message)

        asyncio.run(self.gate(scope, receive, send))
        start = self.messages[0]
        sent = {name.decode(): value.decode() for name, value in start["headers"]}
        return start["status"], sent, b"".join(message.get("body", b"") for message in self.messages)

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0


async def ok(scope: Any, receive: Any, send: Any) -> None:
    """Reads the body and says how long it was."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    await PlainTextResponse(f"{length} bytes")(scope, receive, send)


def failing(error: BaseException, before: bool = True) -> Any:
    """A route that raises, before or after it has begun its answer."""

    async def route(scope: Any, receive: Any, send: Any) -> None:
        if not before:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    return route


@pytest.mark.parametrize(
    ("id", "kept"), [("a" * 64, True), ("a1B2", True), ("a" * 65, False), ("a b", False), ("é", False), ("", False)]
)
def test_a_request_keeps_its_id_if_it_can_be_written_anywhere(id: str, kept: bool) -> None:
    _, headers, _ = Server(ok).request(x_request_id=id)
    result = headers["x-request-id"]
    assert result == id if kept else re.fullmatch("[0-9a-f]{16}", result)


def test_an_answer_keeps_its_own_headers_and_gets_the_others() -> None:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("x", headers={"Referrer-Policy": "origin"})(scope, receive, send)

    _, headers, _ = Server(route).request()
    assert headers["referrer-policy"] == "origin" and headers["x-content-type-options"] == "nosniff"


def test_other_protocols_pass() -> None:
    seen: list[Any] = []

    async def route(*values: Any) -> None:
        seen.append(values)

    asyncio.run(Server(route).gate({"type": "lifespan"}, "receive", "send"))  # type: ignore[arg-type]
    assert seen == [({"type": "lifespan"}, "receive", "send")]


def test_bodies_and_answers_are_counted_without_probes(caplog: pytest.LogCaptureFixture) -> None:
    server = Server(ok)
    with caplog.at_level(logging.INFO, "seesr.serving"):
        for path in ("/x", "/live", "/healthz"):
            server.request("GET", path, (b"12", b"345"))
        assert server.request("POST", "/predict")[0] == 200
    assert server.count("seesr_http_received_bytes_total") == 15
    assert server.count("seesr_http_sent_bytes_total") == 4 * len(b"5 bytes")
    assert server.count("seesr_http_responses_total", code="200") == 2
    paths = [record.args["path"] for record in caplog.records]  # type: ignore[index, call-overload]
    assert paths == ["/x", "/predict"], "probes are logged with DEBUG only"
    fields: Any = caplog.records[0].args
    assert fields["method"] == "GET" and fields["status"] == 200 and 0 <= fields["seconds"] < 10
    assert fields["seconds"] == round(fields["seconds"], 4) and fields["client"] == ""


@pytest.mark.parametrize(("code", "level"), [(200, "DEBUG"), (204, "DEBUG"), (503, "DEBUG"), (421, "INFO"),
                                             (500, "INFO")])  # fmt: skip
def test_a_probe_is_logged_when_its_answer_is_unusual(code: int, level: str, caplog: pytest.LogCaptureFixture) -> None:
    async def route(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("", code)(scope, receive, send)

    with caplog.at_level(logging.DEBUG, "seesr.serving"):
        Server(route).request(path="/ready")
    assert [record.levelname for record in caplog.records if record.name == "seesr.serving"] == [level]


def test_a_client_that_hangs_up_is_counted_as_499() -> None:
    server = Server(failing(ClientDisconnect(), before=False))
    server.request()
    assert server.count("seesr_http_responses_total", code="499") == 1


def test_an_internal_error_is_logged_and_a_begun_answer_is_not_begun_again(caplog: pytest.LogCaptureFixture) -> None:
    status, headers, body = Server(failing(LookupError("secret"))).request()
    assert status == 500 and json.loads(body)["code"] == "internal_error" and b"secret" not in body
    assert f"request {headers['x-request-id']}" in caplog.text and "LookupError: secret" in caplog.text
    server = Server(failing(LookupError(), before=False))
    assert server.request()[0] == 200 and len(server.messages) == 1
    assert server.count("seesr_http_responses_total", code="200") == 1


def test_files_of_a_request_that_nobody_took_are_removed(tmp_path: Path) -> None:
    part, gone = tmp_path / "part", tmp_path / "gone"

    async def route(scope: Any, receive: Any, send: Any) -> None:
        part.write_bytes(b"x")
        scope["state"]["parts"] = [gone, part]
        raise Refused("not_found", "nothing")

    assert Server(route).request()[0] == 404 and not part.exists()


def test_a_key_without_a_rate_of_its_own_has_that_of_the_server() -> None:
    for key, requests in ((ANN, 3), (ANN.model_copy(update={"rate": 1}), 1), (None, 20)):
        server = Server(ok, lambda scope, key=key: key, per_minute=3)  # type: ignore[misc]
        statuses = [server.request("POST")[0] for _ in range(requests)]
        assert set(statuses) == {200}
        status, headers, _ = server.request("POST")
        assert status == (200 if key is None else 429)
        if key is not None:
            assert headers["retry-after"] == str(60 // requests), "rounded up"
        assert server.request("GET")[0] == 200, "reading has no rate"


def test_a_rate_fills_up_to_its_size_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(middleware.time, "monotonic", lambda: now[0])
    rates = RateLimits(4)
    for pause in (0.0, 1000.0):
        now[0] += pause
        assert [rates.take("ann") for _ in range(4)] == [0.0] * 4 and rates.take("ann") == 15.0
    now[0] += 14.0
    assert rates.take("ann") == pytest.approx(1.0)
    now[0] += 1.0
    assert rates.take("ann") == 0.0 and rates.take("ann", 60) == 1.0


@pytest.mark.parametrize("encoding", ["identity", " Identity ", ""])
def test_a_body_that_is_not_encoded_is_taken(encoding: str) -> None:
    assert Server(ok).request("POST", body=(b"x",), content_encoding=encoding)[0] == 200


def test_a_long_encoding_is_cut_in_the_message() -> None:
    status, headers, body = Server(ok).request("POST", content_encoding="x" * 500)
    assert status == 415 and headers["accept-encoding"] == "identity" and len(json.loads(body)["detail"]) < 150


def test_a_body_may_have_exactly_the_bytes_of_its_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "LARGEST_FORM", 10)
    server = Server(ok)
    for length, status in ((10, 200), (11, 413)):
        assert server.request("POST", body=(bytes(5), bytes(length - 5)))[0] == status
        assert server.request("POST", body=(bytes(length),), content_length=str(length))[0] == status
    assert server.request("POST", body=(b"",), content_length="99")[0] == 413, "before a byte of it comes"
    assert server.request("POST", body=(b"x",), content_length="x")[0] == 200, "the web server refuses that"


def test_the_limits_of_bodies_are_those_of_the_documentation() -> None:
    assert "100 MiB per image, 16 MiB of JSON, 1000 MiB per batch" in SECURITY
    json_limit, message = largest_body("Application/JSON; charset=utf-8", "/upscale")
    assert json_limit == 16 * 1024 * 1024 and "a JSON body may have 16 MiB" in message
    assert largest_body("application/json", "/batches")[0] == json_limit
    assert largest_body("", "/batches")[0] == 1000 * 1024 * 1024
    limit, message = largest_body("multipart/form-data", "/upscale")
    assert f"the limit of this route is {limit} bytes" in message
    assert 2**19 < limit - 2 * LARGEST_FILE < LARGEST_FILE, "an image and a mask, and some text beside them"


def test_the_values_of_json_are_counted_while_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{middleware.MAX_VALUES:,} values" in SECURITY
    monkeypatch.setattr(middleware, "MAX_VALUES", 4)
    server = Server(ok, per_minute=99)
    for text, status in (
        (b"[1,2,3,4]", 200),
        (b"[1,2,3,4,5]", 413),
        (b"[{},{},1", 413),
        (b"{[[[", 200),
        (b"{[[[[", 413),
    ):
        parts = (text[:3], text[3:])
        assert server.request("POST", body=parts, content_type="application/JSON")[0] == status, text
        assert server.request("POST", body=parts, content_type="image/png")[0] == 200


def reading(gate: Gate, receive: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds of a clock, which stands still otherwise, after which a body is refused."""
    now = [0.0]
    monkeypatch.setattr(middleware.time, "monotonic", lambda: now[0])

    async def wait_for(coroutine: Any, timeout: float) -> Any:
        coroutine.close()
        assert 0 <= timeout <= 1, "the end of the server is seen within a second"
        message = receive(now[0])
        if message is None:
            now[0] += timeout or 0.01
            raise TimeoutError
        return message

    monkeypatch.setattr(middleware.asyncio, "wait_for", wait_for)

    async def nothing() -> Any: ...

    async def read() -> None:
        count = gate.counted({"type": "http", "path": "/upscale", "headers": []}, nothing)
        while True:
            await count()

    asyncio.run(read())
    return now[0]


@pytest.mark.parametrize(("sent", "seconds"), [(0, 30), (160 * 1024, 40), (2**20, 50)])
def test_a_silent_or_slow_body_is_refused_after_the_documented_time(
    sent: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 20 seconds so many bytes come at once, and then nothing."""
    left = [sent] if sent else []

    def receive(now: float) -> Any:
        return {"body": bytes(left.pop()), "more_body": True} if left and now >= 20 else None

    assert "at 16 KiB a second after the first 30 s" in SECURITY
    with pytest.raises(Refused, match=r"nothing for 30 s, or less than 16 KiB a second") as error:
        reading(Server(ok).gate, receive, monkeypatch)
    assert error.value.code == "body_too_slow"
    assert middleware.time.monotonic() == pytest.approx(seconds, abs=0.1)


def test_a_body_that_comes_too_slowly_is_refused_although_it_never_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def receive(now: float) -> Any:
        pauses.append(now)
        return None if len(pauses) % 3 else {"body": bytes(10), "more_body": True}

    pauses: list[float] = []
    with pytest.raises(Refused, match="sent too slowly"):
        reading(Server(ok).gate, receive, monkeypatch)
    assert 29 < middleware.time.monotonic() < 33


def test_an_unfinished_body_ends_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(ok)
    server.closing = True
    with pytest.raises(Refused, match="shutting down"):
        reading(server.gate, lambda now: None, monkeypatch)
    assert middleware.time.monotonic() <= 1


def test_after_its_end_the_body_is_not_timed() -> None:
    """A route that waits for the disconnect of its caller may wait for as long as it likes."""
    seen: list[Any] = []

    async def route(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(3):
            seen.append((await receive())["type"])
        await PlainTextResponse("x")(scope, receive, send)

    Server(route).request("POST", body=(b"x",))
    assert seen == ["http.request", "http.disconnect", "http.disconnect"]


def test_every_status_has_its_name() -> None:
    renamed = {413: "Content Too Large", 422: "Unprocessable Content"}  # by RFC 9110
    statuses = {status for operation in OPERATIONS.values() for status in operation.answers}
    for code, error in ERRORS.items():
        body = json.loads(bytes(answer(code, "x").body))
        assert body["title"] == renamed.get(error.status, http.HTTPStatus(error.status).phrase)
    assert {
        status: renamed.get(status, http.HTTPStatus(status).phrase)
        for status in statuses | {error.status for error in ERRORS.values()}
    } == middleware.TITLES


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (QueueFull(3.2), 429, "queue_full", "4"),
        (Late(1.0, 2.0, {"wait": 1}), 409, "deadline_too_short", None),
        (Unavailable("Redis is away"), 503, "unavailable", "5"),
        (Unavailable("loading", "not_ready"), 503, "not_ready", "5"),
        (OSError(28, "No space left on device"), 503, "disk_full", "5"),
        (ValueError("two\nlines"), 422, "invalid_input", None),
        (OSError(2, "no such file"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_errors_of_routes_become_answers(error: Exception, status: int, code: str, retry: str | None) -> None:
    response = respond(error)
    body = json.loads(bytes(response.body))
    assert (response.status_code, body["code"], body["status"]) == (status, code, status)
    assert response.headers.get("retry-after") == retry and "\n" not in body["detail"]
    if code == "deadline_too_short":
        assert body["field"] == "deadline" and body["quote"] == {"wait": 1}
