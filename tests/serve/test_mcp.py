"""`seesr mcp` with the client of the official SDK, over stdio and HTTP, as the documentation configures it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import ANN, BOB, sharp

from lab.serve.servers import EchoServer
from scripts.cog_server import ROOT
from seesr import cli
from seesr.networks import weights

mcp = pytest.importorskip("mcp")

import httpx2  # noqa: E402
from mcp.client.stdio import StdioServerParameters, stdio_client  # noqa: E402
from mcp.client.streamable_http import streamable_http_client  # noqa: E402

ECHO = ["-m", "lab.serve.echo"]
REAL = ["-m", "seesr"]
URI = "data:image/png;base64," + base64.b64encode(sharp()).decode()
QUICK = {"num_inference_steps": 1, "seed": 1}
Talk = Callable[[Any], Awaitable[None]]


def on_stdio(folder: Path, talk: Talk, module: list[str] = ECHO, *arguments: str, **environment: str) -> None:
    """Starts `seesr mcp` in a folder and talks to it; it ends with the conversation."""
    base_environment = {
        "PYTHONPATH": str(ROOT),
        "SEESR_WEIGHTS": str(weights.POCKET),
        "TMPDIR": str(folder),
        **environment,
    }
    command = StdioServerParameters(
        command=sys.executable, args=[*module, "mcp", *arguments], env={**os.environ, **base_environment}, cwd=folder
    )

    async def run() -> None:
        with (folder / "log").open("w") as log:
            async with mcp.Client(stdio_client(command, log)) as client:
                await talk(client)

    asyncio.run(run())
    assert "Traceback" not in (folder / "log").read_text()
    assert not list(folder.glob("seesr-mcp-*")), "its folder is removed"


@contextlib.asynccontextmanager
async def connected(url: str, mode: str = "auto", **headers: str) -> AsyncIterator[Any]:
    """A client of `seesr mcp --http`."""
    async with (
        httpx2.AsyncClient(headers=headers) as http,
        mcp.Client(streamable_http_client(f"{url}/mcp", http_client=http), mode=mode) as client,
    ):
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoServer]:
    """`seesr mcp --http` with two keys, whose engine gives its input back."""
    keys = f"ann:{ANN},bob:{BOB}"
    module = ("lab.serve.echo", "mcp", "--http")
    with EchoServer(tmp_path_factory.mktemp("mcp"), module=module, SEESR_API_KEYS=keys) as running:
        yield running


def image_of(result: Any) -> Image.Image:
    (content,) = [part for part in result.content if part.type == "image"]
    return Image.open(io.BytesIO(base64.b64decode(content.data)))


def test_files_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(sharp())
    (tmp_path / "notes.png").write_text("mine")
    shares: list[float] = []

    async def progress(share: float, total: float | None, message: str | None) -> None:
        shares.append(share)

    async def talk(client: Any) -> None:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"upscale", "quote", "status"}
        assert {"image", "mask", "output", "scale_factor", "deadline"} <= tools["upscale"].input_schema[
            "properties"
        ].keys()
        assert "output" not in tools["quote"].input_schema["properties"]

        done = await client.call_tool("upscale", {"image": "photo.png", **QUICK}, progress_callback=progress)
        assert not done.is_error, done
        assert done.structured_content["path"] == str(tmp_path / "photo-x4.png")
        assert done.structured_content["seed"] == 1 and json.loads(done.content[0].text) == done.structured_content
        assert (tmp_path / "photo-x4.png").read_bytes() == sharp()
        assert shares == sorted(set(shares)) and shares

        to = str(tmp_path / "new/big.webp")
        done = await client.call_tool("upscale", {"image": "photo.png", "mask": URI, "output": to, **QUICK})
        assert done.structured_content["path"] == to and Path(to).exists()
        assert done.structured_content["media_type"] == "image/webp"

        done = await client.call_tool("upscale", {"image": URI, **QUICK})
        assert "path" not in done.structured_content and image_of(done).size == (24, 18)

        quote = await client.call_tool("quote", {"image": "photo.png", "scale_factor": 2})
        assert quote.structured_content["output_size"] and not quote.is_error
        assert (await client.call_tool("status")).structured_content["ready"]

        for values, message in (
            ({"image": "photo.png", "output": "notes.png"}, "notes.png exists and was not written by seesr"),
            ({"image": "photo.png", "output": "a.bmp"}, "its suffix must be one of png"),
            ({"image": "photo.png", "output": "a.png", "output_view": "all"}, "must be one of zip"),
            ({"image": URI, "output_view": "all"}, "name a file in output"),
            ({"image": "absent.png"}, "absent.png"),
            ({"image": "http://example.com/a.png"}, "SEESR_ALLOW_URLS=example.com"),
            ({"image": URI, "scale_factor": 99}, "scale_factor"),
            ({"image": URI, "unknown": 1}, "there is no input 'unknown'"),
            ({}, "image is required"),
        ):
            refused = await client.call_tool("upscale", values)
            assert refused.is_error and message in refused.structured_content["detail"], (values, refused)
        assert (tmp_path / "notes.png").read_text() == "mine"
        assert (await client.call_tool("enlarge")).is_error

    on_stdio(tmp_path, talk, ECHO, ECHO_SECONDS="0.5")


@pytest.mark.long
def test_two_calls_of_the_real_engine_give_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(sharp(16, 12))
    values = {"scale_factor": 2, "latent_tiled_size": 16, **QUICK}

    async def talk(client: Any) -> None:
        done = await client.call_tool("upscale", {"image": "photo.png", **values})
        assert not done.is_error, done
        first = (tmp_path / "photo-x2.png").read_bytes()
        again = await client.call_tool("upscale", {"image": "photo.png", **values})
        assert not again.is_error, "its own file is replaced"
        assert (tmp_path / "photo-x2.png").read_bytes() == first

    on_stdio(tmp_path, talk, REAL, "--device", "cpu")
    with Image.open(tmp_path / "photo-x2.png") as image:
        assert image.size == (32, 24)


@pytest.mark.long
def test_weights_that_cannot_be_loaded_are_an_error_of_the_call(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / weights.MANIFEST).write_text("{}")

    async def talk(client: Any) -> None:
        refused = await client.call_tool("upscale", {"image": URI})
        assert refused.is_error and refused.structured_content["code"] == "not_ready", refused

    base_environment = {"PYTHONPATH": str(ROOT), "SEESR_WEIGHTS": str(broken)}
    command = StdioServerParameters(command=sys.executable, args=[*REAL, "mcp"], env={**os.environ, **base_environment})

    async def run() -> None:
        with (tmp_path / "log").open("w") as log:
            async with mcp.Client(stdio_client(command, log)) as client:
                await talk(client)

    asyncio.run(run())


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_tools_over_http(mode: str, server: EchoServer) -> None:
    async def run() -> None:
        async with connected(server.url, mode, **bearer(ANN)) as client:
            upscale = (await client.list_tools()).tools[0]
            assert "output" not in upscale.input_schema["properties"]
            done = await client.call_tool("upscale", {"image": URI, **QUICK})
            assert not done.is_error and image_of(done).size == (24, 18), done
            assert server.client.get(done.structured_content["url"]).content == sharp()
            job = done.structured_content["job"]
            assert server.ask("GET", f"/jobs/{job}", headers=bearer(ANN)).status_code == 200
            assert server.ask("GET", f"/jobs/{job}", headers=bearer(BOB)).status_code == 404
            assert (await client.call_tool("quote", {"image": URI})).structured_content["tiles"]
            content = {"content": ("a.png", sharp(), "image/png")}
            upload = server.ask("POST", "/v1/files", files=content, headers=bearer(ANN)).json()["urls"]["get"]
            assert image_of(await client.call_tool("upscale", {"image": upload, **QUICK})).size == (24, 18)
            refused = await client.call_tool("upscale", {"image": "/etc/hostname"})
            assert refused.is_error and "data URI" in refused.structured_content["detail"]
            refused = await client.call_tool("upscale", {"image": URI, "output": "a.png"})
            assert refused.is_error and "there is no input 'output'" in refused.structured_content["detail"]

    asyncio.run(run())


LIST = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
CALL = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "a", "version": "1"}},
}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, bearer(ANN)),
        (401, {}),
        (401, bearer("wrong-token-0123456789")),
        (403, {**bearer(ANN), "Origin": "https://elsewhere.example"}),
    ],
    ids=["key", "none", "wrong", "origin"],
)
def test_keys_and_origins_are_those_of_the_server(status: int, headers: dict[str, str], server: EchoServer) -> None:
    response = server.ask("POST", "/mcp", json=CALL, headers={**ACCEPT, **headers})
    assert response.status_code == status, response.text


def test_a_session_belongs_to_its_key(server: EchoServer) -> None:
    answer = server.ask("POST", "/mcp", json=CALL, headers={**ACCEPT, **bearer(ANN)})
    session = {"Mcp-Session-Id": answer.headers["mcp-session-id"]}
    for token, status in ((BOB, 404), (ANN, 200)):
        again = server.ask("POST", "/mcp", json=LIST, headers={**ACCEPT, **bearer(token), **session})
        assert again.status_code == status, again.text


def test_without_keys_only_this_machine_calls(tmp_path: Path) -> None:
    with EchoServer(tmp_path, module=("lab.serve.echo", "mcp", "--http")) as server:
        assert server.ask("POST", "/mcp", json=CALL, headers=ACCEPT).status_code == 200
        foreign = server.ask("POST", "/mcp", json=CALL, headers={**ACCEPT, "Host": "rebound.example"})
        assert foreign.status_code == 421


@pytest.mark.parametrize("mode", ["auto", "legacy"])
def test_a_canceled_call_cancels_its_job(mode: str, tmp_path: Path) -> None:
    module = ("lab.serve.echo", "mcp", "--http")
    with EchoServer(tmp_path, module=module, ECHO_SECONDS="10") as server:

        async def run() -> None:
            async with connected(server.url, mode) as client:
                call = asyncio.ensure_future(client.call_tool("upscale", {"image": URI}))
                while not (running := server.ask("GET", "/status").json()["running"]):
                    await asyncio.sleep(0.05)
                call.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await call
                end = time.monotonic() + 10
                while (job := server.ask("GET", f"/jobs/{running['id']}").json())["status"] != "canceled":
                    assert time.monotonic() < end and job["status"] == "processing", job
                    await asyncio.sleep(0.05)
                assert job["progress"] < 0.5, "it was canceled at the next tile, not at its end"

        asyncio.run(run())


def test_a_connected_assistant_does_not_delay_the_end(tmp_path: Path) -> None:
    with EchoServer(tmp_path, module=("lab.serve.echo", "mcp", "--http")) as server:

        async def run() -> None:
            async with connected(server.url, "legacy") as client:
                await client.list_tools()
                assert await asyncio.to_thread(server.end) == 0

        asyncio.run(run())


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mcp_types", None)
    monkeypatch.delitem(sys.modules, "seesr.serving.mcp_server", raising=False)
    assert cli.main(["mcp"]) == 2
    assert "pip install -e '.[mcp]'" in capsys.readouterr().err


def configurations() -> list[dict[str, Any]]:
    """The server of each JSON block of the page."""
    blocks = re.findall(r"^```json\n(.*?)^```", (ROOT / "docs/mcp.md").read_text(), re.S | re.M)
    return [next(iter(next(iter(json.loads(block).values())).values())) for block in blocks]


@pytest.mark.parametrize("number", range(len(configurations())))
def test_each_configuration_of_the_page_connects(number: int, server: EchoServer, tmp_path: Path) -> None:
    entry = configurations()[number]

    async def talk(client: Any) -> None:
        assert len((await client.list_tools()).tools) == 3

    if "url" in entry:
        assert entry["url"] == "http://127.0.0.1:5000/mcp"
        headers = {name: value.replace("TOKEN", ANN) for name, value in entry["headers"].items()}

        async def run() -> None:
            async with connected(server.url, **headers) as client:
                await talk(client)

        asyncio.run(run())
        return
    assert entry["command"] == "seesr"
    on_stdio(tmp_path, talk, REAL, *entry["args"][1:], **{**entry.get("env", {}), "SEESR_WEIGHTS": str(weights.POCKET)})
