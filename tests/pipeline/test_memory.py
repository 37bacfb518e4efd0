"""Peak memory depends on the tiles, not on the image."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from scripts.cog_server import ROOT

PROGRAM = """
import resource, sys
import numpy as np
from seesr import Settings, Upscaler
from seesr.networks import weights
from seesr.images.image_data import ImageData
side = int(sys.argv[1])
rgb = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)
upscaler = Upscaler.load(weights.POCKET, "cpu")
result = upscaler(ImageData(rgb), Settings(num_inference_steps=1, seed=1))
_ = result.data
assert result.image_data.size == (side, side)
config = upscaler.networks.unet.config
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, config["in_channels"], upscaler.networks.factor)
"""


def peak(side: int) -> tuple[int, int]:
    """Peak bytes of one prediction, and the bytes of the buffers that are as large as the image."""
    command = [sys.executable, "-c", PROGRAM, str(side)]
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    maximum, channels, factor = map(int, completed.split())
    pixels = side * side
    latents = 4 * channels * pixels // factor**2  # float32
    # The enlarged input and the result, 3 bytes a pixel each; the decoded image in float32. Of the latents: the
    # noisy ones, the noise, the blended prediction and the clean ones made from them.
    return maximum, (3 + 3 + 12) * pixels + 4 * latents


def bounded(small: int, large: int) -> None:
    (least, small_buffers), (maximum, buffers) = peak(small), peak(large)
    figures = f"{small}: {least / 1e6:.0f} MB, {large}: {maximum / 1e6:.0f} MB, buffers {buffers / 1e6:.0f} MB"
    logging.getLogger(__name__).info(figures)
    assert maximum <= 1.5 * (least - small_buffers) + buffers, figures


@pytest.mark.long
def test_four_times_the_pixels_take_little_more_memory() -> None:
    bounded(512, 1024)


@pytest.mark.slow
def test_sixteen_times_the_pixels_take_little_more_memory() -> None:
    bounded(1024, 4096)
