"""Colour correction of the result to match the bicubic upscale of the input (wavelet or AdaIN), on float tensors.

The table FIXES at the end has every method; a new one is one row there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings read the table's names, and must not load torch
    from torch import Tensor

LEVELS = 5
STRIP = 512  # rows at a time
REACH = 2**LEVELS - 1  # pixels that the low-pass looks at on each side: 1 + 2 + 4 + 8 + 16

Rows = Callable[[int, int], "Tensor"]  # (first row, the one after the last) -> [1, C, rows, W]
Strips = Iterator[tuple[int, "Tensor"]]  # (first row, [1, C, rows, W])
Statistics = tuple["Tensor", "Tensor"]  # mean, deviation


def low_pass(x: Tensor) -> Tensor:
    """The coarsest band of an undecimated wavelet transform (a trous), [1, C, H, W] -> the same shape.

    Five blurs with [1 2 1]/4 each way, reaching 1, 2, 4, 8, 16 pixels, edges repeated.
    """
    from torch.nn.functional import pad

    for level in range(LEVELS):
        step = 2**level
        for dim, around in ((2, (0, 0, step, step)), (3, (step, step, 0, 0))):
            wide, size = pad(x, around, mode="replicate"), x.shape[dim]
            before, here, after = (wide.narrow(dim, start, size) for start in (0, step, 2 * step))
            x = (before + after).mul_(0.25).add_(here, alpha=0.5)
    return x


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """Detail of `content` on the colours of `style`, both [1, C, H, W] (StableSR, Wang et al. 2023)."""
    return content + low_pass(style - content)


def mean_std(parts: Iterable[Tensor]) -> Statistics:
    """Per channel over all [1, C, h, w] parts; the deviation is unbiased, with 1e-5 added to the variance."""
    count, total, squares = 0, 0.0, 0.0
    for part in parts:
        values = part.double()
        count += values[0, 0].numel()
        total = total + values.sum((2, 3), keepdim=True)
        squares = squares + values.square().sum((2, 3), keepdim=True)
    mean = total / count
    variance = (squares - count * mean**2) / max(1, count - 1)
    return mean.float(), (variance.clamp(min=0) + 1e-5).sqrt().float()  # type: ignore[union-attr]


def adain(
    content: Tensor, style: Tensor, of_content: Statistics | None = None, of_style: Statistics | None = None
) -> Tensor:
    """`content` with the mean and deviation of `style` in every channel, [1, C, H, W] (Huang and Belongie 2017).

    Statistics that are left out are taken from the tensors themselves.
    """
    (mean, std), (style_mean, style_std) = of_content or mean_std([content]), of_style or mean_std([style])
    return (content - mean) / std * style_std + style_mean


def spans(height: int, reach: int = 0) -> Iterator[tuple[int, int, int, int]]:
    """Strips of rows: (first, end, first with `reach` rows more, end with them)."""
    for top in range(0, height, STRIP):
        bottom = min(top + STRIP, height)
        yield top, bottom, max(0, top - reach), min(height, bottom + reach)


def wavelet_by_strips(content: Rows, style: Rows, height: int) -> Strips:
    for top, bottom, first, last in spans(height, REACH):
        yield top, wavelet(content(first, last), style(first, last))[:, :, top - first : bottom - first]


def adain_by_strips(content: Rows, style: Rows, height: int) -> Strips:
    of_content, of_style = (
        mean_std(rows(top, bottom) for top, bottom, *_ in spans(height)) for rows in (content, style)
    )
    for top, bottom, *_ in spans(height):
        yield top, adain(content(top, bottom), style(top, bottom), of_content, of_style)


def unchanged_by_strips(content: Rows, style: Rows, height: int) -> Strips:
    for top, bottom, *_ in spans(height):
        yield top, content(top, bottom)


FIXES: dict[str, Callable[[Rows, Rows, int], Strips]] = {
    "wavelet": wavelet_by_strips,
    "adain": adain_by_strips,
    "none": unchanged_by_strips,
}


def match_by_strips(content: Rows, style: Rows, height: int, method: str) -> Strips:
    """Corrects an image that is not held in floats as a whole.

    Args:
        content: gives rows of the result, [1, C, rows, W] floats.
        style: gives the same rows of the upscaled input.
        height: number of rows.
        method: a key of FIXES.

    Yields:
        (first row, corrected rows [1, C, rows, W], not clamped), from the top down.
    """
    return FIXES[method](content, style, height)
