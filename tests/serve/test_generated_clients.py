"""Clients generated from docs/openapi.json in Python and TypeScript upscale an image and read an error."""

from __future__ import annotations

import base64
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ANN, sharp

from lab.report import ROOT
from lab.serve.servers import EchoServer

DOCUMENT = ROOT / "docs/openapi.json"
PACKAGES = ROOT / "build/js/node_modules"
NEEDED = ("openapi-typescript", "openapi-fetch", "typescript", "@types/node")
IMAGE = sharp()
URI = "data:image/png;base64," + base64.b64encode(IMAGE).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoServer]:
    with EchoServer(tmp_path_factory.mktemp("generated"), SEESR_API_KEYS=f"ann:{ANN}") as running:
        yield running


def documented(start: str) -> str:
    """The code block of docs/http-api.md that begins so."""
    (block,) = re.findall(rf"^```\w*\n({start}.*?)^```", (ROOT / "docs/http-api.md").read_text(), re.S | re.M)
    return block


def test_a_python_client(server: EchoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "client.yaml").write_text(documented("content_type_overrides"))
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(DOCUMENT), "--meta", "none"]
    command += ["--config", "client.yaml", "--output-path", "seesr_client", "--fail-on-warning"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    monkeypatch.syspath_prepend(tmp_path)
    generated = importlib.import_module("seesr_client")
    models, types = (importlib.import_module(f"seesr_client.{name}") for name in ("models", "types"))
    images, replicate = "seesr_client.api.images.", "seesr_client.api.replicate."
    upscale, show, result, predict = (
        importlib.import_module(name)
        for name in (images + "post_upscale", images + "get_jobs_id", images + "get_jobs_id_result",
                     replicate + "post_v1_predictions")
    )  # fmt: skip
    with generated.AuthenticatedClient(server.url, ANN) as client:
        whole = upscale.sync(client=client, body=models.UpscaleRequest(image=URI, scale_factor=2, seed=1))
        assert whole.payload.read() == IMAGE
        files = models.PostUpscaleFilesBody(types.File(io.BytesIO(IMAGE), "photo.png", "image/png"), wait=0, seed=1)
        job = upscale.sync(client=client, body=files)
        while job.status in ("starting", "processing"):
            job = show.sync(job.id, client=client)
        assert job.status == "succeeded" and job.settings["seed"] == 1
        assert result.sync(job.id, client=client).payload.read() == IMAGE
        wrong = upscale.sync(client=client, body=models.UpscaleRequest(image=URI, scale_factor=99))
        assert (wrong.code, wrong.field, wrong.status) == ("invalid_input", "scale_factor", 422)
        request = models.PredictionRequest(models.Input(image=URI, seed=1), version="you/seesr")
        assert predict.sync(client=client, body=request, prefer="wait").status == "succeeded"
    with generated.AuthenticatedClient(server.url, "wrong") as client:
        assert show.sync(job.id, client=client).code == "unauthorized"


@pytest.mark.long
def test_a_typescript_client(server: EchoServer, tmp_path: Path) -> None:
    if not all((PACKAGES / name).exists() for name in NEEDED) or not shutil.which("node"):
        message = f"needs node, and the packages: npm install --prefix build/js {' '.join(NEEDED)}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    (tmp_path / "node_modules").symlink_to(PACKAGES)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "photo.png").write_bytes(IMAGE)
    shutil.copy(Path(__file__).with_name("generated.ts"), tmp_path)
    environment = {**os.environ, "URL": server.url, "TOKEN": ANN, "PHOTO": str(tmp_path / "photo.png")}
    programs = "node_modules/.bin"
    check = ["--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom", "--skipLibCheck"]
    for command in (
        [f"{programs}/openapi-typescript", str(DOCUMENT), *documented("npx openapi-typescript").split()[3:]],
        [f"{programs}/tsc", *check, "generated.ts"],
        ["node", "generated.js"],
    ):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout) == {
        "same": True,
        "status": "succeeded",
        "seed": "number",
        "result": 200,
        "code": "invalid_input",
        "field": "scale_factor",
        "unauthorized": "unauthorized",
        "prediction": "succeeded",
    }
