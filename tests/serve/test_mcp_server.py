"""The tools of `seesr mcp` without a client: what they send to the server, what they return and what they refuse."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import sharp

from lab.report import ROOT

pytest.importorskip("mcp")

from seesr.serving import mcp_server
from seesr.serving.mcp_server import LARGEST_CONTENT, Caller, form, is_path, target_of, tools
from seesr.serving.refusal import Refused

IMAGE = sharp()
URI = "data:image/png;base64," + base64.b64encode(IMAGE).decode()


class Server:
    """A caller whose server answers with a job in these states, and then with a result."""

    def __init__(
        self, *states: dict[str, Any], local: bool = False, data: bytes = b"png", kind: str = "image/png"
    ) -> None:
        self.states, self.local, self.data, self.kind = list(states), local, data, kind
        self.sent: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.request: Any = None
        self.app: Any = SimpleNamespace(
            state=SimpleNamespace(service=SimpleNamespace(jobs=SimpleNamespace(closing=False)))
        )

    async def send(self, method: str, path: str, **content: Any) -> Any:
        self.sent.append((method, path))
        self.bodies.append(content)
        if path.endswith("/result"):
            return SimpleNamespace(content=self.data, headers={"content-type": self.kind})
        base = {"id": "a", "status": "succeeded", "progress": 1.0, "stage": "", "settings": {"seed": 7},
                "started": 10.0, "completed": 12.34567, "result": "http://here/link"}  # fmt: skip
        state = self.states.pop(0)
        return SimpleNamespace(json=lambda: {**base, **state})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert 0 < mcp_server.POLL <= 1
    monkeypatch.setattr(mcp_server, "POLL", 0.001)
    yield


def upscaled(server: Server, **values: Any) -> tuple[Any, list[tuple[float, float | None, str | None]]]:
    """The result of the tool, and the progress that it reports."""
    reports: list[tuple[float, float | None, str | None]] = []

    async def progress(share: float, total: float | None, message: str | None) -> None:
        reports.append((share, total, message))

    return asyncio.run(mcp_server.upscale(server, {"image": URI, **values}, progress)), reports  # type: ignore[arg-type]


def state(status: str, progress: float = 0.0, stage: str = "") -> dict[str, Any]:
    return {"status": status, "progress": progress, "stage": stage}


def test_a_job_is_followed_and_progress_only_grows() -> None:
    server = Server(state("starting"), state("processing", 0.2, "denoise"), state("processing", 0.2, "denoise"),
                    state("processing", 0.1, "denoise"), state("processing", 0.9, "decode"), {})  # fmt: skip
    result, reports = upscaled(server)
    assert reports == [(0.0, 1.0, "starting"), (0.2, 1.0, "denoise"), (0.9, 1.0, "decode")]
    assert server.sent == [("POST", "/upscale"), *[("GET", "/jobs/a")] * 5, ("GET", "/jobs/a/result")]
    assert server.bodies[0]["params"] == {"wait": 0} and server.bodies[0]["files"]["image"] == ("image", IMAGE)
    about = {"job": "a", "media_type": "image/png", "bytes": 3, "seed": 7, "seconds": 2.346}
    assert result.structured_content == {"url": "http://here/link", **about}
    text, image = result.content
    assert json.loads(text.text) == result.structured_content
    assert (base64.b64decode(image.data), image.mime_type) == (b"png", "image/png")


@pytest.mark.parametrize(
    ("local", "size", "kind", "embedded"),
    [
        (False, LARGEST_CONTENT, "image/png", True), (False, LARGEST_CONTENT + 1, "image/png", False),
        (True, LARGEST_CONTENT + 1, "image/png", True), (False, 5, "application/zip", False),
        (True, 5, "application/zip", False),
    ],
)  # fmt: skip
def test_which_results_are_sent_inside_of_the_answer(local: bool, size: int, kind: str, embedded: bool) -> None:
    """A large one over HTTP only as a link; one that is no image never."""
    result, _ = upscaled(Server({}, local=local, data=bytes(size), kind=kind))
    assert len(result.content) == (2 if embedded else 1) and result.structured_content["bytes"] == size
    assert ("url" in result.structured_content) is not local
    assert f"A result of at most {LARGEST_CONTENT / 2**20:g} MiB is also returned" in (ROOT / "docs/mcp.md").read_text()


def test_a_result_is_written_to_a_file(tmp_path: Path) -> None:
    target = tmp_path / "new" / "b.webp"
    server = Server({}, local=True, data=b"result")
    result, _ = upscaled(server, output=str(target))
    assert target.read_bytes() == b"result" and result.structured_content["path"] == str(target)
    assert len(result.content) == 1 and server.bodies[0]["data"]["output_format"] == "webp"
    assert "output" not in server.bodies[0]["data"]
    target.unlink()
    (tmp_path / "a.png").write_bytes(IMAGE)
    server = Server({}, local=True)
    result, _ = upscaled(server, image=str(tmp_path / "a.png"), scale_factor=2)
    assert result.structured_content["path"] == str(tmp_path / "a-x2.png")
    assert server.bodies[0]["files"]["image"] == ("a.png", IMAGE) and server.bodies[0]["data"] == {"scale_factor": "2"}


def test_a_call_that_ends_cancels_its_job() -> None:
    server = Server(state("starting"), {})
    server.app.state.service.jobs.closing = True
    with pytest.raises(Refused, match="shutting down") as error:
        upscaled(server)
    assert error.value.code == "unavailable" and server.sent[-1] == ("DELETE", "/jobs/a")
    server = Server(state("processing"), {})
    server.app.state.service.jobs.closing = True
    assert upscaled(server)[0].structured_content["job"] == "a", "the running job is waited for"

    async def gone() -> bool:
        return True

    server = Server(state("processing"), {})
    server.request = SimpleNamespace(is_disconnected=gone)
    with pytest.raises(Refused, match="has closed the connection") as error:
        upscaled(server)
    assert error.value.code == "canceled" and server.sent[-1] == ("DELETE", "/jobs/a")


@pytest.mark.parametrize(
    ("source", "path"),
    [("a.png", True), ("/x/a.png", True), ("", False), (None, False), (5, False), (" DATA:,x", False),
     ("HTTPS://a.test/", False), ("http://a.test/", False)],
)  # fmt: skip
def test_what_counts_as_a_path(source: Any, path: bool) -> None:
    assert is_path(source) is path


def test_files_are_read_for_callers_on_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGE)
    values = {
        "image": str(tmp_path / "a.png"),
        "mask": URI,
        "seed": 3,
        "use_kds": True,
        "user_prompt": "x",
        "wait": None,
    }
    app: Any = None
    own = form(Caller(app, local=True), dict(values))
    assert own == {"data": {"seed": "3", "use_kds": "true", "user_prompt": "x"},
                   "files": {"image": ("a.png", IMAGE), "mask": ("mask", IMAGE)}}  # fmt: skip
    other = form(Caller(app), dict(values))
    assert other["data"]["image"] == values["image"] and set(other["files"]) == {"mask"}
    assert form(Caller(app), {"image": "http://a.test/", "seed": 3, "mask": None}) == {
        "json": {"image": "http://a.test/", "seed": 3}
    }
    with pytest.raises(FileNotFoundError):
        form(Caller(app, local=True), {"image": str(tmp_path / "absent.png")})


def test_the_file_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(IMAGE)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "mine.png").write_bytes(b"mine")
    values = {"image": "a.png", "output": "B.JPEG"}
    assert target_of(values) == tmp_path / "B.JPEG" and values == {"image": "a.png", "output_format": "jpg"}
    values = {"image": URI, "output": "all.zip", "output_view": "all"}
    assert target_of(values) == tmp_path / "all.zip" and "output_format" not in values
    assert target_of({"image": "a.png", "output_view": "all"}) == tmp_path / "a-x4.zip"
    assert target_of({"image": "a.png", "output_format": "webp", "scale_factor": 2}) == tmp_path / "a-x2.webp"
    for image in (URI, None):
        assert target_of({"image": image}) is None
    monkeypatch.setattr(mcp_server, "record_of", lambda path: None if path.name == "mine.png" else {})
    for given, message in (
        ({"image": "a.png", "output": "b.bmp"}, r"output is 'b\.bmp'; its suffix must be one of png"),
        ({"image": "a.png", "output": "b.png", "output_view": "all"}, "its suffix must be one of zip"),
        ({"image": URI, "output_view": "all"}, "makes a zip: name a file in output"),
        ({"image": URI, "output": "folder.png"}, "is a folder: name a file"),
        ({"image": "a.png", "output": "mine.png"}, "exists and was not written by seesr"),
        ({"image": "a.png", "output": "a.png"}, "is the image itself"),
    ):
        with pytest.raises(ValueError, match=message):
            target_of(dict(given))
    assert target_of({"image": URI, "output": "a.png"}) == tmp_path / "a.png", "its own result is replaced"


@pytest.mark.parametrize("local", [True, False])
def test_the_tools_say_what_they_take(local: bool) -> None:
    known = {tool.name: tool for tool in tools(local)}
    assert list(known) == ["upscale", "quote", "status"]
    upscale, quote = (known[name].input_schema for name in ("upscale", "quote"))
    assert upscale["required"] == quote["required"] == ["image"] and known["status"].input_schema["required"] == []
    assert ("output" in upscale["properties"]) is local and "output" not in quote["properties"]
    assert upscale["additionalProperties"] is False and {"mask", "priority", "seed"} < set(quote["properties"])
    for name in ("image", "mask"):
        assert ("Path of a file" in upscale["properties"][name]["description"]) is local
    for name, reads in (("upscale", None), ("quote", True), ("status", True)):
        assert known[name].annotations.read_only_hint is reads  # type: ignore[union-attr]
    hints: Any = known["upscale"].annotations
    assert hints.destructive_hint is False and hints.open_world_hint is False


def called(name: str, arguments: Any, server: Any) -> Any:
    """The answer of a call, through the handler that is registered for it."""
    handlers: dict[str, Any] = {}

    class Recorder:
        def __init__(self, name: str, version: str, on_list_tools: Any, on_call_tool: Any) -> None:
            handlers.update(call=on_call_tool, list=on_list_tools)

    async def connect(ctx: Any) -> Any:
        return server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mcp_server, "Server", Recorder)
        mcp_server.make_server(connect, local=False)
    context: Any = SimpleNamespace(session=SimpleNamespace(report_progress=None))
    return asyncio.run(handlers["call"](context, SimpleNamespace(name=name, arguments=arguments)))


def test_errors_of_a_call_are_answers() -> None:
    class Failing(Server):
        async def send(self, method: str, path: str, **content: Any) -> Any:
            raise self.error

        error: Exception = Refused("queue_full", "the queue is full", "x")

    server = Failing()
    answer = called("quote", {"image": "http://a.test/"}, server)
    assert answer.is_error and answer.structured_content == {
        "code": "queue_full",
        "detail": "the queue is full",
        "field": "x",
    }
    for error in (ValueError("wrong"), OSError("wrong"), RuntimeError("wrong")):
        server.error = error
        answer = called("status", None, server)
        assert answer.is_error and answer.structured_content["code"] == "invalid_input"
        assert answer.structured_content["detail"] == "wrong" and answer.structured_content["field"] is None
    answer = called("enlarge", {}, server)
    assert answer.is_error and "there is no tool 'enlarge'" in answer.structured_content["detail"]
    good = called("status", None, Server({"ready": True}))
    assert not good.is_error and good.structured_content["ready"] is True
    assert called("quote", {"image": URI}, Server({"tiles": 3})).structured_content["tiles"] == 3


def test_a_caller_over_http_has_the_key_of_its_request() -> None:
    for headers, sent in (({"authorization": "Bearer x"}, {"Authorization": "Bearer x"}), ({}, {})):
        request: Any = SimpleNamespace(app="app", base_url="http://here/", headers=headers)
        caller = asyncio.run(mcp_server.over_http(SimpleNamespace(request=request)))  # type: ignore[arg-type]
        assert caller == Caller("app", "http://here/", sent, False, request)  # type: ignore[arg-type]


@pytest.mark.parametrize("sessions", [True, False])
def test_the_route_of_the_tools(sessions: bool) -> None:
    addition = mcp_server.http_parts(sessions)
    (route,) = addition.routes
    assert route.path == "/mcp" and route.methods == {"POST", "DELETE"}
    manager: Any = addition.context.__self__  # type: ignore[attr-defined]
    assert manager.stateless is not sessions


def test_a_server_for_one_program_has_no_keys_and_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pydantic import SecretStr

    from seesr.config import Configuration
    from seesr.networks import weights

    seen: dict[str, Any] = {}

    def build(configuration: Configuration, base: str, bundle: Path, assemble: Any) -> str:
        seen.update(configuration=configuration, bundle=bundle, exists=configuration.data.is_dir(), base=base)
        return "app"

    async def talk(app: Any) -> None:
        seen["app"] = app

    monkeypatch.setattr(mcp_server.serving, "build", build)
    monkeypatch.setattr(mcp_server, "talk", talk)
    configuration = Configuration(
        api_keys=SecretStr("ann:" + "0" * 16), platform="vertex", bundles="a/b=c", data=tmp_path
    )
    assert mcp_server.run_stdio(configuration, weights.POCKET, None) == 0
    private = seen["configuration"]
    assert private.api_keys.get_secret_value() == "" and private.platform is None and private.bundles == ""
    assert private.keys_file is None and private.data != tmp_path and seen["exists"] and not private.data.exists()
    assert (seen["app"], seen["bundle"], seen["base"]) == ("app", weights.POCKET, "http://localhost")
