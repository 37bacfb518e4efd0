"""The corpus of bad and odd requests through Cog's server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import corpus
import pytest
from cog_client import ask, data_uri, image_of, png, predict
from corpus import Case
from PIL import Image

from scripts.cog_server import CogServer

QUICK = {"num_inference_steps": 1, "seed": 1, "scale_factor": 2, "latent_tiled_size": 16, "latent_tiled_overlap": 4}


def send(server: CogServer, case: Case) -> Any:
    image = data_uri(case.image) if isinstance(case.image, bytes) else case.image
    if isinstance(case.inputs, str):
        return ask(server, case.inputs.replace("IMAGE", str(image)))
    values = {**QUICK, **case.inputs, **({} if image is None else {"image": image})}
    return ask(server, {"input": values})


@pytest.fixture(scope="module")
def good(server: CogServer) -> Iterator[str]:
    """The answer to a good request, which must be the same at any time."""
    image = data_uri(corpus.file(corpus.PHOTO))
    first = predict(server, image=image, **QUICK)["output"]
    yield first
    assert predict(server, image=image, **QUICK)["output"] == first


@pytest.mark.parametrize("case", corpus.parameters())
def test_request(server: CogServer, good: str, case: Case) -> None:
    started = time.monotonic()
    response = send(server, case)
    seconds = time.monotonic() - started
    if case.refused:
        assert response.status_code in (400, 422), response.text
        assert case.message and case.message in response.text, response.text
        return
    answer = response.json()
    if answer["status"] == "succeeded":
        assert case.message is None, "must be refused"
        image_of(answer).load()
        return
    error = answer["error"]
    assert case.message is not None and re.search(case.message, error), error
    assert answer.get("output") is None and seconds < 1
    if "Input validation" in error:  # Cog's own words: it could not fetch the URL
        return
    assert "\n" not in error and "Traceback" not in error and "/" not in error.replace("http(s)", "")
    assert predict(server, image=data_uri(corpus.file(corpus.PHOTO)), **QUICK)["output"] == good
    assert server.health()["status"] in ("READY", "BUSY")  # busy for a moment after its answer


@pytest.mark.parametrize("kind", ["file", "link", "pipe", "folder"])
def test_no_local_path_is_read(server: CogServer, tmp_path: Path, kind: str) -> None:
    """Even an image in the temporary folder, where uploads lie too, is no upload when a client names its path."""
    path, target = tmp_path / "image.png", tmp_path / "target.png"
    target.write_bytes(corpus.file(corpus.PHOTO))
    {
        "file": lambda: path.write_bytes(target.read_bytes()),
        "link": lambda: path.symlink_to(target),
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
    }[kind]()
    answer = predict(server, image=str(path), **QUICK)
    assert answer["status"] == "failed" and "must be an uploaded file" in answer["error"]


def test_the_record_makes_the_same_bytes(server: CogServer, tmp_path: Path) -> None:
    from seesr.images.record import read_record

    for kind in ("png", "webp", "jpg"):
        values = {
            "image": data_uri(png(Image.fromarray(corpus.PHOTO))),
            "output_format": kind,
            "num_inference_steps": 2,
            "scale_factor": 2,
            "latent_tiled_size": 32,
        }
        first = predict(server, **values, user_prompt="<a> & \u00fc \U0001f600")
        (tmp_path / kind).write_bytes(file_of(first))
        settings = read_record(tmp_path / kind)["settings"]
        assert settings["seed"] == first["metrics"]["seed"]
        stated = {name: value for name, value in settings.items() if value is not None}  # the runtime takes no null
        again = predict(server, image=values["image"], **stated)
        assert again["output"] == first["output"]


def file_of(answer: dict) -> bytes:
    import base64

    return base64.b64decode(answer["output"].partition(",")[2])
