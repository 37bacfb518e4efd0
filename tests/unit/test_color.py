"""Color fixes: wavelet and adain."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from seesr.images import color


def test_low_pass_equals_a_stationary_wavelet_transform(rng: np.random.Generator) -> None:
    """PyWavelets' undecimated transform with the same [1 2 1]/4 filter, away from the border it treats differently."""
    image = rng.random((256, 256))
    low = np.array([1, 2, 1, 0]) / 4 * np.sqrt(2)
    bank = pywt.Wavelet("b3", filter_bank=[low, low, low, low])  # pyright: ignore[reportAttributeAccessIssue]
    (approximation, _), *_ = pywt.swt2(image, bank, level=color.LEVELS, norm=False)
    expected = approximation / 2**color.LEVELS
    ours = color.low_pass(torch.from_numpy(image)[None, None])[0, 0].numpy()
    # the transform indexes its filter from one end: the result is shifted by the sum of the dilations
    shifts = [np.abs(np.roll(expected, (s, s), (0, 1)) - ours)[64:-64, 64:-64].max() for s in range(-40, 41)]
    assert min(shifts) < 1e-12


def test_wavelet_keeps_the_detail_and_takes_the_colour(rng: np.random.Generator) -> None:
    content = torch.from_numpy(rng.random((1, 3, 96, 80), np.float32))
    style = torch.full_like(content, 0.25) + torch.tensor([0.0, 0.1, 0.2]).view(1, 3, 1, 1)
    matched = color.wavelet(content, style)
    detail, expected = matched - color.low_pass(matched), content - color.low_pass(content)
    assert (detail - expected).abs().mean() < 0.01 < expected.abs().mean()
    torch.testing.assert_close(color.low_pass(matched).mean((2, 3)), style.mean((2, 3)), atol=0.02, rtol=0)


def match(content: torch.Tensor, style: torch.Tensor, method: str) -> torch.Tensor:
    strips = color.match_by_strips(
        lambda a, b: content[:, :, a:b], lambda a, b: style[:, :, a:b], content.shape[2], method
    )
    return torch.cat([rows for _, rows in strips], dim=2)


def test_an_image_matched_with_itself_is_unchanged(rng: np.random.Generator) -> None:
    x = torch.from_numpy(rng.random((1, 3, 33, 50), np.float32))
    for method in color.FIXES:
        torch.testing.assert_close(match(x, x, method), x, atol=1e-6, rtol=1e-6)


def test_adain_takes_mean_and_deviation(rng: np.random.Generator) -> None:
    content, style = (torch.from_numpy(rng.random((1, 3, 40, 40), np.float32)) for _ in range(2))
    style = style * 0.3 + 0.5
    for ours, expected in zip(color.mean_std([color.adain(content, style)]), color.mean_std([style]), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    x = 0.01 * torch.randn(1, 3, 9, 7) + torch.tensor([0.0, 0.5, 3.0]).view(1, 3, 1, 1)
    mean, deviation = color.mean_std([x[:, :, :2], x[:, :, 2:]])
    variance, expected = torch.var_mean(x, (2, 3), keepdim=True)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(deviation, (variance + 1e-5).sqrt())
    assert torch.isfinite(color.mean_std([x[:, :, :1, :1]])[1]).all()


def test_the_low_pass_reaches_31_pixels_and_keeps_the_mean() -> None:
    x = torch.zeros(1, 1, 99, 99)
    x[..., 49, 49] = 1
    low = color.low_pass(x)
    rows = low[0, 0].any(1).nonzero()
    assert (rows.min().item(), rows.max().item()) == (49 - 31, 49 + 31)
    assert low.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (7, 3)])
def test_any_size_works(size: tuple[int, int]) -> None:
    assert match(torch.rand(1, 3, *size), torch.rand(1, 3, *size), "wavelet").shape[2:] == size


@pytest.mark.parametrize("method", color.FIXES)
def test_strips_give_what_the_whole_gives(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(color, "STRIP", 32)
    content, style = torch.rand(1, 3, 100, 40), torch.rand(1, 3, 100, 40)
    whole = {"wavelet": color.wavelet, "adain": color.adain, "none": lambda content, style: content}[method]
    torch.testing.assert_close(match(content, style, method), whole(content, style), atol=1e-6, rtol=1e-5)
