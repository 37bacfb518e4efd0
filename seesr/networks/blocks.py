"""Layers that the UNet, the ControlNet and the autoencoder share, named as in diffusers so that its weights load.

diffusers' own classes are the reference: tests compare every network with them, value by value. They are not imported
here because `import diffusers` takes four times as long as `import torch`.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.weights import WeightsError

IGNORED = {"upcast_attention", "force_upcast", "sample_size"}  # keys that change nothing here


class Network(nn.Module):
    """A network that is built from a config file of diffusers.

    Subclasses list in DEFAULTS the keys that they read, and in FIXED those of which they support one value. Keys that
    are in neither must be None or False.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    FIXED: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        for key, value in config.items():
            known = key in self.DEFAULTS or key in IGNORED or key.startswith("_")
            if not known and value not in (None, False, self.FIXED.get(key)):
                name = type(self).__name__
                raise WeightsError(f"{key} is {value!r} in the config of the {name}: only {self.FIXED.get(key)} works")
        self.config = types.MappingProxyType({key: config.get(key, value) for key, value in self.DEFAULTS.items()})

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


class ResnetBlock(nn.Module):
    """Two convolutions with GroupNorm and SiLU before each, and a residual; the time is added between them.

    Args:
        before: channels of the input.
        after: channels of the output.
        time: width of the time embedding; None: there is none.
    """

    def __init__(self, before: int, after: int, groups: int, eps: float, time: int | None = None) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, before, eps)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.time_emb_proj = None if time is None else nn.Linear(time, after)
        self.norm2 = nn.GroupNorm(groups, after, eps)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """[B, before, H, W], [B, time] -> [B, after, H, W]."""
        inner = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None and time is not None:
            inner = inner + self.time_emb_proj(F.silu(time))[:, :, None, None]
        inner = self.conv2(F.silu(self.norm2(inner)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + inner


class Downsample(nn.Module):
    """A convolution with a stride of two; `padding` 0 pads only the right and the lower edge."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours at twice the size, or at `size`, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        # Channels-last interpolation fails in torch for 64 images and more, and for 2**31 elements (pytorch 141831).
        if len(x) >= 64 or 4 * x.numel() > 2**31:
            x = x.contiguous()
        if size is None:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.interpolate(x, size=size, mode="nearest"))
