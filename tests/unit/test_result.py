"""`Output`: what it shows of itself, and which files can hold it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seesr import Output, Settings
from seesr.images.image_data import ImageData
from seesr.networks.weights import Bundle
from seesr.pipeline.confidence import Calibration
from seesr.pipeline.result import record


def output(width: int = 12, height: int = 8, alpha: bool = False, depth: type = np.uint8, **changes: Any) -> Output:
    rgb = np.zeros((height, width, 3), depth)
    image = ImageData(rgb, np.full((height, width), 7, depth) if alpha else None)
    metrics: Any = {"seconds": {"encode": 1.0, "denoise": 0.54}}
    return Output(image, None, Settings(seed=3, **changes), metrics, ImageData(rgb[::2, ::2]), ([], 4))


def test_an_output_says_what_it_is() -> None:
    assert repr(output()) == "<Output 12x8, 8 bit, seed 3, 1.5 s>"
    assert repr(output(depth=np.uint16)) == "<Output 12x8, 16 bit, seed 3, 1.5 s>"


@pytest.mark.parametrize(
    ("size", "shown"), [((2048, 512), (1024, 256)), ((512, 2048), (256, 1024)), ((1024, 1000), (1024, 1000))]
)
def test_a_notebook_shows_at_most_1024_pixels(size: tuple[int, int], shown: tuple[int, int]) -> None:
    assert Image.open(io.BytesIO(output(*size)._repr_png_())).size == shown


@pytest.mark.parametrize(
    ("options", "suffix", "loss"),
    [
        ({}, "jpg", None), ({"alpha": True}, "jpg", "transparency"), ({"alpha": True}, "webp", None),
        ({"depth": np.uint16}, "webp", "16 bits per colour"), ({"depth": np.uint16, "alpha": True}, "png", None),
    ],
)  # fmt: skip
def test_a_format_must_hold_the_result(options: dict[str, Any], suffix: str, loss: str | None, tmp_path: Path) -> None:
    path, result = tmp_path / f"a.{suffix.upper()}", output(**options)
    if loss is not None:
        with pytest.raises(ValueError, match=f"a {suffix} file loses the result's {loss}: save a .png, or pass"):
            result.save(path)
        assert not path.exists()
    result.save(path, allow_loss=True)
    with Image.open(path) as image:
        assert image.size == (12, 8) and image.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())


def test_the_record_names_all_that_the_image_depends_on() -> None:
    bundle = Bundle(Path("x"), "name", "kind", "licence", {"a": "1"})
    plain = record(Settings(seed=1), bundle, None)
    assert plain.keys() == {"version", "bundle", "bundle_sha256", "settings"} and plain["settings"]["seed"] == 1
    assert (plain["bundle"], plain["bundle_sha256"]) == ("name", bundle.digest)
    calibration = Calibration(5.0, 0.95, 2.0, 64, 1, 20, 100)
    full = record(Settings(seed=1), bundle, np.zeros((2, 2), np.uint8), calibration, "bfloat16")
    assert full.keys() - plain.keys() == {"precision", "mask_sha256", "confidence"}
    assert full["confidence"] == {"error": 5.0, "level": 0.95, "side": 64} and full["precision"] == "bfloat16"
    assert full["mask_sha256"] != record(Settings(seed=1), bundle, np.ones((2, 2), np.uint8))["mask_sha256"]


def test_there_is_no_such_view() -> None:
    with pytest.raises(ValueError, match="there is no view 'x'; use image, comparison"):
        output().view("x")
    with pytest.raises(ValueError, match="view tiles is drawn of the whole image; run again without region 0,0,4,4"):
        output(region="0,0,4,4").view("tiles")
    assert output().view("image").size == (12, 8) and output().bicubic.shape == (8, 12, 3)
