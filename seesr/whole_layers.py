"""A GroupNorm and an attention that have seen the whole picture in parts, and then work on any part of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.tiling import Tile

KEYS = 2**18  # cells that the middle attention looks at: all of them up to 4096 x 4096 pixels, evenly spread ones above
TINY = 1e-12  # keeps the deviation of a flat part finite
WEIGHTS = 2**28  # attention weights computed at once


class WholeNorm:
    """A GroupNorm with the statistics of the whole picture."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.module = norm
        self.parts: list[tuple[int, Tensor, Tensor]] = []  # area, variance and mean of every group

    def look(self, values: Tensor, part: Tile) -> None:
        _, channels, height, width = values.shape
        area, groups = height * width, self.module.num_groups
        values = values.float().contiguous()  # in channels_last the variance would be a difference of large sums
        # Torch's own norm for its statistics: ten times as fast as var_mean.
        _, mean, deviation = torch.native_group_norm(values, None, None, 1, channels, area, groups, TINY)
        self.parts.append((area, deviation[0].square().reciprocal() - TINY, mean[0]))

    def finish(self) -> Tensor:
        """Takes what was seen into use; returns values that are finite if all were."""
        counts, variances, means = zip(*self.parts, strict=True)
        share = torch.tensor(counts, dtype=torch.float32, device=means[0].device)[:, None] / sum(counts)
        mean = (share * torch.stack(means)).sum(0)
        variance = (share * (torch.stack(variances) + (torch.stack(means) - mean).square())).sum(0)
        self.use(mean, variance)
        return variance

    def use(self, mean: Tensor, variance: Tensor) -> None:
        """Sets the statistics of every group."""
        norm = self.module
        each = norm.num_channels // norm.num_groups
        scale = norm.weight.float() * (variance + norm.eps).rsqrt().repeat_interleave(each)
        shift = norm.bias.float() - mean.repeat_interleave(each) * scale
        self.scale, self.shift = scale[:, None, None], shift[:, None, None]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale).to(x.dtype)


class WholeAttention:
    """Single-head self-attention of a tile's cells to the cells of the whole picture."""

    def __init__(self, attention: Any, size: tuple[int, int]) -> None:
        self.module = attention
        self.stride = 1
        while (size[0] // self.stride) * (size[1] // self.stride) > KEYS:
            self.stride += 1
        self.parts: list[tuple[Tensor, Tensor]] = []

    def look(self, values: Tensor, part: Tile) -> None:
        seen = values[..., -part.top % self.stride :: self.stride, -part.left % self.stride :: self.stride]
        rows = seen.flatten(2).transpose(1, 2)
        self.parts.append((self.module.to_k(rows), self.module.to_v(rows)))

    def finish(self) -> Tensor:
        self.keys, self.values = (torch.cat(rows, dim=1)[:, None] for rows in zip(*self.parts, strict=True))
        self.parts.clear()
        return self.values

    def __call__(self, x: Tensor) -> Tensor:
        """Normalised [1, C, h, w] -> what attention adds, the same shape."""
        queries = self.module.to_q(x.flatten(2).transpose(1, 2))[:, None]
        chunks = queries.split(max(1, WEIGHTS // self.keys.shape[2]), dim=2)
        rows = torch.cat([F.scaled_dot_product_attention(q, self.keys, self.values) for q in chunks], dim=2)[:, 0]
        return self.module.to_out[0](rows).transpose(1, 2).reshape(x.shape)


Whole = WholeNorm | WholeAttention
