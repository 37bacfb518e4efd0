"""Clients that send slowly, too much, or nothing: the server answers others and shuts down in time."""

from __future__ import annotations

import contextlib
import socket
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from serve.test_background import PNG, serving  # type: ignore[import-not-found]
from serving import sharp
from starlette.routing import Route

from lab.serve.servers import EchoServer
from seesr.serving import middleware
from seesr.serving.refusal import Refused


@pytest.fixture(scope="module")
def few_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoServer]:
    """A server that may open 128 files."""
    with EchoServer(tmp_path_factory.mktemp("few"), files=128) as server:
        yield server


def connect(server: EchoServer, data: bytes = b"") -> socket.socket:
    address = urllib.parse.urlsplit(server.url)
    connection = socket.create_connection((address.hostname, address.port), timeout=10)
    connection.sendall(data)
    return connection


BEGUN = b"POST /upscale HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"


def test_many_incomplete_headers_do_not_block_the_server(few_files: EchoServer) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(200):
            held.enter_context(connect(few_files, BEGUN))
        started = time.monotonic()
        assert few_files.ask("GET", "/live").status_code == 200
        assert time.monotonic() - started < 3
        answer = few_files.ask("POST", "/upscale", params={"num_inference_steps": 1}, content=sharp(), headers=PNG)
        assert answer.status_code == 200 and answer.content == sharp()


@pytest.mark.slow
def test_a_header_has_a_time_limit(few_files: EchoServer) -> None:
    with (
        connect(few_files, BEGUN) as first,
        connect(few_files, b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n") as second,
    ):
        second.recv(10000)
        second.sendall(BEGUN)
        for connection in (first, second):
            connection.settimeout(15)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(1) == b""


def test_an_incomplete_body_does_not_delay_shutdown(tmp_path: Path) -> None:
    with EchoServer(tmp_path) as server, connect(server, BEGUN + b"Content-Length: 99\r\n\r\nx"):
        time.sleep(0.1)
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 5


def test_shutdown_has_a_time_limit(tmp_path: Path) -> None:
    with EchoServer(tmp_path, SEESR_SHUTDOWN="1", ECHO_SECONDS="20") as server:
        job = server.ask("POST", "/upscale", params={"wait": 0}, content=sharp(), headers=PNG).json()
        while server.ask("GET", f"/jobs/{job['id']}").json()["status"] != "processing":
            time.sleep(0.02)
        started = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - started < 8
    with EchoServer(tmp_path, ECHO_SECONDS="0.1") as server:
        while server.ask("GET", f"/jobs/{job['id']}").json()["status"] != "succeeded":
            time.sleep(0.02)


def test_a_slow_body_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes come all the time, but too few."""
    import asyncio

    monkeypatch.setattr(middleware, "BODY_TIMEOUT", 0.3)
    sent = 0

    async def receive() -> dict[str, object]:
        nonlocal sent
        await asyncio.sleep(0.05)
        sent += 1
        return {"type": "http.request", "body": b"x", "more_body": True}

    async def read() -> None:
        gate = middleware.Gate(None, None, 1, lambda: False, middleware.Traffic(CollectorRegistry()))  # type: ignore[arg-type]
        count = gate.counted({"type": "http", "path": "/upscale", "headers": []}, receive)  # type: ignore[arg-type]
        while True:
            await count()

    with pytest.raises(Refused, match="sent too slowly") as error:
        asyncio.run(read())
    assert error.value.status == 408 and 3 < sent < 20


def test_json_and_metadata_are_bounded_on_every_route(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        paths = [
            route.path.replace("{", "").replace("}", "")
            for route in client.app.routes  # type: ignore[attr-defined]
            if isinstance(route, Route) and "POST" in (route.methods or ())
        ]
        assert len(paths) > 5
        body, headers = bytes(17 * 2**20), {"Content-Type": "application/json"}
        for path in paths:
            answer = client.post(path, content=body, headers=headers)
            assert answer.status_code == 413 and "a JSON body may have 16 MiB" in answer.json()["detail"], path
        answer = client.post(
            "/upscale", content=b'{"image":[' + b"[]," * middleware.MAX_VALUES + b"1]}", headers=headers
        )
        assert answer.status_code == 413 and "more than 100000 values" in answer.json()["detail"]
        large = "{" + " " * 2**16 + "}"
        file = {"content": ("a.png", sharp(), "image/png")}
        answer = client.post("/v1/files", files={**file, "metadata": ("m.json", large.encode(), "application/json")})
        assert answer.status_code == 413 and "the limit is 65536" in answer.json()["detail"]
        assert client.post("/v1/files", files=file, data={"metadata": large}).status_code in (400, 413)
        assert client.post("/v1/files", files=file, data={"metadata": "{}"}).status_code == 201
        assert not list((tmp_path / "parts").iterdir())
