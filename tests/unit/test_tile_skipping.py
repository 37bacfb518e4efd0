"""Tiles that are not denoised: which latent pixels a result needs, and which tiles these need."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from seesr import Settings
from seesr.pipeline import tile_skipping
from seesr.pipeline.tile_skipping import bounds, by_step, needed, open_latent_pixels, overlap, pixel_reach, visible_part
from seesr.runtime.tiling import Tile, grid

ROW = [Tile(0, 3 * n, 4, 3 * n + 4) for n in range(5)]  # each overlaps its neighbours by one


@pytest.mark.parametrize(("scale", "blur"), [(1.0, 3), (2.0, 5), (2.3, 6), (4.0, 9)])
def test_a_pixel_depends_on_the_color_fix_and_on_the_blur_of_fidelity(scale: float, blur: int) -> None:
    """Five blurs reach 1 + 2 + 4 + 8 + 16 pixels; the Gaussian has a sigma of half the scale and ends at 4 sigma."""
    assert pixel_reach(Settings(), scale) == 31
    assert pixel_reach(Settings(fidelity=0.5), scale) == 31 + blur


@pytest.mark.parametrize(
    ("region", "size", "expected"),
    [
        (None, (50, 100), None),
        ("100,50,60,40", (50, 100), Tile(4, 17, 31, 48)),
        ("100,50,60,40", (30, 40), Tile(4, 17, 30, 40)),
        ("0,0,20,20", (50, 100), Tile(0, 0, 13, 13)),
        ("31,35,1,1", (50, 100), Tile(1, 0, 17, 16)),
    ],
)
def test_the_latent_pixels_of_a_region(region: str | None, size: tuple[int, int], expected: Tile | None) -> None:
    assert visible_part(Settings(region=region), 4.0, 4, size) == expected


def test_bounds_hold_all_tiles() -> None:
    assert bounds([Tile(3, 9, 5, 12), Tile(2, 10, 4, 15), Tile(4, 11, 9, 13)]) == Tile(2, 9, 9, 15)
    assert bounds(ROW[:1]) == ROW[0]


@pytest.mark.parametrize("value", [1, 255])
@pytest.mark.parametrize("reach", [0, 1, 2])
def test_latent_pixels_near_one_that_is_not_black_are_open(value: int, reach: int) -> None:
    mask = np.zeros((26, 31), np.uint8)  # what is beyond the last whole latent pixel does not count
    mask[9, 14] = value
    mask[25, 30] = 255
    expected = np.zeros((6, 7), bool)
    expected[2 - reach : 3 + reach, 3 - reach : 4 + reach] = True
    np.testing.assert_array_equal(open_latent_pixels(mask, 4, reach), expected)


def test_tiles_overlap_where_they_share_a_latent_pixel() -> None:
    tile = Tile(4, 4, 8, 8)
    for other, expected in (
        (tile, True), (Tile(7, 7, 9, 9), True), (Tile(0, 0, 5, 5), True), (Tile(7, 0, 9, 5), True),
        (Tile(8, 4, 12, 8), False), (Tile(4, 8, 8, 12), False), (Tile(0, 4, 4, 8), False), (Tile(4, 0, 8, 4), False),
    ):  # fmt: skip
        assert overlap(tile, other) == overlap(other, tile) == expected


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_earlier_steps_need_the_tiles_that_later_ones_overlap(steps: int) -> None:
    open_pixels = np.zeros((4, 16), bool)
    open_pixels[2, 1] = True
    schedule = by_step(ROW, open_pixels, steps)
    assert schedule == [ROW[: min(5, steps - step)] for step in range(steps)]
    open_pixels[:] = False
    assert by_step(ROW, open_pixels, steps) == [[]] * steps


TILES = grid(32, 96, 32, 8)
SIZE, PADDED = (384, 128), (128, 384)  # 4 pixels each latent pixel; (width, height) and (height, width)


def of(mask: np.ndarray | None = None, halo: int | None = 2, steps: int = 1, **changes: Any) -> list[list[Tile]]:
    return needed(halo, Settings(**changes), steps, mask, TILES, SIZE, PADDED, 4.0)


def test_all_tiles_are_needed_where_pixels_depend_on_the_whole_image() -> None:
    mask = np.zeros((128, 384), np.uint8)
    mask[:, :40] = 255
    assert of() == of(np.zeros((9, 27), np.uint8) + 1, halo=None) == []
    assert of(mask, halo=None) == of(mask, color_fix="adain") == of(mask, use_kds=True) == []
    assert of(mask) == of(mask, use_kds=True, num_particles=1) == [TILES[:1]]
    assert len(TILES) == 4


@pytest.mark.parametrize("steps", [1, 3])
def test_no_tile_is_needed_where_the_model_changes_nothing(steps: int) -> None:
    black = np.zeros((9, 27), np.uint8)
    for none in (of(black, steps=steps), of(fidelity=1, steps=steps), of(black, halo=None, steps=steps)):
        assert none == [[]] * steps
    assert of(black + 1, steps=steps) == [TILES] * steps


@pytest.mark.parametrize(("right", "count"), [(32, 1), (44, 1), (45, 2), (216, 3), (217, 4)])
def test_the_reach_is_counted_in_latent_pixels(right: int, count: int) -> None:
    """2 of the autoencoder and 31 pixels, which are 8; the second tile begins at 21."""
    region = f"0,0,{right},8"
    last = -(-right // 4) - 1 + 2 + 8
    assert len(of(region=region)[0]) == sum(tile.left <= last for tile in TILES) == count


def test_a_mask_counts_within_the_region_alone() -> None:
    mask = np.zeros((128, 384), np.uint8)
    mask[:, 380:] = 255
    assert of(mask) == [TILES[-1:]]
    assert of(mask, region="0,0,40,40") == [[]] and of(mask, region="0,0,384,40") == [TILES[-1:]]


def test_the_mirrored_border_is_needed_with_the_edge_beside_it() -> None:
    """The last latent pixel holds one column of the image; the others mirror it."""
    mask = np.zeros((128, 381), np.uint8)
    mask[:, 380:] = 255
    result = needed(0, Settings(color_fix="none"), 1, mask, TILES, (381, 128), PADDED, 4.0)
    assert result == [TILES[-1:]]
    assert tile_skipping.pixel_reach(Settings(color_fix="none"), 4.0) == 31
