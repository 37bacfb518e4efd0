"""Colour correction of the result against the enlarged input: floats in, floats out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
REACH = 2**LEVELS - 1  # pixels that the low-pass looks at on each side: 1 + 2 + 4 + 8 + 16


def low_pass(x: Tensor) -> Tensor:
    """The coarsest band of an undecimated wavelet transform (a trous), [1, C, H, W] -> the same shape.

    Five blurs with [1 2 1]/4 each way, dilated 1, 2, 4, 8, 16, edges repeated. The kernel is separable, and is applied
    so: rows, then columns.
    """
    channels = x.shape[1]
    kernel = x.new_tensor([0.25, 0.5, 0.25])
    for level in range(LEVELS):
        step = 2**level
        x = F.pad(x, (step, step, step, step), mode="replicate")
        x = F.conv2d(x, kernel.view(1, 1, 1, 3).expand(channels, -1, -1, -1), groups=channels, dilation=(1, step))
        x = F.conv2d(x, kernel.view(1, 1, 3, 1).expand(channels, -1, -1, -1), groups=channels, dilation=(step, 1))
    return x


def wavelet(content: Tensor, style: Tensor) -> Tensor:
    """Detail of `content` on the colours of `style`, both [1, C, H, W] (StableSR, Wang et al. 2023)."""
    return content + low_pass(style - content)


def mean_std(x: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel of [1, C, H, W]; the deviation is unbiased, with 1e-5 added to the variance."""
    variance, mean = torch.var_mean(x, dim=(2, 3), keepdim=True, correction=1)
    return mean, (variance + 1e-5).sqrt()


def adain(content: Tensor, style: Tensor) -> Tensor:
    """`content` with the mean and deviation of `style` in every channel, [1, C, H, W] (Huang and Belongie 2017)."""
    (content_mean, content_std), (style_mean, style_std) = mean_std(content), mean_std(style)
    return (content - content_mean) / content_std * style_std + style_mean


def match(content: Tensor, style: Tensor, method: str) -> Tensor:
    """Applies `method` (wavelet, adain or none); [1, C, H, W] floats, not clamped."""
    return {"wavelet": wavelet, "adain": adain, "none": lambda content, style: content}[method](content, style)
