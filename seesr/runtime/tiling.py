"""Tile geometry for every network: evenly spread tiles of one shape, and the sizes of their batches."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # planning reads this module, and must not load torch
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
PAIRS = 2**36  # query-key pairs in the middle attention: all up to 4096 x 4096 pixels; above, keys are subsampled
PASS = 0.5  # what a forward pass costs beside its tiles, in tiles
Place = tuple[int, Tile]  # (index of the image in a batch, tile)


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


def stride(size: tuple[int, int]) -> int:
    """Of the keys of an image of `size` = (height, width) latent pixels, each way."""
    result, latent_pixels = 1, size[0] * size[1]
    while latent_pixels * (size[0] // result) * (size[1] // result) > PAIRS:
        result += 1
    return result


def attention_keys(size: tuple[int, int]) -> int:
    """Number of keys that each latent pixel of an image attends to."""
    return (size[0] // stride(size)) * (size[1] // stride(size))
