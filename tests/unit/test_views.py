"""The views of a result, drawn of given arrays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from seesr.images.image_data import ImageData, Pixels
from seesr.pipeline import views
from seesr.runtime.tiling import Tile, grid
from seesr.settings.view_specs import VIEWS


def result(rgb: Pixels, bicubic: Pixels | None = None, **more: Any) -> Any:
    image = ImageData(rgb, np.full(rgb.shape[:2], 9, rgb.dtype), icc=b"icc", one_channel=True)
    return SimpleNamespace(image_data=image, bicubic=bicubic, uncertainty=None, disagreement=None, **more)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_difference_is_shown_around_grey(depth: type) -> None:
    top = int(np.iinfo(depth).max)
    bicubic, rgb = np.full((1, 5, 3), 100, depth), np.full((1, 5, 3), 100, depth)
    rgb[0, :, 1] = 100, 103, 98, top, 0
    shown = views.difference(result(rgb, bicubic))
    grey = (top + 1) // 2
    assert shown.rgb[0, :, 1].tolist() == [grey, grey + 6, grey - 4, top, max(0, grey - 200)]
    assert (shown.rgb[..., 0] == grey).all() and shown.alpha is None and shown.rgb.dtype == depth
    assert VIEWS["difference"].metrics == {"difference_gain": 2}


def test_a_comparison_has_the_bicubic_upscale_on_the_left() -> None:
    rgb, bicubic = np.full((4, 5, 3), 7, np.uint8), np.full((4, 5, 3), 9, np.uint8)
    shown = views.comparison(result(rgb, bicubic))
    assert shown.rgb.shape == (4, 10, 3) and (shown.rgb[:, :5] == 9).all() and (shown.rgb[:, 5:] == 7).all()
    assert shown.alpha is None and shown.icc == b"icc"


def test_the_colors_of_tiles_can_be_told_apart() -> None:
    assert views.COLOURS.min() >= 0 and views.COLOURS.max() <= 1 and (views.COLOURS.max(1) >= 0.9).all()
    apart = [np.abs(a - b).max() for n, a in enumerate(views.COLOURS) for b in views.COLOURS[:n]]
    assert min(apart) >= 0.5


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_tiles_side_by_side_have_four_colors_over_the_image_in_grey(depth: type) -> None:
    rgb = np.zeros((11, 23, 3), depth)
    rgb[..., 2] = np.iinfo(depth).max  # the grey of blue is a third
    shown = views.tiles(result(rgb, layout=(grid(8, 12, 4, 0), 2)))
    assert shown.rgb.shape == (11, 23, 3) and shown.rgb.dtype == np.uint8
    assert (shown.alpha, shown.icc, shown.one_channel) == (None, None, False)
    for top in range(2):
        for left in range(3):
            place = shown.rgb[8 * top : 8 * top + 8, 8 * left : 8 * left + 8].reshape(-1, 3)
            expected = 85 / 2 + 255 * views.COLOURS[2 * top + left % 2] / 2
            assert np.abs(place - expected).max() <= 1


def test_where_tiles_overlap_their_colors_mix() -> None:
    """Each as strong as it counts there: in the middle of two tiles alike, elsewhere more of the nearer."""
    tiles = [Tile(0, 0, 4, 8), Tile(0, 4, 4, 12)]
    shown = views.tiles(result(np.zeros((4, 12, 3), np.uint8), layout=(tiles, 1))).rgb.astype(float) * 2
    first, second = (255 * color for color in views.COLOURS[:2])
    assert np.abs(shown[:, :4] - first).max() <= 2 and np.abs(shown[:, 8:] - second).max() <= 2
    share = ((shown[2, 4:8] - first) @ (second - first)) / ((second - first) @ (second - first))
    assert (np.diff(share) > 0.05).all() and share[0] + share[3] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["uncertainty", "confidence"])
def test_a_view_that_was_not_computed_says_what_to_set(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} view .*use_kds=True"):
        views.DRAW[name](result(np.zeros((4, 5, 3), np.uint8), calibration=None))
    unfinished = result(np.zeros((4, 5, 3), np.uint8), calibration=None)
    unfinished.disagreement = np.zeros((4, 5), np.float32)
    with pytest.raises(ValueError, match="confidence view was not computed"):
        views.confidence(unfinished)


def test_maps_are_grey() -> None:
    of = result(np.zeros((1, 3, 3), np.uint8), calibration=SimpleNamespace(threshold=2.0))
    of.uncertainty, of.disagreement = np.array([[0, 7, 65535]], np.uint16), np.array([[1.9, 2.0, 2.1]], np.float32)
    for shown, values in ((views.uncertainty(of), [0, 7, 65535]), (views.confidence(of), [255, 0, 0])):
        assert shown.rgb.shape == (1, 3, 3) and shown.one_channel and shown.alpha is None
        for channel in range(3):
            assert shown.rgb[0, :, channel].tolist() == values
