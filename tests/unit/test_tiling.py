"""Tile geometry: grids, sizes, overlaps and batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from seesr.runtime import blending, tiling


@pytest.mark.parametrize("size", [1, 15, 16, 17, 31, 40, 100, 257])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (16, 4), (16, 15), (64, 16)])
def test_tiles_cover_everything_and_are_evenly_spread(size: int, tile: int, overlap: int) -> None:
    starts = tiling.offsets(size, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] + tile >= size
    if len(starts) > 1:
        assert starts[-1] + tile == size
        common = [a + tile - b for a, b in itertools.pairwise(starts)]
        assert min(common) >= overlap
        assert max(common) - min(common) <= 1


@pytest.mark.parametrize(("tile", "overlap"), [(16, 16), (16, 20), (16, -1)])
def test_an_overlap_that_cannot_advance_is_refused(tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="overlap"):
        tiling.offsets(100, tile, overlap)


def test_offsets_are_the_fewest_and_exact() -> None:
    assert tiling.offsets(128, 64, 6) == [0, 32, 64] and tiling.offsets(122, 64, 6) == [0, 58]
    assert tiling.offsets(16, 16, 0) == [0] and tiling.offsets(32, 16, 0) == [0, 16]
    assert tiling.grid(20, 70, 64, 6) == [(0, 0, 20, 64), (0, 6, 20, 70)]


@pytest.mark.parametrize(("size", "tile", "overlap"), [((50, 70), 16, 4), ((16, 33), 16, 5), ((9, 9), 16, 4)])
def test_cores_meet_in_the_middle_of_overlaps_and_cover_each_latent_pixel_once(
    size: tuple[int, int], tile: int, overlap: int
) -> None:
    tiles, covered = tiling.grid(*size, tile, overlap), torch.zeros(size)
    for core, whole in zip(tiling.cores(tiles), tiles, strict=True):
        core.crop(covered).add_(1)
        assert whole.top <= core.top < core.bottom <= whole.bottom
        assert whole.left <= core.left < core.right <= whole.right
    assert (covered == 1).all()
    assert [core[0::2] for core in tiling.cores(tiling.grid(26, 8, 16, 6))] == [(0, 13), (13, 26)]


def test_batches_have_few_sizes_and_are_hardly_filled() -> None:
    results = [tiling.batches(count, 8) for count in (1, 2, 3, 4, 6, 7, 9, 16, 25)]
    assert results == [(1,), (1, 1), (4,), (4,), (5, 1), (8,), (5, 4), (8, 8), (8, 8, 5, 4)]
    assert tiling.batches(9, 4) == (4, 4, 1) and tiling.batches(3, 2) == (1, 1, 1) and tiling.batches(0, 8) == ()
    for count in range(1, 400):
        for maximum in tiling.BATCHES:
            sizes = tiling.batches(count, maximum)
            assert set(sizes) <= set(tiling.BATCHES) and max(sizes) <= maximum
            assert count <= sum(sizes) <= count + 1


@pytest.mark.parametrize(
    ("side", "expected"),
    [(32, 64), (64, 64), (68, 72), (122, 64), (128, 72), (256, 72), (512, 64), (1024, 64)],
)
def test_the_tile_side_with_the_least_work_is_chosen(side: int, expected: int) -> None:
    assert tiling.least_work(side, side, (64, 72), 6) == expected


def test_a_side_that_the_overlap_leaves_no_room_for_is_not_chosen() -> None:
    assert tiling.least_work(122, 122, (16, 64), 16) == 64
    with pytest.raises(ValueError, match="overlap of 64 does not work"):
        tiling.least_work(122, 122, (16, 64), 64)


def test_the_window_is_a_hann_window() -> None:
    rows, columns = (np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in (16, 24))
    expected = np.outer(rows, columns)
    torch.testing.assert_close(blending.window(16, 24), torch.from_numpy(expected).float())
    assert expected[8, 12] > 0.98 and expected[0, 0] < 1e-4


def test_window_is_symmetric_and_positive() -> None:
    weight = blending.window(16, 24)
    torch.testing.assert_close(weight, weight.flip(0))
    torch.testing.assert_close(weight, weight.flip(1))
    assert (weight > 0).all()


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_blending_the_identity_is_the_identity(batch: int) -> None:
    whole = torch.randn(2, 3, 50, 70)
    tiles = tiling.grid(50, 70, 16, 4)

    def identity(group: list[tiling.Place]) -> torch.Tensor:
        assert len(group) in tiling.BATCHES and len(group) <= batch
        return torch.stack([tile.crop(whole[n]) for n, tile in group])

    blended = blending.blend(identity, tiles, whole.shape, batch, blending.window(16, 16))
    torch.testing.assert_close(blended, whole, atol=1e-6, rtol=1e-6)


def test_blending_does_not_depend_on_the_batch() -> None:
    tiles = tiling.grid(50, 70, 16, 4)
    values = {(n, tile): torch.randn(3, 16, 16) for n in range(2) for tile in tiles}

    def run(batch: int) -> torch.Tensor:
        return blending.blend(
            lambda group: torch.stack([values[place] for place in group]),
            tiles,
            (2, 3, 50, 70),
            batch,
            blending.window(16, 16),
        )

    assert all(torch.equal(run(1), run(batch)) for batch in (2, 3, 8))
