"""The caller's mask of the region to enhance: reading, aspect check, resizing to the output."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seesr.images.image_data import Pixels, resize, to_uint8
from seesr.images.source import Source, load_source

SAME_ASPECT = 0.01  # relative difference of the aspect ratios of mask and image that counts as rounding
Grey = NDArray[np.uint8]  # [H, W]; 255: enhanced, 0: keeps the bicubic upscale


def read_mask(source: Source, size: tuple[int, int]) -> Grey:
    """A source of any kind -> a mask for an image of `size` = (width, height), at the mask's own resolution.

    Colors are converted to luma (BT.601); transparent parts count as black.

    Raises:
        ValueError: no image, animated, too large, or of another aspect; one line.
    """
    try:
        image = load_source(source).image_data
    except ValueError as error:
        raise ValueError(f"the mask cannot be used: {error}") from None
    check_aspect(image.size, size)
    grey: Grey = cv2.cvtColor(to_uint8(image.rgb), cv2.COLOR_RGB2GRAY)  # type: ignore[assignment]
    if image.alpha is not None:
        grey = (grey.astype(np.uint16) * to_uint8(image.alpha) // 255).astype(np.uint8)
    return grey


def check_aspect(mask: tuple[int, int], image: tuple[int, int]) -> None:
    """Refuses a mask of another aspect than the image; (width, height) each.

    Raises:
        ValueError: with both sizes.
    """
    if abs(mask[0] * image[1] / (mask[1] * image[0]) - 1) > SAME_ASPECT:
        raise ValueError(
            f"the mask is {mask[0]}x{mask[1]} and the image {image[0]}x{image[1]}: their aspect ratios differ"
        )


def at_size(mask: Grey, size: tuple[int, int]) -> Grey:
    """The mask at `size` = (width, height). Bilinear: an edge becomes soft, and nothing overshoots."""
    resized: Pixels = resize(mask, size, Image.Resampling.BILINEAR)
    return resized  # type: ignore[return-value]
