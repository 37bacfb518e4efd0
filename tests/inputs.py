"""Files by other programs with the pixels that an independent reader sees (tests/data/inputs/README.md)."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from seesr.images.image_data import ImageData

FOLDER = Path(__file__).parent / "data/inputs"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
LOSSY = {".jpg", ".avif", ".heic"}
JXL_LOSSY = {"cjxl-from-jpeg.jxl", "cjxl-orientation-6.jxl"}
GREY = ("grey", "bilevel", "miniswhite")
REDUCED = ("cmyk", "lab")  # converted with 8 bits


@functools.cache
def arrays() -> dict[str, NDArray[np.integer]]:
    """The distinct arrays of pixels, [H, W, 3 or 4], uint8 or uint16, by name."""
    with np.load(FOLDER / "expected.npz") as file:
        return dict(file)


def is_grey(name: str) -> bool:
    """Whether the file has one channel of color."""
    return any(part in name for part in GREY)


def is_deep(name: str) -> bool:
    """Whether the file has more than 8 bits per color, and is read with them.

    ImageMagick writes a grey ramp of 8-bit values with 8 bits although it is asked for 16.
    """
    data = (FOLDER / name).read_bytes()
    if any(part in name for part in REDUCED) or (name.endswith(".png") and data[24] < 16):
        return False
    return any(part in name for part in ("-16", "-10", "12bit", "float", "half", "thumbnail-first"))


def shown(image: ImageData) -> NDArray[np.floating]:
    """[H, W, 3] as sRGB, floats from 0 to 255."""
    rgb = image.rgb / (257 if image.rgb.dtype == np.uint16 else 1)
    if image.icc is None:
        return rgb
    profile, srgb = ImageCms.ImageCmsProfile(io.BytesIO(image.icc)), ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(Image.fromarray(rgb.round().astype(np.uint8)), profile, srgb)
    return np.asarray(converted).astype(float)


def check_pixels(name: str, image: ImageData) -> None:
    """Asserts that an image has the size, colors and alpha that an independent reader sees in the file `name`."""
    expected = arrays()[EXPECTED[name]]
    expected = expected / (257 if expected.dtype == np.uint16 else 1)
    result = shown(image)
    assert result.shape[:2] == expected.shape[:2], name
    difference = np.abs(result - expected[..., :3])
    lab = "lab" in name  # D50 or D65: programs do not agree
    lossy = Path(name).suffix in LOSSY or name in JXL_LOSSY or "lossy" in name
    maximum, mean = (32, 4) if lab else (24, 1) if lossy else (2.1, 0.4)
    assert difference.max() <= maximum and difference.mean() <= mean, name
    assert (image.alpha is not None) == (expected.shape[2] == 4), name
    if image.alpha is not None:
        alpha = image.alpha / (257 if image.alpha.dtype == np.uint16 else 1)
        assert np.abs(alpha - expected[..., 3]).max() <= 0.01, name
