"""Tile geometry for every network: evenly spread tiles of one shape, batched and blended."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """A rectangle in elements of the array that is tiled: latent pixels for the denoiser."""

    top: int
    left: int
    bottom: int
    right: int

    def scaled(self, factor: int) -> Tile:
        """The same place on a grid `factor` times finer."""
        return Tile(*(side * factor for side in self))

    def moved(self, down: int, right: int) -> Tile:
        """The same rectangle at another place."""
        return Tile(self.top + down, self.left + right, self.bottom + down, self.right + right)

    def grown(self, margin: int, height: int, width: int) -> Tile:
        """The rectangle with a margin on all sides, as far as [height, width] reaches."""
        top, left = max(0, self.top - margin), max(0, self.left - margin)
        return Tile(top, left, min(height, self.bottom + margin), min(width, self.right + margin))

    def crop(self, array: Tensor) -> Tensor:
        """The view of [..., H, W] under this tile."""
        return array[..., self.top : self.bottom, self.left : self.right]


BATCHES = (1, 4, 5, 8)
ATTENTION_AREA = 15_600  # latent pixels at which attention costs the full networks as much as everything else
PASS = 0.5  # what a forward pass costs beside its tiles, in tiles
Place = tuple[int, Tile]  # (index of the image in a batch, tile)
Run = Callable[[list[Place]], Tensor]  # a batch of places -> [places, C, h, w]
Execute = Callable[[Run, list[list[Place]]], Iterable[Tensor]]  # the results of batches, in their order


def offsets(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of the fewest tiles that cover `size` with at least `overlap` in common, evenly spread.

    Raises:
        ValueError: the overlap leaves no room to advance.
    """
    if not 0 <= overlap < tile:
        raise ValueError(
            f"a tile overlap of {overlap} does not work with tiles of {tile}: it must be from 0 to {tile - 1}"
        )
    if size <= tile:
        return [0]
    count = math.ceil((size - overlap) / (tile - overlap))
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def grid(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """Tiles in reading order, all min(tile, height) x min(tile, width)."""
    tall, wide = min(tile, height), min(tile, width)
    return [
        Tile(top, left, top + tall, left + wide)
        for top in offsets(height, tile, overlap)
        for left in offsets(width, tile, overlap)
    ]


def least_work(height: int, width: int, sides: Sequence[int], overlap: int) -> int:
    """The one of `sides` whose tiles of [height, width] cost a denoiser the least; the first of equal ones.

    Raises:
        ValueError: the overlap leaves no room to advance at any of these sides.
    """

    def cost(side: int) -> float:
        tiles = grid(height, width, side, overlap)
        area = (tiles[0].bottom - tiles[0].top) * (tiles[0].right - tiles[0].left)
        return len(tiles) * area * (1 + area / ATTENTION_AREA)

    return min([side for side in sides if side > overlap] or sides, key=cost)


def cores(tiles: list[Tile]) -> list[Tile]:
    """The core of every tile of a grid: overlaps are halved, so that each latent pixel belongs to one tile."""

    def bounds(spans: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
        ordered = sorted(spans)
        cuts = [(end + start) // 2 for (_, end), (start, _) in itertools.pairwise(ordered)]
        return dict(zip(ordered, zip([ordered[0][0], *cuts], [*cuts, ordered[-1][1]], strict=True), strict=True))

    rows = bounds({(tile.top, tile.bottom) for tile in tiles})
    columns = bounds({(tile.left, tile.right) for tile in tiles})
    parts: list[Tile] = []
    for tile in tiles:
        (top, bottom), (left, right) = rows[tile.top, tile.bottom], columns[tile.left, tile.right]
        parts.append(Tile(top, left, bottom, right))
    return parts


def window(height: int, width: int) -> Tensor:
    """Symmetric, smooth tile weights [height, width] (Hann, never zero), float32."""
    rows, columns = (torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square() for n in (height, width))
    return rows[:, None] * columns[None, :]


@functools.cache
def batches(count: int, maximum: int) -> tuple[int, ...]:
    """Sizes of the batches that take `count` tiles in the least time, none above `maximum`.

    Sizes come from BATCHES, for which the networks can be recorded; every batch costs PASS tiles more than it holds.
    A batch may hold one tile more than there are: seven take one of 8.
    """
    sizes = [size for size in BATCHES if size <= maximum]
    full = max(0, count - 8 * sizes[-1]) // sizes[-1]  # of many, most batches are of the largest size
    best: list[tuple[float, int, list[int]]] = [(0.0, 0, [])]  # cost, number of batches, their sizes
    for n in range(1, count - full * sizes[-1] + 1):
        ways = [(best[max(0, n - size)], size) for size in sizes]
        best.append(
            min((cost + size + PASS, number + 1, sorted([size, *rest])[::-1]) for (cost, number, rest), size in ways)
        )
    return (*[sizes[-1]] * full, *best[-1][2])


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
