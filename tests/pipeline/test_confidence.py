"""The view `confidence`: mask, record, cost, and the settings that it rejects."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from seesr import Output, Settings, Upscaler
from seesr.images import color
from seesr.images.image_data import ImageData
from seesr.images.record import read_record
from seesr.pipeline import confidence
from seesr.pipeline.outline import outline_of
from seesr.pipeline.work import count

RGB = skimage.data.chelsea()[60:84, 100:132]
SETTINGS = Settings(use_kds=True, seed=1)
SHOWN = SETTINGS.replace(output_view="confidence")


@pytest.fixture(scope="module")
def cached(pocket: Upscaler) -> Upscaler:
    return Upscaler(pocket.networks, cache=10**8)


@pytest.fixture(scope="module")
def image(cached: Upscaler) -> Output:
    """The image of these settings; the cache has its stages."""
    return cached(ImageData(RGB), SETTINGS)


@pytest.fixture(scope="module")
def output(cached: Upscaler, image: Output) -> Output:
    return cached(ImageData(RGB), SHOWN)


@pytest.fixture
def decoded(cached: Upscaler) -> Iterator[list[int]]:
    """One entry for each call of the decoder."""
    calls: list[int] = []
    handle = cached.networks.vae.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def test_the_mask_is_white_below_the_threshold(output: Output) -> None:
    calibration = confidence.calibration_of(output_bundle())
    assert calibration is not None and calibration == output.calibration and output.disagreement is not None
    with Image.open(io.BytesIO(output.data)) as file:
        assert file.mode == "L" and file.size == (128, 96)
        mask = np.asarray(file)
    np.testing.assert_array_equal(mask, 255 * (output.disagreement < calibration.threshold))
    expected = {"error": calibration.error, "level": calibration.level, "side": calibration.side}
    metrics: Any = output.metrics
    assert metrics["confidence"] == {**expected, "trusted": round(float((mask == 255).mean()), 4)}
    assert (output.image_data.record or {})["confidence"] == expected
    assert calibration.level == 0.95 and calibration.photographs >= 19


def output_bundle() -> Any:
    from seesr.networks import weights

    return weights.read_manifest(weights.POCKET)


def test_the_record_of_the_file_has_the_level(output: Output, tmp_path: Path) -> None:
    output.save(tmp_path / "mask.png")
    record = read_record(tmp_path / "mask.png")
    assert record["confidence"]["level"] == 0.95 and record["settings"]["output_view"] == "confidence"


def test_the_image_and_other_views_stay_as_they_are(image: Output, output: Output) -> None:
    np.testing.assert_array_equal(image.image_data.rgb, output.image_data.rgb)
    np.testing.assert_array_equal(image.uncertainty, output.uncertainty)  # type: ignore[arg-type]
    assert "confidence" not in image.metrics and "confidence" not in (image.image_data.record or {})
    with pytest.raises(ValueError, match=r"not computed: set output_view=confidence and use_kds=True"):
        image.view("confidence")
    assert "confidence" not in SETTINGS.replace(output_view="all").views


def test_only_the_other_particles_are_decoded_after_the_image(
    cached: Upscaler, image: Output, output: Output, decoded: list[int]
) -> None:
    assert output.metrics["reused"] == "tags, text, encode, denoise, decode"
    again = cached(ImageData(RGB), SHOWN)
    assert not decoded and again.metrics["reused"] == "tags, text, encode, denoise, decode, particles"
    assert again.data == output.data
    fresh = Upscaler(cached.networks)(ImageData(RGB), SHOWN)
    assert len(decoded) == SETTINGS.num_particles and fresh.data == output.data
    whole, plain = (count(outline_of(cached.networks), settings, (32, 24)) for settings in (SHOWN, SETTINGS))
    assert whole.pop("decode") == SETTINGS.num_particles * plain.pop("decode") and whole == plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_particles": 3}, "not calibrated for num_particles 3: set num_particles=4"),
        ({"num_inference_steps": 2}, "not calibrated for num_inference_steps 2: set num_inference_steps=1"),
        ({"scale_factor": 2.0}, r"not calibrated for scale_factor 2\.0: set scale_factor=4\.0"),
        ({"target_side": 128}, "not calibrated for target_side 128: leave target_side empty"),
        ({"user_prompt": "a cat"}, "not calibrated for user_prompt a cat: leave user_prompt empty"),
        ({"latent_tiled_size": 32}, "not calibrated for latent_tiled_size 32: leave latent_tiled_size empty"),
        ({"fidelity": 0.5}, r"not calibrated for fidelity 0\.5: set fidelity=0\.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_settings_are_refused(pocket: Upscaler, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pocket(ImageData(RGB), SHOWN.replace(**changes))


def test_missing_requirements_are_named(pocket: Upscaler, tiny_upscaler: Upscaler) -> None:
    for changes in ({"use_kds": False}, {"num_particles": 1}):
        with pytest.raises(ValueError, match="output_view confidence needs use_kds and num_particles of at least 2"):
            SHOWN.replace(**changes)
    with pytest.raises(ValueError, match=r"needs a calibration, and bundle tiny has none: set output_view=uncertainty"):
        tiny_upscaler(ImageData(RGB), SHOWN)
    with pytest.raises(ValueError, match="calibrated without a mask: remove the mask"):
        pocket(ImageData(RGB), SHOWN, mask=np.full(RGB.shape[:2], 255, np.uint8))
    with pytest.raises(ValueError, match="region cannot be combined with"):
        SHOWN.replace(region="0,0,16,16")


def test_a_record_is_accepted_again(output: Output) -> None:
    """A record has the tile size and the steps that were used."""
    settings = Settings(**(output.image_data.record or {})["settings"])
    assert settings.latent_tiled_size == 64 and settings.num_inference_steps == 1
    assert confidence.require(settings, 1, False, output_bundle()) == output.calibration


def test_spread_is_the_deviation_of_the_grey_images() -> None:
    torch.manual_seed(0)
    images = 0.5 + 0.001 * torch.rand(4, 3, 5, 6)
    expected = 255 * images.double().mean(1).std(0)
    torch.testing.assert_close(confidence.spread(images).double(), expected, rtol=1e-3, atol=1e-4)
    assert (confidence.spread([images[0], images[0]]) == 0).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_disagreement_does_not_depend_on_strips_or_depth(monkeypatch: pytest.MonkeyPatch, depth: Any) -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (150, 40, 3)).astype(np.uint8)
    spread = torch.from_numpy(rng.random((160, 48), np.float32))
    whole = confidence.disagreement(spread, rgb)
    monkeypatch.setattr(color, "STRIP", 16)
    strips = confidence.disagreement(spread, rgb.astype(depth) * (np.iinfo(depth).max // 255))
    np.testing.assert_allclose(strips, whole, rtol=1e-4)
    assert (confidence.disagreement(spread, np.full_like(rgb, 90)) < 1e-4).all()


def test_the_local_error_is_a_mean_over_a_window() -> None:
    truth = np.zeros((64, 64, 3), np.uint8)
    rgb = truth.copy()
    rgb[32, 32] = 240
    error = confidence.local_error(rgb, truth)
    assert error.max() == pytest.approx(240 / confidence.WINDOW**2)
    assert (error > 0).sum() == confidence.WINDOW**2
    np.testing.assert_allclose(error, cv2.blur(rgb[..., 0].astype(np.float32), (16, 16)), atol=1e-5)


def test_the_table_is_keyed_by_the_bundle() -> None:
    rows = json.loads(confidence.TABLE.read_text())
    bundle = output_bundle()
    assert rows[bundle.digest]["bundle"] == "pocket"
    assert confidence.calibration_of(bundle._replace(name="other")) is None
    assert {field.name for field in dataclasses.fields(Settings)} >= set(confidence.UNCALIBRATED)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_disagreement_is_averaged_over_squares_of_32_pixels(depth: Any, rng: np.random.Generator) -> None:
    """The spread of one pixel counts in the 32 x 32 around it, times the detail finer than a Gaussian of 2 pixels."""
    rgb = rng.integers(0, 256, (150, 140, 3)).astype(depth) * (np.iinfo(depth).max // 255)
    spread = torch.zeros(160, 144)
    spread[75, 70] = 1024.0
    spread[155, 70] = spread[75, 142] = 1e6  # beyond the image
    result = confidence.disagreement(spread, rgb)
    grey = rgb.mean(2).astype(np.float32) / (np.iinfo(depth).max // 255)
    detail = cv2.blur(np.abs(grey - cv2.GaussianBlur(grey, (0, 0), 2)), (32, 32))
    assert (result > 0).sum() == 32 * 32
    np.testing.assert_allclose(result[result > 0], detail[result > 0], rtol=1e-3)
