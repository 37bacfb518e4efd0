"""A folder as a reader has it: images, the weights, and a server that answers at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from scripts.cog_server import ROOT


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image) -> Path:
    """The current folder, with the files that the documentation names."""
    monkeypatch.chdir(tmp_path)
    small = photo.crop((0, 0, 24, 20))
    (tmp_path / "holiday").mkdir()
    for name in ("photo.jpg", "photo.png", "a.jpg", "b.jpg", "mask.png", "holiday/one.jpg"):
        small.save(tmp_path / name)
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.setenv("SEESR_WEIGHTS", "weights/pocket")
    monkeypatch.setenv("SEESR_DEVICE", "cpu")
    return tmp_path


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a `seesr serve` whose engine gives its input back."""
    folder = tmp_path_factory.mktemp("echo")
    environment = {**os.environ, "SEESR_DATA": str(folder / "data"), "ECHO_SECONDS": "0", "PYTHONPATH": str(ROOT)}
    environment["SEESR_BUNDLES"] = f"acme/small={ROOT / 'weights/pocket'}"
    command = [sys.executable, "-m", "lab.serve.echo", "--port", "0"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout
    line = server.stdout.readline()
    assert line.startswith("seesr at "), (line, (folder / "log").read_text())
    url = line.split()[-1].rstrip("/")
    while requests.get(f"{url}/ready", timeout=10).status_code != 200:
        assert server.poll() is None
    yield url
    server.terminate()
    server.wait(60)
    server.stdout.close()
