"""The end of the road: is it a picture at all, or only the input's colours; and floats -> integers."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from seesr.color import Rows, Strips, spans
from seesr.images.picture import Pixels
from seesr.precision import check_finite

BLOCK = 8  # pixels; noise averages out within one, and what a picture shows does not
LEAST_SLOPE = 1 / 255  # mean difference of neighbouring blocks below which the input is flat, and nothing can be said
LEAST_SHARE = 0.25  # of the input's slope that a decoder which works keeps


def check_alive(content: Rows, style: Rows, size: tuple[int, int]) -> None:
    """Refuses a decoder's own output, before any colour correction, that lacks the input's contrast.

    Compares the mean differences of neighbouring blocks of BLOCK x BLOCK pixels: a dead decoder, one that is constant
    in each tile, or one whose contrast collapsed has hardly any, where the enlarged input has some. Of pictures that
    are smaller than two blocks only a flat result is refused.

    Args:
        content: rows of the decoder's output, [1, 3, rows, W] nominally in [0, 1].
        style: the same rows of the enlarged input.
        size: (width, height) of the picture.

    Raises:
        RuntimeError: one line with the figures.
    """
    width, height = size
    side, share = (BLOCK, LEAST_SHARE) if min(size) >= 2 * BLOCK else (1, 0.0)
    slopes, count = [0.0, 0.0], 0
    for top, bottom, *_ in spans(height):
        if bottom - top < side:
            continue
        for index, rows in enumerate((content, style)):
            blocks = F.avg_pool2d(rows(top, bottom)[..., :width].clamp(0, 1), side)
            slopes[index] += sum(blocks.diff(dim=dim).abs().sum().item() for dim in (2, 3))
        count += 2 * blocks.numel()
    ours, asked = (slope / max(1, count) for slope in slopes)
    if asked >= LEAST_SLOPE and not ours > share * asked:
        words = f"{ours / asked:.0%} of the input's contrast"
        raise RuntimeError(f"the decoder gave no picture: {words}; nothing is returned")


def to_integers(strips: Strips, size: tuple[int, int], depth: DTypeLike) -> Pixels:
    """Corrected rows [1, 3, rows, W'] in [0, 1] -> [H, W, 3] of `size` = (width, height), over the range of `depth`.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    width, height = size
    rgb, most = np.empty((height, width, 3), depth), np.iinfo(depth).max  # type: ignore[type-var]
    for top, rows in strips:
        pixels = rows[0, :, : max(0, height - top), :width].permute(1, 2, 0)
        check_finite(pixels, "color")
        rgb[top : top + len(pixels)] = (pixels.clamp(0, 1) * most).round().cpu().numpy()
    return rgb


def to_map(spread: Tensor | None, factor: int, size: tuple[int, int]) -> NDArray[np.uint16] | None:
    """Spread per latent cell [h, w] -> a map of `size` = (width, height), 65535 for 1 or more; None passes."""
    if spread is None:
        return None
    width, height = size
    whole = F.interpolate(spread[None, None], scale_factor=factor, mode="bilinear")[0, 0]
    return (whole[:height, :width].clamp(max=1) * 65535).round().cpu().numpy().astype(np.uint16)
