"""Every platform adapter in the platform's own local runner, with one table of bad input for all."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from moto.server import ThreadedMotoServer
from serving import QUICK, sharp

from lab.report import ROOT
from seesr import Engine, Settings
from seesr.networks import weights

WORDS = base64.b64encode(sharp()).decode()
BAD: dict[str, tuple[dict[str, Any], str]] = {  # what is sent instead of a good image and settings -> part of the line
    "no base64": ({"image": "@@@"}, "not valid base64"),
    "no image": ({"image": base64.b64encode(b"text").decode()}, "not an image"),
    "a number as image": ({"image": 5}, "base64"),
    "a word for a number": ({"scale_factor": "big"}, "must be a float"),
    "out of range": ({"scale_factor": 9}, "from 1 to 8"),
    "an unknown input": ({"upscaler": "x"}, "there is no input 'upscaler'"),
}


@pytest.fixture(scope="module")
def expected(engine: Engine) -> bytes:
    return engine.run(sharp(), Settings(**QUICK)).data


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path, **environment: str) -> Iterator[str]:
    """A local runner, once it listens."""
    env = {**os.environ, "SEESR_WEIGHTS": str(weights.POCKET), "SEESR_DEVICE": "cpu", **environment}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert time.monotonic() < deadline and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository that scripts/hub_folder.py makes of the pocket bundle."""
    out = tmp_path_factory.mktemp("hub") / "out"
    command = [sys.executable, str(ROOT / "scripts/hub_folder.py"), str(out), "--bundle", str(weights.POCKET)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.fixture(scope="module")
def hugging_face(hub_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Hugging Face's emulator; it needs starlette below 1, so it has a folder of its own."""
    emulator = ROOT / "build/hf"
    if not emulator.exists():
        message = "needs: pip install --target build/hf --no-deps hf-endpoints-emulator 'starlette<1'"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    port = free_port()
    script = f"from hf_endpoints_emulator.emulator import emulate; emulate({str(hub_folder / 'handler.py')!r}, {port})"
    path = f"{emulator}{os.pathsep}{hub_folder}"
    with running([sys.executable, "-c", script], port, tmp_path_factory.mktemp("hf"), PYTHONPATH=path) as url:
        yield url


def test_a_hub_folder_holds_what_an_endpoint_needs(hub_folder: Path) -> None:
    names = {path.name for path in hub_folder.iterdir()}
    assert names == {"handler.py", "requirements.txt", "README.md", "NOTICE", "seesr", "bundle"}
    needs = (hub_folder / "requirements.txt").read_text().splitlines()
    assert not [line for line in needs if line.startswith(("torch", "transformers", "diffusers", "huggingface"))]
    card = (hub_folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "`pocket`" in card
    assert weights.verify(hub_folder / "bundle").name == "pocket"


def test_hugging_face_gives_the_bytes_and_keeps_depth(hugging_face: str, expected: bytes, engine: Engine) -> None:
    answer = requests.post(
        hugging_face, json={"inputs": WORDS, "parameters": {**QUICK, "scale_factor": "4"}}, timeout=60
    )
    assert answer.status_code == 200, answer.text
    assert base64.b64decode(answer.json()["image"]) == expected and answer.json()["seed"] == 1
    import cv2
    import numpy as np

    deep = cv2.imencode(".png", np.linspace(0, 65535, 24 * 18 * 3).reshape(18, 24, 3).astype(np.uint16))[1].tobytes()
    body = {"inputs": base64.b64encode(deep).decode(), "parameters": QUICK}
    result = base64.b64decode(requests.post(hugging_face, json=body, timeout=60).json()["image"])
    assert result == engine.run(deep, Settings(**QUICK)).data


@pytest.mark.parametrize("name", BAD)
def test_bad_input_to_hugging_face(hugging_face: str, name: str) -> None:
    changes, message = BAD[name]
    values = {"image": WORDS, **QUICK, **changes}
    body = {"inputs": values.pop("image"), "parameters": values}
    answer = requests.post(hugging_face, json=body, timeout=60)
    assert answer.status_code == 400 and message in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.fixture(scope="module")
def runpod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """RunPod's own local server."""
    port = free_port()
    worker = [sys.executable, str(ROOT / "deploy/runpod_worker.py"), "--rp_serve_api"]
    command = [*worker, "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port)]
    with running(command, port, tmp_path_factory.mktemp("runpod"), PYTHONPATH=str(ROOT)) as url:

        def ask(values: dict[str, Any]) -> dict[str, Any]:
            return requests.post(f"{url}/runsync", json={"input": values}, timeout=60).json()

        yield ask


def test_runpod_gives_the_bytes(runpod: Callable[[dict[str, Any]], dict[str, Any]], expected: bytes) -> None:
    answer = runpod({"image": WORDS, **QUICK})
    assert answer["status"] == "COMPLETED", answer
    assert base64.b64decode(answer["output"]["image"]) == expected


@pytest.mark.parametrize("name", BAD)
def test_bad_input_to_runpod(runpod: Callable[[dict[str, Any]], dict[str, Any]], name: str) -> None:
    changes, message = BAD[name]
    answer = runpod({"image": WORDS, **QUICK, **changes})
    assert answer["status"] == "FAILED" and message in answer["error"]
    assert "Traceback" not in json.dumps(answer) and "\n" not in answer["error"]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server on this machine; its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    requests.put(f"{url}/images", timeout=10)
    yield url
    server.stop()


@pytest.fixture
def stored(bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {
        "SEESR_STORE": "s3://images", "AWS_ENDPOINT": bucket, "AWS_ACCESS_KEY_ID": "key", "AWS_REGION": "us-east-1",
        "AWS_SECRET_ACCESS_KEY": "secret", "SEESR_WEIGHTS": str(weights.POCKET), "SEESR_DEVICE": "cpu",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return bucket


@pytest.fixture
def modal_app(stored: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modal_app

        yield modal_app


def test_modals_file_loads_without_torch() -> None:
    script = "import sys; sys.path.insert(0, 'deploy'); import modal_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).returncode == 0


def test_modal_gives_the_bytes_and_a_link(modal_app: Any, expected: bytes) -> None:
    from fastapi import HTTPException

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        machine = modal_app.Seesr()
        assert machine.upscale.local(sharp(), QUICK) == expected
        answer = machine.web.local({"image": WORDS, **QUICK})
        assert set(answer) == {"file_key", "public_url"} and answer["file_key"].endswith(".png")
        with urllib.request.urlopen(answer["public_url"], timeout=30) as link:
            assert link.read() == expected and link.headers["content-type"] == "image/png"
        for changes, message in BAD.values():
            with pytest.raises(HTTPException) as caught:
                machine.web.local({"image": WORDS, **QUICK, **changes})
            assert caught.value.status_code == 422 and (message in caught.value.detail or "base64" in message)


def test_without_a_store_modal_is_refused_at_start(modal_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEESR_STORE")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="SEESR_STORE is not set"):
            modal_app.Seesr().upscale.local(sharp(), QUICK)


def test_a_store_that_is_down_is_one_line(stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from seesr.object_store import Store

    monkeypatch.setenv("AWS_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(RuntimeError, match="the result cannot be stored") as caught:
        Store.configured().put(b"x", "png")
    assert "\n" not in str(caught.value)


def test_a_folder_is_a_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seesr.object_store import Store

    monkeypatch.setenv("SEESR_STORE", f"file://{tmp_path}")
    put = Store.configured().put(b"image", "webp")
    assert (tmp_path / put["file_key"]).read_bytes() == b"image"
    monkeypatch.setenv("SEESR_STORE_PUBLIC", "https://images.example")
    assert Store.configured().put(b"x", "png")["public_url"].startswith("https://images.example/")


def test_a_result_over_runpods_limit_goes_to_the_store(
    stored: str, expected: bytes, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import runpod_worker
    monkeypatch.setattr(runpod_worker, "engine", engine)
    monkeypatch.setattr(runpod_worker, "LARGEST_ANSWER", 1000)
    monkeypatch.setattr(runpod_worker.runpod.serverless, "progress_update", lambda job, message: None)
    answer = runpod_worker.handler({"id": "1", "input": {"image": WORDS, **QUICK}})
    with urllib.request.urlopen(answer["public_url"], timeout=30) as link:
        assert link.read() == expected


Adapter = Callable[[], str]  # sends a good image and returns the line that came back, or ""


@pytest.fixture
def adapters(hub_folder: Path, modal_app: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Adapter]:
    """Every adapter in this process, loaded under the environment as it is now; results go to the store."""
    from fastapi import HTTPException

    monkeypatch.syspath_prepend(str(ROOT / "deploy"))
    monkeypatch.syspath_prepend(str(ROOT / "deploy/huggingface"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import handler
        import runpod_worker
    monkeypatch.setattr(runpod_worker.runpod.serverless, "progress_update", lambda job, message: None)
    monkeypatch.setattr(runpod_worker, "LARGEST_ANSWER", 1000)

    def hugging_face() -> str:
        try:
            handler.EndpointHandler(str(hub_folder))({"inputs": WORDS, "parameters": QUICK})
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    def runpod() -> str:
        monkeypatch.setattr(runpod_worker, "engine", Engine.load())
        return runpod_worker.handler({"id": "1", "input": {"image": WORDS, **QUICK}}).get("error", "")

    def modal() -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                modal_app.Seesr().web.local({"image": WORDS, **QUICK})
            except HTTPException as error:
                return str(error.detail)
        return ""

    return {"hugging_face": hugging_face, "runpod": runpod, "modal": modal}


@pytest.mark.parametrize("adapter", ["hugging_face", "runpod", "modal"])
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SEESR_DEADLINE", "0.001", "the deadline of 0.001 s has passed"),  # a platform's time limit
        ("AWS_ENDPOINT", "http://127.0.0.1:9", "the result cannot be stored"),  # a store that is down
    ],
)
def test_faults_around_an_adapter_are_one_line(
    adapters: dict[str, Adapter], adapter: str, variable: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable.startswith("AWS") and adapter == "hugging_face":
        value, message = os.environ.get(variable, ""), ""  # it needs no store
    monkeypatch.setenv(variable, value)
    line = adapters[adapter]()
    assert message in line and "Traceback" not in line and "\n" not in line
    assert bool(line) == bool(message)


def test_an_image_body_of_hugging_face_is_answered_with_an_image(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stock toolkit hands over a PIL image, and encodes the one that it is given."""
    import io

    from PIL import Image

    monkeypatch.syspath_prepend(str(ROOT / "deploy/huggingface"))
    import handler

    image = Image.open(io.BytesIO(sharp())).convert("RGB")
    result = handler.EndpointHandler(str(hub_folder))({"inputs": image, "parameters": {**QUICK, "scale_factor": "1.5"}})
    assert isinstance(result, Image.Image) and result.size == (36, 27)


def test_a_full_disk_leaves_no_half_repository(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/hub_folder.py"), "/proc/out", "--bundle", str(weights.POCKET)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_no_adapter_is_long() -> None:
    adapters = [ROOT / "predict.py", *(ROOT / "deploy").rglob("*.py")]
    for path in adapters:  # an input of Cog is one line and no logic
        lines = [line for line in path.read_text().splitlines() if " = Input(" not in line]
        assert len(lines) <= 60, (path, len(lines))
