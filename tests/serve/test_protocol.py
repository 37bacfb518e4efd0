"""Open connections: idle ones make room, and headers have a time limit. On fakes of a transport and a clock."""

from __future__ import annotations

import json
import logging
import resource
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from lab.report import ROOT
from seesr.serving import protocol
from seesr.serving.protocol import HEADER_SECONDS, LimitedProtocol, max_connections

BEGUN = b"GET /live HTTP/1.1\r\nHost: a\r\n"


class Transport:
    """Writes down what a connection does."""

    def __init__(self) -> None:
        self.written, self.ended = b"", ""

    def get_extra_info(self, name: str) -> Any:
        return None

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = self.ended or "aborted"

    def is_closing(self) -> bool:
        return bool(self.ended)

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def set_protocol(self, protocol: Any) -> None: ...


class Task:
    def add_done_callback(self, work: Any) -> None: ...


class Loop:
    """Timers of a connection, which a test lets run out; tasks do not run."""

    def __init__(self) -> None:
        self.now, self.timers = 0.0, list[Any]()

    def time(self) -> float:
        self.now += 1
        return self.now

    def call_later(self, seconds: float, work: Any, *values: Any) -> Any:
        timer = SimpleNamespace(seconds=seconds, work=work, canceled=False)
        timer.cancel = lambda: setattr(timer, "canceled", True)
        self.timers.append(timer)
        return timer

    def create_task(self, coroutine: Any, **more: Any) -> Any:
        coroutine.close()
        return Task()

    def headers(self) -> list[Any]:
        """The timers of headers that wait."""
        return [timer for timer in self.timers if timer.work.__name__ == "drop" and not timer.canceled]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(protocol, "max_connections", lambda: 2)
    yield 2


class Connections:
    """A server's connections."""

    def __init__(self) -> None:
        async def app(scope: Any, receive: Any, send: Any) -> None: ...

        self.config = uvicorn.Config(app, http=LimitedProtocol, log_config=None)
        self.config.load()
        self.state, self.loop = ServerState(), Loop()

    def open(self, data: bytes = b"") -> tuple[LimitedProtocol, Transport]:
        connection = LimitedProtocol(self.config, self.state, {}, self.loop)  # type: ignore[arg-type]
        transport = Transport()
        connection.connection_made(transport)
        if data:
            connection.data_received(data)
        return connection, transport


def test_the_oldest_idle_connection_makes_room(limit: int) -> None:
    server = Connections()
    (_, first), (busy, second), (_, third) = server.open(), server.open(BEGUN + b"\r\n"), server.open(BEGUN)
    assert (first.ended, second.ended, third.ended) == ("aborted", "", "")
    assert not busy.idle and busy.cycle
    busy.cycle.response_complete = True
    assert busy.idle


def test_where_none_is_idle_a_new_connection_is_refused(limit: int, caplog: pytest.LogCaptureFixture) -> None:
    server = Connections()
    opened = [server.open(BEGUN + b"\r\n") for _ in range(limit)]
    with caplog.at_level(logging.WARNING):
        _, refused = server.open()
    assert refused.ended == "closed" and [transport.ended for _, transport in opened] == ["", ""]
    head, _, body = refused.written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and f"content-length: {len(body)}".encode() in head
    assert json.loads(body)["code"] == "unavailable" and "all 2 are in use" in caplog.text
    assert not server.loop.headers()


def test_a_header_must_arrive_in_the_documented_time() -> None:
    assert f"A request header must arrive within {HEADER_SECONDS:g} s" in (ROOT / "docs/security.md").read_text()
    server = Connections()
    connection, transport = server.open(BEGUN)
    (timer,) = server.loop.headers()
    assert timer.seconds == HEADER_SECONDS
    connection.data_received(b"X: y\r\n")
    assert server.loop.headers() == [timer], "more of the header does not renew it"
    connection.data_received(b"\r\n")
    assert not server.loop.headers() and connection.header_timer is None
    assert connection.cycle
    connection.cycle.response_complete = True
    connection.data_received(b"G")
    (timer,) = server.loop.headers()  # of the next request
    timer.work()
    assert transport.ended == "aborted" and connection.header_timer is None
    connection.data_received(b"GET")
    assert server.loop.headers() == [timer], "a connection that ends waits for nothing"


def test_a_request_that_is_answered_is_not_dropped() -> None:
    connection, transport = Connections().open(BEGUN + b"\r\n")
    connection.drop()
    assert not transport.ended


def test_a_closed_connection_has_no_timer() -> None:
    server = Connections()
    connection, _ = server.open()
    connection.connection_lost(None)
    assert not server.loop.headers() and connection.header_timer is None


@pytest.mark.parametrize(("files", "connections"), [(1000, 500), (10**6, 2000), (10, 8), (101, 50)])
def test_half_of_the_files_are_for_connections(files: int, connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (files, 10**9))
    assert max_connections() == connections
