"""Helpers for tests: start `seesr serve` and send requests to it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import requests
from PIL import Image

from lab.report import ROOT
from seesr.networks import weights
from seesr.serving import archives, uploads

ANN, BOB = "token-of-ann-0123456789", "token-of-bob-0123456789"
QUICK = {"num_inference_steps": 1, "seed": 1, "latent_tiled_size": 24}
LONG = {"num_inference_steps": 8, "seed": 1, "scale_factor": 8, "latent_tiled_size": 32}  # some twenty seconds


def sharp(width: int = 24, height: int = 18) -> bytes:
    """A small PNG with something in it."""
    ramp = np.linspace(20, 230, width)[None, :, None] * np.linspace(0.4, 1, height)[:, None, None] * [1.0, 0.8, 0.6]
    buffer = io.BytesIO()
    Image.fromarray(ramp.astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def archive(method: int = zipfile.ZIP_DEFLATED, **files: bytes) -> bytes:
    """A zip of files by their names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as opened:
        for name, data in files.items():
            opened.writestr(name, data)
    return buffer.getvalue()


def unpacked(data: bytes, folder: Path) -> tuple[list[uploads.Stored], list[dict[str, str]]]:
    """The files of a zip and those that are refused, as a server unpacks it."""
    (folder / "a.zip").write_bytes(data)
    return archives.unpack(folder / "a.zip", folder, "p")


class Serving:
    """`with Serving(folder) as server:`; its log goes to folder/log, its data to folder/data.

    Attributes:
        module: that starts it.
    """

    module = "seesr", "serve"

    def __init__(self, folder: Path, *arguments: str, ready: bool = True, **environment: str) -> None:
        self.folder, self.arguments, self.wait = folder, arguments, ready
        keys = f"ann:{ANN},bob:{BOB}"
        values = {"SEESR_DATA": str(folder / "data"), "SEESR_API_KEYS": keys, "SEESR_RATE": "100000", **environment}
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **values}

    def __enter__(self) -> Serving:
        self.folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", *self.module, "--port", "0", "--bundle", str(weights.POCKET)]
        command += ["--device", "cpu", *self.arguments]
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("seesr at "), (line, self.log())
        self.url = line.split()[-1].rstrip("/")
        if self.wait:
            self.until_ready()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()

    def until_ready(self, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while requests.get(f"{self.url}/ready", timeout=10).status_code != 200:
            assert time.monotonic() < deadline and self.process.poll() is None, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def ask(self, method: str, path: str, token: str | None = ANN, **options: Any) -> requests.Response:
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **options.pop("headers", {})}
        return requests.request(method, f"{self.url}{path}", headers=headers, timeout=120, **options)

    def upscale(self, data: bytes | None = None, token: str = ANN, **query: Any) -> requests.Response:
        """POST of an image body."""
        headers = {"Content-Type": "image/png"}
        return self.ask("POST", "/upscale", token, params={**QUICK, **query}, data=data or sharp(), headers=headers)

    def begin(self, data: bytes | None = None, **query: Any) -> dict[str, Any]:
        """A job on its way."""
        answer = self.upscale(data, wait=0, **query)
        assert answer.status_code == 202, answer.text
        return answer.json()

    def until(self, id: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        """The job once it has one of these statuses."""
        deadline = time.monotonic() + seconds
        while (job := self.ask("GET", f"/jobs/{id}").json())["status"] not in statuses:
            assert time.monotonic() < deadline, job
            time.sleep(0.01)
        return job


class EchoServing(Serving):
    """The same on an engine that gives its input back after ECHO_SECONDS, without torch."""

    module = ("lab.serve.echo",)
