"""Runs the tagger on the original image: tags and image tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seesr.images.image_data import Pixels
from seesr.networks.tagger import Tagger
from seesr.runtime.memory import Budget
from seesr.runtime.precision import check_finite, retry_in_float32

LARGE = 2**22  # pixels of an image that is shrunk before it is moved


def tag(tagger: Tagger, rgb: Pixels, budget: Budget) -> tuple[list[str], Tensor]:
    """The input at its original size, [H, W, 3] -> tags, image tokens [1, n, width].

    Raises:
        NotFinite: in single precision too.
    """
    device = tagger.image_proj.weight.device
    if rgb[..., 0].size > LARGE:
        pixels = shrunk(rgb, tagger.image_size).to(device)
    else:
        pixels = to_floats(torch.tensor(rgb).to(device))

    def work() -> tuple[list[str], Tensor]:
        tags, tokens = tagger(pixels)
        check_finite(tokens, "tags")
        return tags, tokens

    return retry_in_float32(work, budget, tagger)


def to_floats(rgb: Tensor) -> Tensor:
    """Integers [H, W, 3] -> [1, 3, H, W] in [0, 1], float32."""
    return (rgb.float() / torch.iinfo(rgb.dtype).max).permute(2, 0, 1)[None].contiguous()


def shrunk(rgb: Pixels, size: int) -> Tensor:
    """[H, W, 3] integers -> [1, 3, size, size] in [0, 1], resized by the bilinear filter of the tagger's `preprocess`.

    Reads four pixels for each pixel of the result, so a large image is neither moved to the device nor held in floats.
    """

    def between(side: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[Any]]:
        at = ((np.arange(size) + 0.5) * (side / size) - 0.5).clip(0)
        low = at.astype(np.intp)
        return low, np.minimum(low + 1, side - 1), (at - low).astype(np.float32)[:, None]

    (top, bottom, down), (left, right, across) = (between(side) for side in rgb.shape[:2])

    def row(y: NDArray[np.intp]) -> NDArray[Any]:
        first, second = (rgb[np.ix_(y, x)].astype(np.float32) for x in (left, right))
        return first + (second - first) * across

    upper, lower = row(top), row(bottom)
    resized = torch.from_numpy((upper + (lower - upper) * down[:, None]) / np.iinfo(rgb.dtype).max)
    return resized.float().permute(2, 0, 1)[None].contiguous()
