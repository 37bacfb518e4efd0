"""Cog's real server over HTTP, on the pocket bundle."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
from cog_client import ask_in_background, data_uri, image_of, png, predict, wait_for
from PIL import Image

from scripts.cog_server import CogServer
from seesr import Settings
from seesr.settings import cog_schema


def test_a_photo_is_upscaled_with_metrics(server: CogServer, photo: Image.Image) -> None:
    values = {"image": data_uri(png(photo)), "seed": 5, "num_inference_steps": 1}
    first = predict(server, **values)
    assert image_of(first).size == (256, 192)
    metrics = first["metrics"]
    assert metrics["seed"] == 5 and metrics["bundle"] == "pocket" and metrics["output_size"] == "256x192"
    assert metrics["seconds"]["denoise"] > 0
    assert predict(server, **values)["output"] == first["output"]
    assert predict(server, **{**values, "seed": 6})["output"] != first["output"]


def test_steering_reports_itself_and_gives_its_map(server: CogServer, photo: Image.Image) -> None:
    values = {"image": data_uri(png(photo)), "seed": 5, "num_inference_steps": 2, "use_kds": True, "num_particles": 3}
    answer = predict(server, **values, output_view="uncertainty")
    assert image_of(answer).mode.startswith("I;16") and image_of(answer).size == (256, 192)
    kds = answer["metrics"]["kds"]
    assert kds["particles"] == 3 and len(kds["distances"]) == 3 and len(kds["spread_before"]) == 2
    refused = predict(server, **{**values, "num_particles": 1}, output_view="uncertainty")
    assert refused["status"] == "failed" and "one sample cannot disagree" in refused["error"]


def test_all_views_come_as_one_zip(server: CogServer, photo: Image.Image) -> None:
    answer = predict(server, image=data_uri(png(photo)), output_view="all", num_inference_steps=1, seed=1)
    assert answer["output"].startswith("data:application/zip;base64,")
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(answer["output"].partition(",")[2]))) as archive:
        assert archive.namelist() == ["image.png", "comparison.png", "difference.png", "tiles.png"]


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_the_format_is_what_was_asked_for(server: CogServer, photo: Image.Image, kind: str) -> None:
    answer = predict(server, image=data_uri(png(photo)), output_format=kind, num_inference_steps=1, seed=1)
    assert image_of(answer).format == {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[kind]


@pytest.mark.parametrize(
    "values",
    [
        {"scale_factor": 9},
        {"num_inference_steps": 0},
        {"seed": -1},
        {"color_fix": "lab"},
        {"output_quality": 101},
        {"cfg_scale": "high"},
        {"user_prompt": "x" * 2001},
    ],
)
def test_a_value_outside_the_schema_is_a_422(server: CogServer, photo: Image.Image, values: dict) -> None:
    body = {"input": {"image": data_uri(png(photo)), **values}}
    answer = requests.post(f"{server.url}/predictions", json=body, timeout=30)
    assert answer.status_code == 422
    assert next(iter(values)) in answer.text


def test_a_missing_image_is_a_422(server: CogServer) -> None:
    assert requests.post(f"{server.url}/predictions", json={"input": {}}, timeout=30).status_code == 422


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (data_uri(b"not an image", "image/png"), "not an image"),
        ("data:image/png;base64,@@@", "empty"),
        ("/etc/passwd", "must be an uploaded file"),
        (data_uri(png(Image.new("RGB", (3000, 3000)))), "the limit is 67.1 MP"),
    ],
)
def test_a_bad_image_fails_in_one_line_and_the_server_lives(
    server: CogServer, photo: Image.Image, image: str, message: str
) -> None:
    started = time.monotonic()
    answer = predict(server, image=image, scale_factor=4 if "limit" not in message else 8)
    assert answer["status"] == "failed" and answer.get("output") is None
    assert message in answer["error"]
    assert "\n" not in answer["error"] and "Traceback" not in answer["error"] and "/tmp" not in answer["error"]
    assert time.monotonic() - started < 1
    good = predict(server, image=data_uri(png(photo)), num_inference_steps=1, seed=1)
    assert image_of(good).size == (256, 192)
    wait_for(server, "READY", seconds=1)


def test_a_running_prediction_can_be_cancelled(server: CogServer, photo: Image.Image) -> None:
    values = {"image": data_uri(png(photo.resize((200, 150)))), "scale_factor": 8, "num_inference_steps": 8, "seed": 1}
    asking, answers = ask_in_background(server, **values)
    wait_for(server, "BUSY")
    time.sleep(0.5)
    assert requests.post(f"{server.url}/predictions/long/cancel", timeout=10).status_code == 200
    asking.join(60)
    assert answers[0]["status"] == "canceled"
    good = predict(server, image=data_uri(png(photo)), num_inference_steps=1, seed=1)
    assert np.asarray(image_of(good)).shape == (192, 256, 3)


def test_missing_weights_fail_setup_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    with (
        CogServer(tmp_path / "log", SEESR_WEIGHTS="weights/nowhere") as broken,
        pytest.raises(RuntimeError, match="scripts/weights"),
    ):
        broken.wait_until_ready()


def test_the_schema_is_served(server: CogServer) -> None:
    """The committed schema, which Replicate shows, is the one that the runtime checks requests against."""
    served = requests.get(f"{server.url}/openapi.json", timeout=10).json()["components"]["schemas"]
    committed = json.loads(cog_schema.FILE.read_text())["components"]["schemas"]
    for name in (
        "Input",
        "Output",
        *(field.name for field in dataclasses.fields(Settings) if "choices" in field.metadata),
    ):
        assert served[name] == committed[name]
