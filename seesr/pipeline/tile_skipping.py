"""Tiles that need no denoising: outside the region, black under a mask, or all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from seesr.images import color
from seesr.images.mask import Grey, at_size
from seesr.runtime.tiling import Tile
from seesr.settings import Settings


def needed(
    halo: int | None,
    settings: Settings,
    steps: int,
    mask: Grey | None,
    tiles: list[Tile],
    size: tuple[int, int],
    padded: tuple[int, ...],
    scale: float,
) -> list[list[Tile]]:
    """The tiles of every step where only some are needed; empty: all, always.

    Only where pixels elsewhere stay what they would be: without layers, colors and particles that see the whole.

    Args:
        halo: latent pixels around one that its image depends on; None: the autoencoder sees the whole image.
        size: (width, height) of the result.
        padded: (height, width) of the upscaled image with its mirrored border.
        scale: of the result.
    """
    if settings.fidelity == 1 or (mask is not None and not mask.any()):
        return [[]] * steps
    region = settings.rectangle
    partial = mask is not None or region is not None
    if not partial or settings.steered or settings.color_fix == "adain" or halo is None:
        return []
    factor = padded[0] // max(tile.bottom for tile in tiles)
    whole = np.full(size[::-1], 255, np.uint8) if mask is None else at_size(mask, size)
    border = [(0, side - unpadded) for side, unpadded in zip(padded, whole.shape, strict=True)]
    whole = np.pad(whole, border, mode="symmetric")
    if region is not None:
        inside, full = (slice(region.top, region.bottom), slice(region.left, region.right)), whole
        whole = np.zeros_like(full)
        whole[inside] = full[inside]
    reach = halo + -(-pixel_reach(settings, scale) // factor)
    return by_step(tiles, open_latent_pixels(whole, factor, reach), steps)


def pixel_reach(settings: Settings, scale: float) -> int:
    """How far a result's pixel depends on others after the decoder: color fix, and the blur of `fidelity`, pixels."""
    return color.REACH + (math.ceil(2 * scale) + 1 if settings.fidelity > 0 else 0)


def visible_part(settings: Settings, scale: float, factor: int, z_size: Sequence[int]) -> Tile | None:
    """The latent pixels that the region needs; None: all."""
    region = settings.rectangle
    if region is None:
        return None
    reach = pixel_reach(settings, scale)
    top, left = max(0, region.top - reach) // factor, max(0, region.left - reach) // factor
    bottom, right = (-(-(end + reach) // factor) for end in (region.bottom, region.right))
    return Tile(top, left, min(bottom, z_size[0]), min(right, z_size[1]))


def bounds(tiles: Sequence[Tile]) -> Tile:
    """The smallest rectangle that holds all tiles, of which there is at least one."""
    tops, lefts, bottoms, rights = zip(*tiles, strict=True)
    return Tile(min(tops), min(lefts), max(bottoms), max(rights))


def open_latent_pixels(mask: Grey, factor: int, reach: int) -> NDArray[np.bool_]:
    """[H, W] pixels -> [H/f, W/f] latent pixels: those within `reach` of them of a pixel that is not black."""
    height, width = (side // factor for side in mask.shape)
    open_pixels = mask[: height * factor, : width * factor].reshape(height, factor, width, factor).max((1, 3)) > 0
    return cv2.dilate(open_pixels.astype(np.uint8), np.ones((2 * reach + 1, 2 * reach + 1), np.uint8)) > 0


def by_step(tiles: Sequence[Tile], open_pixels: NDArray[np.bool_], steps: int) -> list[list[Tile]]:
    """The tiles that have to be denoised at every step, so that the open latent pixels come out as if all had been.

    At the last step those with an open latent pixel; before it also those that overlap one that is needed later.
    """
    last = [tile for tile in tiles if open_pixels[tile.top : tile.bottom, tile.left : tile.right].any()]
    schedule = [last]
    for _ in range(steps - 1):
        schedule.insert(0, [tile for tile in tiles if any(overlap(tile, other) for other in schedule[0])])
    return schedule


def overlap(a: Tile, b: Tile) -> bool:
    return a.top < b.bottom and b.top < a.bottom and a.left < b.right and b.left < a.right
