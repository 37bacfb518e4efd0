from __future__ import annotations

import itertools

import pytest
import torch

from seesr import tiling


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


def test_window_is_symmetric_and_positive() -> None:
    weight = tiling.window(16, 24)
    torch.testing.assert_close(weight, weight.flip(0))
    torch.testing.assert_close(weight, weight.flip(1))
    assert (weight > 0).all()


@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_blending_the_identity_is_the_identity(batch: int) -> None:
    whole = torch.randn(2, 3, 50, 70)
    tiles = tiling.grid(50, 70, 16, 4)

    def identity(group: list[tiling.Place]) -> torch.Tensor:
        assert len(group) == batch  # one shape, always
        return torch.stack([tile.crop(whole[n]) for n, tile in group])

    blended = tiling.blend(identity, tiles, whole.shape, batch, tiling.window(16, 16))
    torch.testing.assert_close(blended, whole, atol=1e-6, rtol=1e-6)


def test_blending_does_not_depend_on_the_batch() -> None:
    tiles = tiling.grid(50, 70, 16, 4)
    values = {(n, tile): torch.randn(3, 16, 16) for n in range(2) for tile in tiles}

    def run(batch: int) -> torch.Tensor:
        return tiling.blend(
            lambda group: torch.stack([values[place] for place in group]),
            tiles,
            (2, 3, 50, 70),
            batch,
            tiling.window(16, 16),
        )

    assert all(torch.equal(run(1), run(batch)) for batch in (2, 3, 8))
