"""Flat areas of the input stay flat, and nothing else changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from seesr import Settings, Upscaler
from seesr.images.image_data import ImageData, Pixels, resize
from seesr.pipeline import postprocess

QUICK = Settings(num_inference_steps=1, seed=1, latent_tiled_size=32)
FAR = 11  # input pixels from the product, from 2x on


@pytest.fixture(scope="module")
def product(photo: Image.Image) -> Pixels:
    """A soft-edged disc of photograph on white, 64x64."""
    y, x = np.mgrid[:64, :64]
    disc = ((y - 28) ** 2 + (x - 26) ** 2 < 14**2).astype(np.float32)
    inside = cv2.GaussianBlur(disc, (0, 0), 0.8)[..., None]
    texture = np.asarray(photo.resize((64, 64)))
    return (255 + inside * (texture - 255.0)).round().astype(np.uint8)


def upscaled(pocket: Upscaler, rgb: Pixels, **changes: Any) -> Pixels:
    return pocket(ImageData(rgb), dataclasses.replace(QUICK, **changes)).image_data.rgb


def at_distance(rgb: Pixels, pixels: int, size: tuple[int, int]) -> np.ndarray:
    """Where white lies at least `pixels` input pixels from any other color, [H, W] bool at `size`."""
    other = (rgb != 255).any(2).astype(np.uint8)
    near = cv2.dilate(other, np.ones((2 * pixels + 1, 2 * pixels + 1)))
    return resize(255 * near, size, Image.Resampling.NEAREST) == 0


@pytest.mark.parametrize("color", [(0, 0, 0), (128, 128, 128), (255, 255, 255), (255, 0, 0)], ids=str)
@pytest.mark.parametrize("color_fix", ["wavelet", "none"])
def test_a_flat_image_stays_flat(pocket: Upscaler, color: tuple[int, int, int], color_fix: str) -> None:
    result = upscaled(pocket, np.full((12, 16, 3), color, np.uint8), color_fix=color_fix)
    assert (result == color).all()


def test_sixteen_bits_stay_flat(pocket: Upscaler) -> None:
    assert (upscaled(pocket, np.full((12, 16, 3), 40000, np.uint16)) == 40000).all()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("color_fix", ["wavelet", "adain", "none"])
def test_a_white_background_stays_white(pocket: Upscaler, product: Pixels, scale: int, color_fix: str) -> None:
    result = upscaled(pocket, product, scale_factor=scale, color_fix=color_fix)
    far = at_distance(product, FAR, result.shape[1::-1])
    assert far.mean() > 0.1 and (result[far] == 255).all()


def test_no_edge_shows_where_the_flat_area_begins(pocket: Upscaler) -> None:
    """Pure red beside texture, without color fix."""
    red = np.full((48, 64, 3), (255, 0, 0), np.uint8)
    red[:, :12] = np.random.default_rng(0).integers(0, 256, (48, 12, 3))
    result = upscaled(pocket, red, color_fix="none").astype(int)
    ramp = result[40:-40, 4 * (12 + postprocess.FLAT_MARGIN) :]
    assert np.abs(ramp - (255, 0, 0)).max() >= 3  # the ramp has something to hide
    assert np.abs(np.diff(ramp.mean(0), axis=0)).max() <= 2


def test_what_is_not_flat_keeps_its_bytes(
    pocket: Upscaler, photo: Image.Image, product: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    texture = np.asarray(photo)
    ruled = upscaled(pocket, texture), upscaled(pocket, product)
    monkeypatch.setattr(postprocess, "textured", lambda *args: None)
    free = upscaled(pocket, texture), upscaled(pocket, product)
    np.testing.assert_array_equal(ruled[0], free[0])
    near = ~at_distance(product, postprocess.FLAT_MARGIN + 1, ruled[1].shape[1::-1])
    np.testing.assert_array_equal(ruled[1][near], free[1][near])
    assert (ruled[1] != free[1]).any()


def test_a_blocky_jpeg_has_no_flat_areas(rng: np.random.Generator) -> None:
    blocks = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    assert postprocess.textured(blocks, 4) is None


@pytest.mark.parametrize("strip", [16, 512])
def test_strips_join(strip: int, product: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = postprocess.textured(product, 4)
    monkeypatch.setattr("seesr.images.color.STRIP", strip)
    np.testing.assert_array_equal(postprocess.textured(product, 4), whole)
