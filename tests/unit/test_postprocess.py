"""After the decoder: rejected output, integers, fidelity, flat areas, and the measures of added detail."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from seesr.images import color
from seesr.pipeline import postprocess
from seesr.runtime.precision import NotFinite


def blocks(height: int, width: int, side: int, contrast: float, middle: float = 0.5) -> Tensor:
    """[1, 3, height, width]: squares of two values in turn."""
    y, x = torch.meshgrid(torch.arange(height) // side, torch.arange(width) // side, indexing="ij")
    return (middle + contrast * ((x + y) % 2 - 0.5)).expand(1, 3, height, width)


def rows(image: Tensor) -> Callable[[int, int], Tensor]:
    return lambda top, bottom: image[:, :, top:bottom]


def check(content: Tensor, style: Tensor, size: tuple[int, int] | None = None) -> None:
    postprocess.check_decoded(rows(content), rows(style), size or (style.shape[3], style.shape[2]))


@pytest.mark.parametrize(("share", "works"), [(1.0, True), (0.26, True), (0.24, False), (0.0, False)])
def test_a_quarter_of_the_contrast_is_needed(share: float, works: bool) -> None:
    style, content = blocks(80, 96, 8, 0.4), blocks(80, 96, 8, 0.4 * share)
    noise = 0.3 * torch.from_numpy(np.kron(np.ones((40, 48)), [[1, -1], [-1, 1]])).float()
    for decoded in (content, content + noise, content.flip(3)):  # noise is averaged out
        if works:
            check(decoded, style)
            continue
        message = f"produced no image: {share:.0%} of the input's contrast, the minimum is 25%"
        with pytest.raises(RuntimeError, match=message):
            check(decoded, style)


@pytest.mark.parametrize(("slope", "flat"), [(0.98 / 255, True), (1.02 / 255, False)])
def test_of_a_flat_input_nothing_is_said(slope: float, flat: bool) -> None:
    """10 x 10 blocks: 90 of 100 have a neighbour in each direction."""
    style = blocks(80, 80, 8, slope / 0.9)
    if flat:
        check(torch.zeros_like(style), style)
        return
    with pytest.raises(RuntimeError, match="produced no image"):
        check(torch.zeros_like(style), style)


@pytest.mark.parametrize("values", [(1.0, 1.2), (0.0, -0.2)])
def test_contrast_outside_of_the_range_does_not_count(values: tuple[float, float]) -> None:
    low, high = sorted(values)
    style = blocks(32, 32, 8, 0.4)
    with pytest.raises(RuntimeError, match="produced no image: 0%"):
        check(blocks(32, 32, 8, high - low, (low + high) / 2), style)


@pytest.mark.parametrize("height", [15, 16])
def test_of_a_small_image_only_a_constant_result_is_rejected(height: int) -> None:
    style = blocks(height, 40, 1 if height < 16 else 8, 0.4)
    faint = blocks(height, 40, 1 if height < 16 else 8, 0.004)
    with pytest.raises(RuntimeError, match="the minimum is 0%" if height < 16 else "the minimum is 25%"):
        check(torch.full_like(style, 0.3), style)
    if height < 16:
        check(faint, style)
        return
    with pytest.raises(RuntimeError, match="produced no image: 1%"):
        check(faint, style)


def test_the_border_beyond_the_image_is_not_looked_at() -> None:
    style = blocks(32, 48, 8, 0.4)
    content = torch.zeros_like(style)
    content[..., 32:] = style[..., 32:]
    check(content, style)
    with pytest.raises(RuntimeError, match="produced no image"):
        check(content, style, (32, 32))


@pytest.mark.parametrize(("height", "works"), [(44, False), (48, True)])
def test_every_strip_of_a_block_counts(height: int, works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "STRIP", 40)
    style, content = blocks(height, 80, 8, 0.1), torch.full((1, 3, height, 80), 0.5)
    content[:, :, 40:] = blocks(height, 80, 8, 1.0)[:, :, 40:]
    if works:
        check(content, style)
        return
    with pytest.raises(RuntimeError, match="produced no image"):
        check(content, style)  # four rows are no block


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_rows_become_integers_of_the_exact_size(depth: type) -> None:
    values = torch.linspace(-0.2, 1.2, 3 * 24 * 20).view(1, 3, 24, 20)
    strips = [(top, values[:, :, top : top + 8]) for top in (0, 8, 16)]
    for height in (8, 13, 24):
        result = postprocess.to_integers(iter(strips), (17, height), depth)
        maximum = np.iinfo(depth).max
        expected = (values[0].permute(1, 2, 0).numpy().clip(0, 1) * maximum)[:height, :17]
        assert result.dtype == depth and result.shape == (height, 17, 3)
        assert np.abs(result - expected).max() <= 0.51


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_the_image_must_be_finite(value: float) -> None:
    values = torch.rand(1, 3, 16, 20)
    values[0, 1, 12, 3] = values[0, 2, 3, 18] = value
    strips = [(0, values[:, :, :8]), (8, values[:, :, 8:])]
    assert postprocess.to_integers(iter(strips), (18, 12), np.uint8).shape == (12, 18, 3)
    for size in ((18, 13), (19, 12)):
        with pytest.raises(NotFinite, match="color"):
            postprocess.to_integers(iter(strips), size, np.uint8)


def test_fidelity_follows_the_disagreement_of_particles() -> None:
    assert postprocess.at_every_pixel(0.3, None, 4, (8, 8)) == 0.3
    spread = torch.tensor([[1.0, 3.0]])  # 0.5 and 1.5 times the mean
    share = postprocess.at_every_pixel(0.3, spread, 1, (2, 1))
    np.testing.assert_allclose(share, [[1 - 0.7**0.5, 1 - 0.7**1.5]], rtol=1e-5)
    spread = torch.zeros(1, 40)
    spread[0, 7] = 5.0
    share = postprocess.at_every_pixel(0.3, spread, 1, (40, 1))
    assert isinstance(share, np.ndarray)
    np.testing.assert_allclose([share[0, 7], share[0, 0]], [1 - 0.7**4, 1 - 0.7**0.25], rtol=1e-5)
    share = postprocess.at_every_pixel(0.3, torch.zeros(3, 4), 2, (7, 5))
    assert isinstance(share, np.ndarray) and share.shape == (5, 7)
    np.testing.assert_allclose(share, 1 - 0.7**0.25, rtol=1e-5)


@pytest.fixture
def pair(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A result and the bicubic upscale, [60, 40, 3]."""
    smooth = cv2.GaussianBlur(rng.integers(0, 256, (60, 40, 3)).astype(np.uint8), (0, 0), 3)
    return (smooth + rng.integers(0, 40, smooth.shape)).astype(np.uint8), smooth


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("share", "coarse", "fine"), [(0, 1, 1), (0.25, 0.5, 1), (0.5, 0, 1), (0.75, 0, 0.5), (1, 0, 0)]
)
@pytest.mark.parametrize("strip", [512, 16])
def test_coarse_changes_leave_before_fine_ones(
    pair: tuple[np.ndarray, np.ndarray], depth: type, share: float, coarse: float, fine: float, strip: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(color, "STRIP", strip)
    result, bicubic = (image.astype(depth) * (np.iinfo(depth).max // 255) for image in pair)
    added = result.astype(np.float32) - bicubic
    blurred = cv2.GaussianBlur(added, (0, 0), 1.5)
    expected = (bicubic + coarse * blurred + fine * (added - blurred)).clip(0, np.iinfo(depth).max)
    blended = postprocess.blend_bicubic(result, bicubic, share, [], 1.5)
    assert blended.dtype == depth and np.abs(blended - expected).max() <= (0.51 if depth == np.uint8 else 2)
    if share in (0, 1):
        np.testing.assert_array_equal(blended, bicubic if share else result)
    array = np.full(result.shape[:2], share, np.float32)
    array[:, :20] = 1 - share
    sides = postprocess.blend_bicubic(result, bicubic, array, [], 1.5)
    np.testing.assert_array_equal(sides[:, 20:], blended[:, 20:])
    if share in (0, 1):
        np.testing.assert_array_equal(sides[:, :20], (result if share else bicubic)[:, :20])


@pytest.mark.parametrize("strip", [512, 16])
def test_masks_multiply(pair: tuple[np.ndarray, np.ndarray], strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "STRIP", strip)
    result, bicubic = pair
    first, second = np.full((60, 40), 255, np.uint8), np.full((6, 4), 128, np.uint8)
    first[:30] = 0
    blended = postprocess.blend_bicubic(result, bicubic, 0.0, [first, second], 1.5)
    np.testing.assert_array_equal(blended[:30], bicubic[:30])
    expected = bicubic + (result.astype(float) - bicubic) * 128 / 255
    assert np.abs(blended - expected)[30:].max() <= 0.51
    np.testing.assert_array_equal(postprocess.blend_bicubic(result, bicubic, 0.0, [first], 1.5)[30:], result[30:])


@pytest.mark.parametrize(("scale", "ramp"), [(1, 12), (1.5, 8), (2, 6), (4, 6)])
@pytest.mark.parametrize("across", [False, True])
def test_detail_fades_out_over_a_ramp(scale: float, ramp: int, across: bool) -> None:
    """One line of another value: the pixels beside it vary, too; all is allowed up to four pixels from these."""
    source = np.full((60, 60, 3), 200, np.uint8)
    source[20, :, 1] = 199
    if across:
        source = source.transpose(1, 0, 2).copy()
    allowed = postprocess.textured(source, scale)
    assert allowed is not None and allowed.dtype == np.uint8
    line = (allowed if not across else allowed.T)[:, 30].astype(int)
    np.testing.assert_array_equal(line[20 : 20 + 21], line[20::-1])  # the same on both sides
    beyond = line[21 + 4 :]
    assert line[20 : 21 + 4 + 1].min() == 255 and (np.diff(beyond[: ramp + 2]) < 0).all()
    expected = 255 * (1 - np.arange(ramp + 2) / (ramp + 1))
    assert np.abs(beyond[: ramp + 2] - expected).max() <= 1 and beyond[ramp + 1] == 0 and not beyond[ramp + 1 :].any()


def test_an_image_without_flat_areas_and_one_without_anything_else(rng: np.random.Generator) -> None:
    assert postprocess.textured(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8), 4) is None
    flat = postprocess.textured(np.full((40, 50, 3), 7, np.uint16), 4)
    assert flat is not None and not flat.any()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_measures_of_added_detail(depth: type, rng: np.random.Generator) -> None:
    unit = np.iinfo(depth).max // 255
    source = rng.integers(60, 190, (20, 30, 3)).astype(depth)
    bicubic = source.repeat(2, 0).repeat(2, 1)
    checker = np.kron(np.ones((20, 30)), [[1, -1], [-1, 1]])[..., None]
    finer = (bicubic + 10 * checker).astype(depth)  # of which nothing is left in pixels of the input's size
    brighter = bicubic + depth(10)
    images = [unit * image for image in (bicubic, finer, brighter)]
    same, fine, bright = (postprocess.trust(image, images[0], unit * source) for image in images)
    assert same == {"faithful": 100.0, "invented": 0.0}
    assert fine == {"faithful": 100.0, "invented": round(300 / float(finer.var((0, 1)).sum()), 4)}
    assert bright == {"faithful": round(20 * float(np.log10(255 / 10)), 2), "invented": 0.0}
    flat = np.full((4, 4, 3), 9, depth)
    faint = flat + np.tile(np.eye(2, dtype=depth), (2, 2))[..., None]
    assert postprocess.trust(faint, flat, flat[:2, :2])["invented"] == 1.0  # of a variance below one
    assert postprocess.trust(flat, flat, flat[:2, :2]) == {"faithful": 100.0, "invented": 0.0}


def test_the_map_of_the_spread_ends_at_one() -> None:
    assert postprocess.to_map(None, 4, (8, 8)) is None
    for value, expected in ((0.0, 0), (0.25, 16384), (1.0, 65535), (3.0, 65535)):
        shown = postprocess.to_map(torch.full((2, 3), value), 4, (11, 7))
        assert shown is not None and shown.dtype == np.uint16 and shown.shape == (7, 11) and (shown == expected).all()
