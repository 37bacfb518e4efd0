"""Attention of the UNet and the ControlNet with exchangeable kernels, and cached keys and values of context tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Tokens:
    """Context tokens of one image, [B, n, width], with the cached keys and values of every cross-attention.

    They are the same for all tiles, steps and particles, so each is computed once. B is 1, or 2 with guidance.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.cached: dict[Attention, tuple[Tensor, Tensor]] = {}

    def keys_values(self, attention: Attention, batch: int) -> tuple[Tensor, Tensor]:
        """For a batch that holds B groups of equal size: [batch, heads, n, head width] each."""
        if attention not in self.cached:
            self.cached[attention] = project(attention, self.values)
        keys, values = self.cached[attention]
        if len(keys) == 1:
            return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        times = batch // len(keys)
        return keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0)

    def recompute(self) -> None:
        """Recomputes all keys and values in place after `values` have changed."""
        for attention, cached in self.cached.items():
            for target, new in zip(cached, project(attention, self.values), strict=True):
                target.copy_(new)


def project(attention: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, n, width] -> keys and values [B, heads, n, head width]."""
    both = (attention.to_k(tokens), attention.to_v(tokens))
    keys, values = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in both)
    return keys, values


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [B, heads, n, d] -> [B, heads, n, d]


class Attention(nn.Module):
    """Attention of [B, n, width] to itself, or to context tokens."""

    kernel: Kernel = staticmethod(F.scaled_dot_product_attention)

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context_width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tokens | Tensor | None = None) -> Tensor:
        """[B, n, width] -> the same shape; `context` as Tokens, or as a plain tensor in training; None: `x` itself."""
        queries = self.to_q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        if isinstance(context, Tokens):
            keys, values = context.keys_values(self, len(x))
        else:
            keys, values = project(self, x if context is None else context)
        attended = self.kernel(queries, keys, values)
        return self.to_out[0](attended.transpose(1, 2).flatten(2))


def set_kernel(network: nn.Module, kernel: Kernel) -> None:
    """Sets the attention kernel of every layer of a UNet or ControlNet."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.kernel = kernel
