"""Pictures of 16 bits per colour, which Pillow would cut to 8: read by OpenCV where both see the same."""

from __future__ import annotations

import logging
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

DEEP = {"LA", "RGB", "RGBA"}  # modes that OpenCV can read
MEANING, DEPTH, PLANES = 262, 258, 284  # tags of a TIFF: what 0 means, bits per colour, how colours lie
log = logging.getLogger(__name__)


def read_deep(opened: Image.Image, data: bytes | None) -> NDArray[np.uint16] | None:
    """[H, W, 3 or 4] of a 16-bit PNG or TIFF, which Pillow would cut to 8 bits; None for any other picture.

    Raises:
        ValueError: damaged, or a TIFF that neither decoder reads right.
    """
    if opened.mode.startswith("I;16"):
        grey = np.asarray(opened).astype(np.uint16)
        if tiff_tag(opened, DEPTH) == (12,):
            grey = (grey.astype(np.uint32) * 65535 // 4095).astype(np.uint16)
        if tiff_tag(opened, MEANING) == (0,):
            grey = 65535 - grey
        clear = opened.info.get("transparency")  # one value that is invisible
        layers = [grey] * 3 + ([np.where(grey == clear, 0, 65535).astype(np.uint16)] if clear is not None else [])
        return np.stack(layers, axis=2)
    if data is None or depth(opened, data) != 16:
        return None
    if tiff_tag(opened, PLANES) == (2,):
        raise ValueError("a TIFF of 16 bits with its colours one after the other cannot be read: interleave them")
    deep: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if opened.mode in DEEP else None
    if deep is not None and deep.dtype == np.uint16 and deep.ndim == 3:
        order = cv2.COLOR_BGRA2RGBA if deep.shape[2] == 4 else cv2.COLOR_BGR2RGB
        deep = cv2.cvtColor(deep, order)[..., : 4 if opened.has_transparency_data else 3]
        if agree(deep, opened):
            return deep
    log.warning("the picture's 16 bits per colour cannot be read; 8 are taken")
    return None


def agree(deep: NDArray[np.uint16], opened: Image.Image) -> bool:
    """Whether the colours of some rows are those that Pillow read, which knows premultiplied alpha."""
    for row in np.linspace(0, opened.height - 1, 16).astype(int):
        shown = opened.crop((0, row, opened.width, row + 1)).convert("RGB")
        if not np.array_equal(deep[row, :, :3] >> 8, np.asarray(shown)[0]):
            return False
    return True


def depth(opened: Image.Image, data: bytes) -> int:
    """Bits per colour as the file says."""
    return data[24] if opened.format == "PNG" else max(tiff_tag(opened, DEPTH) or (8,))  # in IHDR


def tiff_tag(opened: Image.Image, number: int) -> tuple[int, ...]:
    """The values of a tag; none where it is missing, or the file is no TIFF."""
    values: Any = opened.tag_v2.get(number, ()) if opened.format == "TIFF" else ()  # pyright: ignore
    return values if isinstance(values, tuple) else (values,)
