"""One tiling combinator for every network: evenly spread tiles of one fixed shape, smoothly blended."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """A rectangle in cells of the array that is tiled."""

    top: int
    left: int
    bottom: int
    right: int

    def scaled(self, factor: int) -> Tile:
        """The same place on a grid `factor` times finer."""
        return Tile(*(side * factor for side in self))

    def crop(self, array: Tensor) -> Tensor:
        """The view of [..., H, W] under this tile."""
        return array[..., self.top : self.bottom, self.left : self.right]


Place = tuple[int, Tile]  # (index of the picture in a batch, tile)


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


def cores(tiles: list[Tile]) -> list[Tile]:
    """For every tile of a grid the part that it alone gives: overlaps are halved, so that each cell belongs to one."""

    def bounds(spans: set[tuple[int, int]]) -> dict[tuple[int, int], tuple[int, int]]:
        ordered = sorted(spans)
        cuts = [(end + start) // 2 for (_, end), (start, _) in itertools.pairwise(ordered)]
        return dict(zip(ordered, zip([ordered[0][0], *cuts], [*cuts, ordered[-1][1]], strict=True), strict=True))

    rows = bounds({(tile.top, tile.bottom) for tile in tiles})
    columns = bounds({(tile.left, tile.right) for tile in tiles})
    parts = []
    for tile in tiles:
        (top, bottom), (left, right) = rows[tile.top, tile.bottom], columns[tile.left, tile.right]
        parts.append(Tile(top, left, bottom, right))
    return parts


def window(height: int, width: int) -> Tensor:
    """Symmetric, smooth tile weights [height, width] (Hann, never zero), float32."""
    rows, columns = (torch.sin(math.pi * (torch.arange(n) + 0.5) / n).square() for n in (height, width))
    return rows[:, None] * columns[None, :]


def even(count: int, batch: int) -> int:
    """The size of batches, above half of `batch`, that needs the least filling: 25 by 8 are five of 5."""
    sizes = range(min(count, batch // 2 + 1), min(count, batch) + 1)
    return min(sizes, key=lambda size: (-count % size, -size))


def blend(
    fn: Callable[[list[Place]], Tensor],
    tiles: list[Tile],
    shape: Sequence[int],
    batch: int,
    weight: Tensor,
    finished: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Runs `fn` over batches of places and averages its results where tiles overlap.

    Args:
        fn: takes places, at most `batch`, and returns [places, C, h, w]. All batches are of one size, so that the
            network always sees one shape: a last, shorter one is filled up with its last place.
        tiles: the tiles of one picture, all of one shape.
        shape: [N, C, H, W] of the whole.
        weight: [h, w], relative weight of every cell of a tile; see `window`.
        finished: told after every batch how many places it finished, the filling left out.

    Returns:
        [N, C, H, W] in float32.
    """
    count, _, height, width = shape
    share = torch.zeros(height, width, dtype=torch.float32, device=weight.device)
    for tile in tiles:
        tile.crop(share).add_(weight)
    places = [(n, tile) for n in range(count) for tile in tiles]
    batch = even(len(places), batch)
    total = torch.zeros(tuple(shape), dtype=torch.float32, device=weight.device)
    for start in range(0, len(places), batch):
        group = places[start : start + batch]
        results = fn([*group, *[group[-1]] * (batch - len(group))])
        for (n, tile), result in zip(group, results, strict=False):
            tile.crop(total[n]).add_(result.float() * (weight / tile.crop(share)))
        finished(len(group))
    return total
