"""Reads 16-bit images without the reduction to 8 bits that Pillow makes."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

DEEP = {"LA", "RGB", "RGBA"}  # modes that Pillow cuts to 8 bits
PHOTOMETRIC, BITS_PER_SAMPLE = 262, 258  # numbers of TIFF tags


def deep_grey(image: Image.Image) -> NDArray[np.uint16]:
    """[H, W, 3 or 4] of a Pillow image of 16-bit grey."""
    grey = np.asarray(image).astype(np.uint16)
    tags: Any = image.tag_v2 if image.format == "TIFF" else {}  # pyright: ignore[reportAttributeAccessIssue]
    if tags.get(BITS_PER_SAMPLE) == (12,):
        grey = (grey.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    if tags.get(PHOTOMETRIC) == 0:
        grey = 65535 - grey
    clear = image.info.get("transparency")  # one value that is invisible
    layers = [grey] * 3 + ([np.where(grey == clear, 0, 65535).astype(np.uint16)] if clear is not None else [])
    return np.stack(layers, axis=2)


def deep_png(image: Image.Image, data: bytes, warnings: list[str]) -> NDArray[np.uint16] | None:
    """[H, W, 3 or 4] of a PNG with 16 bits per colour, read by OpenCV; None for any other."""
    if data[24] != 16 or image.mode not in DEEP:  # in IHDR
        return None
    deep: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is not None and deep.dtype == np.uint16 and deep.ndim == 3:
        order = cv2.COLOR_BGRA2RGBA if deep.shape[2] == 4 else cv2.COLOR_BGR2RGB
        deep = cv2.cvtColor(deep, order)[..., : 4 if image.has_transparency_data else 3]
        if agree(deep, image):
            return deep
    warnings.append("the 16 bits per colour cannot be read; 8 bits are used")
    return None


def agree(deep: NDArray[np.uint16], image: Image.Image) -> bool:
    """Whether the colours of some rows are those that Pillow read."""
    for row in np.linspace(0, image.height - 1, 16).astype(int):
        shown = image.crop((0, row, image.width, row + 1)).convert("RGB")
        if not np.array_equal(deep[row, :, :3] >> 8, np.asarray(shown)[0]):
            return False
    return True
