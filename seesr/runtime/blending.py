"""Overlapping tiles of one image: run in batches, weighted and averaged."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from seesr.runtime.tiling import Place, Tile, batches

Run = Callable[[list[Place]], Tensor]  # a batch of places -> [places, C, h, w]
Execute = Callable[[Run, list[list[Place]]], Iterable[Tensor]]  # the results of batches, in their order


def window(height: int, width: int) -> Tensor:
    """Symmetric, smooth tile weights [height, width] (Hann, never zero), float32."""
    rows, columns = (torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square() for n in (height, width))
    return rows[:, None] * columns[None, :]


def blend(
    fn: Run,
    tiles: list[Tile],
    shape: Sequence[int],
    batch: int,
    weight: Tensor,
    finished: Callable[[int], object] = lambda count: None,
    execute: Execute = map,
) -> Tensor:
    """Runs `fn` over batches of places and averages its results where tiles overlap.

    Args:
        fn: takes places, at most `batch`, and returns [places, C, h, w]. Their numbers are those of `batches`; a
            last batch that is not full repeats its last place.
        tiles: the tiles of one image, all of one shape.
        shape: [N, C, H, W] of the whole.
        weight: [h, w], relative weight of every latent pixel of a tile; see `window`.
        finished: called after every batch with the number of places in it, without padding.
        execute: runs `fn` over the batches, in any order, and gives the results in their order.

    Returns:
        [N, C, H, W] in float32.
    """
    count, _, height, width = shape
    share = torch.zeros(height, width, dtype=torch.float32, device=weight.device)
    for tile in tiles:
        tile.crop(share).add_(weight)
    places = [(n, tile) for n in range(count) for tile in tiles]
    total = torch.zeros(tuple(shape), dtype=torch.float32, device=weight.device)
    sizes = batches(len(places), batch)
    groups = [places[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    padded = [[*group, *[group[-1]] * (size - len(group))] for size, group in zip(sizes, groups, strict=True)]
    for group, results in zip(groups, execute(fn, padded), strict=True):
        for (n, tile), result in zip(group, results, strict=False):
            tile.crop(total[n]).add_(result.float() * (weight / tile.crop(share)))
        finished(len(group))
    return total


def covered(tiles: Sequence[Tile], z: Tensor) -> Tensor:
    """Where a tile lies, bool, the shape of z [N, C, h, w]."""
    mask = torch.zeros_like(z, dtype=torch.bool)
    for tile in tiles:
        tile.crop(mask).fill_(True)
    return mask
