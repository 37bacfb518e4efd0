"""The whole road of a picture, on the pocket model and on tiny networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr import Settings, Upscaler
from seesr.image import Picture

QUICK = Settings(num_inference_steps=1, seed=1)


def pixels(upscaler: Upscaler, picture: Image.Image, **changes: object) -> np.ndarray:
    return np.asarray(upscaler(picture, dataclasses.replace(QUICK, **changes)).image)


def test_same_seed_same_bytes_other_seed_other_bytes(pocket: Upscaler, photo: Image.Image) -> None:
    first = pixels(pocket, photo)
    np.testing.assert_array_equal(first, pixels(pocket, photo))
    assert (first != pixels(pocket, photo, seed=2)).any()


def test_a_missing_seed_is_drawn_and_reported(pocket: Upscaler, photo: Image.Image) -> None:
    settings = Settings(num_inference_steps=1)
    first, second = pocket(photo, settings), pocket(photo, settings)
    assert first.seed != second.seed
    again = pocket(photo, dataclasses.replace(settings, seed=first.seed))
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(first.image))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale_factor", 3.0),
        ("user_prompt", "dark blurry noisy"),
        ("positive_prompt", "blur, lowres, smooth"),
        ("num_inference_steps", 2),
        ("cfg_scale", 2.0),
        ("latent_tiled_size", 32),
        ("color_fix", "adain"),
        ("color_fix", "none"),
    ],
)
def test_every_setting_changes_the_picture(pocket: Upscaler, photo: Image.Image, field: str, value: object) -> None:
    base, changed = pixels(pocket, photo), pixels(pocket, photo, **{field: value})
    assert base.shape != changed.shape or (base != changed).any()


def test_the_negative_prompt_works_with_guidance_only(pocket: Upscaler, photo: Image.Image) -> None:
    np.testing.assert_array_equal(pixels(pocket, photo), pixels(pocket, photo, negative_prompt="dark"))
    guided = pixels(pocket, photo, cfg_scale=2.0)
    assert (guided != pixels(pocket, photo, cfg_scale=2.0, negative_prompt="dark")).any()


def test_the_overlap_changes_the_tiles_and_the_picture(pocket: Upscaler, photo: Image.Image) -> None:
    few, many = (
        pocket(photo, dataclasses.replace(QUICK, latent_tiled_size=32, latent_tiled_overlap=overlap))
        for overlap in (0, 24)
    )
    assert few.metrics["tiles"] == 4 < many.metrics["tiles"]
    assert (np.asarray(few.image) != np.asarray(many.image)).any()


def test_views(pocket: Upscaler, photo: Image.Image) -> None:
    result = pocket(photo, QUICK)
    comparison = result.view("comparison")
    assert comparison.size == (512, 192)
    np.testing.assert_array_equal(comparison.rgb[:, 256:], result.picture.rgb)
    with pytest.raises(ValueError, match="without steering"):
        result.view("uncertainty")


@pytest.mark.parametrize(
    ("size", "scale"),
    [((1, 1), 4), ((1, 1), 1), ((3, 2), 8), ((67, 41), 1.5), ((130, 1), 4), ((1, 90), 2.7), ((64, 64), 4)],
)
def test_the_size_is_exact(pocket: Upscaler, size: tuple[int, int], scale: float, rng: np.random.Generator) -> None:
    picture = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    result = pocket(picture, dataclasses.replace(QUICK, scale_factor=scale))
    assert result.image.size == (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


def test_steps_one_to_eight_work_and_stay_close_to_the_picture(pocket: Upscaler, photo: Image.Image) -> None:
    bicubic = np.asarray(photo.resize((photo.width * 4, photo.height * 4), Image.Resampling.BICUBIC), float)
    for steps in range(1, 9):
        ours = pixels(pocket, photo, num_inference_steps=steps).astype(float)
        assert np.sqrt(((ours - bicubic) ** 2).mean()) < 20


def test_metrics_say_what_happened(pocket: Upscaler, photo: Image.Image) -> None:
    metrics = pocket(photo, QUICK).metrics
    assert metrics["seed"] == 1
    assert metrics["input_size"] == "64x48" and metrics["output_size"] == "256x192"
    assert metrics["steps"] == 1 and metrics["tiles"] == 1
    assert metrics["bundle"] == "pocket" and metrics["device"] == "cpu"
    assert set(metrics["seconds"]) == {"tags", "text", "enlarge", "encode", "denoise", "decode", "finish"}


def test_alpha_and_depth_and_metadata_survive(pocket: Upscaler, rng: np.random.Generator) -> None:
    alpha = np.zeros((24, 30), np.uint16)
    alpha[:, 10:] = 65535
    source = Picture(rng.integers(0, 65536, (24, 30, 3), dtype=np.uint16), alpha, b"profile", b"exif", (72, 72))
    result = pocket(source, QUICK).picture
    assert result.rgb.dtype == np.uint16 and result.rgb.shape == (96, 120, 3)
    assert result.alpha is not None and result.alpha.shape == (96, 120)
    assert (result.alpha[:, :30] == 0).all() and (result.alpha[:, 50:] == 65535).all()
    assert (result.icc, result.exif, result.dpi) == (b"profile", b"exif", (72, 72))
    assert len(np.unique(result.rgb)) > 256


def test_an_automatically_loaded_bundle_and_a_path_work(
    tiny_bundle: Path, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEESR_WEIGHTS", str(tiny_bundle))
    photo.save(tmp_path / "photo.png")
    result = Upscaler.load(device="cpu")(tmp_path / "photo.png", QUICK)
    assert result.metrics["bundle"] == "tiny" and result.image.size == (256, 192)


def test_a_kl_autoencoder_bundle_with_epsilon_prediction_works(tiny_upscaler: Upscaler, photo: Image.Image) -> None:
    first = pixels(tiny_upscaler, photo, num_inference_steps=2)
    np.testing.assert_array_equal(first, pixels(tiny_upscaler, photo, num_inference_steps=2))
    assert (first != pixels(tiny_upscaler, photo, num_inference_steps=2, seed=2)).any()


def test_values_that_are_not_finite_fail(tiny_bundle: Path, photo: Image.Image) -> None:
    broken = Upscaler.load(tiny_bundle, device="cpu")
    with torch.no_grad():
        broken.networks.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        broken(photo, QUICK)


def test_a_flat_result_of_a_picture_fails(tiny_bundle: Path, photo: Image.Image) -> None:
    broken = Upscaler.load(tiny_bundle, device="cpu")
    with torch.no_grad():
        broken.networks.vae.decoder.conv_out.weight.zero_()
    with pytest.raises(RuntimeError, match="one flat colour"):
        broken(photo, dataclasses.replace(QUICK, color_fix="none"))


def test_a_flat_picture_stays_one(pocket: Upscaler) -> None:
    off = np.abs(pixels(pocket, Image.new("RGB", (64, 48), (90, 120, 150))).astype(int) - (90, 120, 150))
    assert off[32:-32, 32:-32].max() <= 4  # convolutions see zeros beyond the border
    assert off.mean() <= 1
