"""Colour correction of the result against the enlarged input: floats in, floats out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
STRIP = 512  # rows at a time
REACH = 2**LEVELS - 1  # pixels that the low-pass looks at on each side: 1 + 2 + 4 + 8 + 16


def low_pass(x: Tensor) -> Tensor:
    """The coarsest band of an undecimated wavelet transform (a trous), [1, C, H, W] -> the same shape.

    Five blurs with [1 2 1]/4 each way, reaching 1, 2, 4, 8, 16 pixels, edges repeated.
    """
    for level in range(LEVELS):
        step = 2**level
        for dim, around in ((2, (0, 0, step, step)), (3, (step, step, 0, 0))):
            wide, size = F.pad(x, around, mode="replicate"), x.shape[dim]
            before, here, after = (wide.narrow(dim, start, size) for start in (0, step, 2 * step))
            x = (before + after).mul_(0.25).add_(here, alpha=0.5)
    return x


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """Detail of `content` on the colours of `style`, both [1, C, H, W] (StableSR, Wang et al. 2023)."""
    return content + low_pass(style - content)


def mean_std(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Per channel over all [1, C, h, w] parts; the deviation is unbiased, with 1e-5 added to the variance."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for part in parts:
        values = part.double()
        count += values[0, 0].numel()
        total = total.to(values) + values.sum((2, 3), keepdim=True)
        squares = squares.to(values) + values.square().sum((2, 3), keepdim=True)
    mean = total / count
    variance = (squares - count * mean.square()) / max(1, count - 1)
    return mean.float(), (variance.clamp(min=0) + 1e-5).sqrt().float()


Statistics = tuple[Tensor, Tensor]  # mean, deviation


def adain(
    content: Tensor, style: Tensor, of_content: Statistics | None = None, of_style: Statistics | None = None
) -> Tensor:
    """`content` with the mean and deviation of `style` in every channel, [1, C, H, W] (Huang and Belongie 2017)."""
    (mean, std), (style_mean, style_std) = of_content or mean_std([content]), of_style or mean_std([style])
    return (content - mean) / std * style_std + style_mean


def match(content: Tensor, style: Tensor, method: str) -> Tensor:
    """Applies `method` (wavelet, adain or none); [1, C, H, W] floats, not clamped."""
    return {"wavelet": wavelet, "adain": adain, "none": lambda content, style: content}[method](content, style)


Rows = Callable[[int, int], Tensor]  # (first row, the one after the last) -> [1, C, rows, W]


def match_by_strips(content: Rows, style: Rows, height: int, method: str) -> Iterator[tuple[int, Tensor]]:
    """`match` of pictures that are not held in floats as a whole; yields (first row, [1, C, rows, W])."""
    spans = [(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]
    if method == "adain":
        statistics = [mean_std(rows(*span) for span in spans) for rows in (content, style)]
        for top, bottom in spans:
            yield top, adain(content(top, bottom), style(top, bottom), *statistics)
        return
    reach = REACH if method == "wavelet" else 0
    for top, bottom in spans:
        first, last = max(0, top - reach), min(height, bottom + reach)
        matched = match(content(first, last), style(first, last), method)
        yield top, matched[:, :, top - first : bottom - first]
