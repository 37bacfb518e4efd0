"""Pixel positions: padding of thin images, and registration at every scale."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from seesr import Progress, Settings, Upscaler
from seesr.images.image_data import ImageData, Pixels, resize
from seesr.pipeline.pipeline import UpscaleRun

QUICK = Settings(num_inference_steps=1, seed=1, latent_tiled_size=64)


@pytest.mark.parametrize(
    ("size", "latent_pixels"),
    [
        ((1000, 1), 1000 * 8),  # a whole tile would make it 64000
        ((1, 1000), 1000 * 8),
        ((1000, 16), 1000 * 16),
        ((1000, 17), 1000 * 64),  # as before
        ((64, 1), 64 * 64),  # fits into one tile, as before
        ((24, 18), 64 * 64),
    ],
)
def test_a_thin_image_is_padded_to_an_eighth_of_a_tile(
    pocket: Upscaler, size: tuple[int, int], latent_pixels: int
) -> None:
    width, height = size
    image = ImageData(np.zeros((height, width, 3), np.uint8))
    settings = dataclasses.replace(QUICK, scale_factor=pocket.networks.factor)  # one latent pixel for each pixel
    conditioning = UpscaleRun(pocket.networks, settings, image, Progress()).enlarge()[0]
    assert conditioning.shape[0] * conditioning.shape[1] // pocket.networks.factor**2 == latent_pixels


def test_a_thin_image_comes_out_at_its_size_and_like_its_upscale(pocket: Upscaler) -> None:
    ramp = np.linspace(20, 230, 150).astype(np.uint8)[None, :, None].repeat(2, 0).repeat(3, 2)
    result = pocket(ImageData(ramp), QUICK)
    assert result.image_data.size == (600, 8) and result.metrics["tiles"] == 3
    bicubic = resize(ramp, (600, 8)).astype(float)
    assert np.abs(result.image_data.rgb - bicubic).mean() < 4


def rectangles(height: int, width: int, scale: float, seed: int) -> NDArray[np.uint8]:
    """Grey rectangles at random places, drawn at `scale` from 8x8 samples for each pixel, [H, W, 3]."""
    rng, samples = np.random.default_rng(seed), 8 * scale
    fine = np.full((round(height * samples), round(width * samples)), 128, np.float32)
    for _ in range(40):
        top, left = rng.uniform(-4, height), rng.uniform(-4, width)
        bottom, right = np.array([top, left]) + rng.uniform(4, 16, 2)
        rows, columns = (slice(*(max(0, round(e * samples)) for e in pair)) for pair in ((top, bottom), (left, right)))
        fine[rows, columns] = rng.uniform(30, 225)
    size = round(width * scale), round(height * scale)
    return np.dstack([cv2.resize(fine, size, interpolation=cv2.INTER_AREA).round().astype(np.uint8)] * 3)


def shift(moved: Pixels, still: Pixels) -> NDArray[np.float64]:
    """How far `moved` is shifted against `still`, (down, right) pixels, by least squares on the gradient.

    Phase correlation would weight all frequencies alike, and at 8x most of them hold none of the input.
    """
    inner = np.s_[8:-8, 8:-8]
    ours, truth = (image.mean(2) for image in (moved, still))
    slopes = np.stack([slope[inner].ravel() for slope in np.gradient(truth)], axis=1)
    return np.linalg.lstsq(slopes, (truth - ours)[inner].ravel(), rcond=None)[0]


def test_a_shift_is_measured() -> None:
    fine = rectangles(40, 48, 8, 0)
    moved = cv2.warpAffine(fine, np.array([[1, 0, 0.3], [0, 1, -0.2]]), fine.shape[1::-1])
    assert shift(moved, fine) == pytest.approx((-0.2, 0.3), abs=0.05)


@pytest.mark.parametrize("scale", [1, 1.5, 2, 3, 4, 8])
def test_edges_stay_where_they_are_at_every_scale(pocket: Upscaler, scale: float) -> None:
    low, high = (rectangles(40, 48, factor, 1) for factor in (1, scale))
    result = pocket(ImageData(low), dataclasses.replace(QUICK, scale_factor=scale))
    assert np.abs(shift(resize(low, high.shape[1::-1]), high)).max() < 0.1
    assert np.abs(shift(result.image_data.rgb, high)).max() < 0.1
