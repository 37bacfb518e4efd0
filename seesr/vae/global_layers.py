"""GroupNorm and attention over the whole image when it is computed in parts: collect statistics, then apply."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks import hardware
from seesr.runtime.tiling import Tile, stride

TINY = 1e-12  # keeps the deviation of a flat part finite
SMALL = 2**-8  # a power of two, so that nothing but the exponent changes
WEIGHTS = 2**28  # attention weights computed at once


class GlobalNorm:
    """A GroupNorm with the statistics of the whole image."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.module = norm
        self.parts: list[tuple[int, Tensor, Tensor]] = []  # area, variance and mean of every group

    def observe(self, values: Tensor, part: Tile) -> None:
        find = moments_by_sums if values.is_cuda else moments_by_norm
        self.parts.append((values.shape[2] * values.shape[3], *find(values, self.module.num_groups)))

    def finish(self) -> Tensor:
        """Combines the observed parts; returns values that are finite if all parts were."""
        counts, variances, means = zip(*self.parts, strict=True)
        if len(counts) == 1:
            self.use(means[0], variances[0])
            return variances[0]
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
        self.flat = torch.zeros_like(scale), torch.ones_like(scale)

    def __call__(self, x: Tensor, activate: bool = False) -> Tensor:
        """The normalised values, through SiLU if `activate`."""
        kernel = hardware.strips_kernel(x.device)
        if kernel is not None and len(x) == 1 and x.is_contiguous(memory_format=torch.channels_last):
            return kernel(x, self.scale.flatten(), self.shift.flatten(), activate)
        normalised = self.scaled(x)
        return F.silu(normalised, inplace=True) if activate else normalised

    def scaled(self, x: Tensor) -> Tensor:
        if x.is_cuda:  # one pass over half-precision values and single-precision parameters
            return F.batch_norm(x, *self.flat, self.scale.flatten(), self.shift.flatten(), eps=TINY)
        return torch.addcmul(self.shift, x, self.scale).to(x.dtype)


def moments_by_norm(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Variance and mean of every group of [1, C, H, W], float32: by torch's own norm, on a CPU ten times as fast as
    var_mean."""
    _, channels, height, width = values.shape
    values = values.float().contiguous()  # in channels_last the variance would be a difference of large sums
    _, mean, deviation = torch.native_group_norm(values, None, None, 1, channels, height * width, groups, TINY)
    return deviation[0].square().reciprocal() - TINY, mean[0]


def moments_by_sums(values: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The same straight from half precision: summed in single precision per channel, combined in double."""
    count = values[0].numel() // groups
    sums = torch.sum(values, (0, 2, 3), dtype=torch.float32).double()
    norms = torch.linalg.vector_norm(values, 2, (0, 2, 3), dtype=torch.float32).double()
    mean = sums.view(groups, -1).sum(1) / count
    variance = norms.square().view(groups, -1).sum(1) / count - mean.square()
    return variance.clamp(min=0).float(), mean.float()


class GlobalAttention:
    """Single-head self-attention from the latent pixels of a tile to those of the whole image."""

    def __init__(self, attention: Any, size: tuple[int, int]) -> None:
        self.module = attention
        self.stride = stride(size)
        self.parts: list[tuple[Tensor, Tensor]] = []

    def observe(self, values: Tensor, part: Tile) -> None:
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
        rows = torch.cat([attend(q, self.keys, self.values) for q in chunks], dim=2)[:, 0]
        return self.module.to_out[0](rows).transpose(1, 2).reshape(x.shape)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax attention of one wide head, [1, 1, n, width] each."""
    return attend_by_products(q, keys, values) if q.is_cuda else F.scaled_dot_product_attention(q, keys, values)


def attend_by_products(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Two matrix products around a softmax that is divided by its sum at the end: on a GPU torch has no fast kernel for
    a head of 512. Weights are at most 1 and their sum is taken in single precision; the values are made small before,
    as a sum of 2^18 of them would be beyond half precision.
    """
    q, keys, values = q[0, 0] * q.shape[-1] ** -0.5, keys[0, 0], values[0, 0] * SMALL
    weights = q @ keys.T
    weights.sub_(weights.amax(1, keepdim=True)).exp_()
    total = weights.sum(1, keepdim=True, dtype=torch.float32)
    return ((weights @ values) / (total * SMALL)).to(q.dtype)[None, None]


GlobalLayer = GlobalNorm | GlobalAttention
