"""Transformer blocks of SeeSR: a second transformer for image tokens after each text transformer of Stable Diffusion.

SeeSR (Wu et al., CVPR 2024): the second one looks at the tagger's image tokens. Both run one after the other, text
first.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.attention import Attention, Tokens

Context = tuple[Tokens | Tensor, Tokens | Tensor]  # text and image


class GatedLinear(nn.Module):
    """A linear layer, half of which gates the other through GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GatedLinear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a LayerNorm before it and a residual."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1 = Attention(width, heads, width)
        self.attn2 = Attention(width, heads, context_width)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, context: Tokens | Tensor) -> Tensor:
        """[B, n, width] -> the same shape."""
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class Transformer(nn.Module):
    """A transformer block over the pixels of a feature map, with a residual around it."""

    def __init__(self, channels: int, heads: int, groups: int, context_width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_width)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tokens | Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        batch, channels, height, width = x.shape
        rows = self.proj_in(self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, channels))
        rows = self.proj_out(self.transformer_blocks[0](rows, context))
        return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2).contiguous() + x


class TextThenImage(nn.Module):
    """A text transformer and an image transformer in a row."""

    def __init__(self, channels: int, heads: int, groups: int, text_width: int, image_width: int) -> None:
        super().__init__()
        self.text = Transformer(channels, heads, groups, text_width)
        self.image = Transformer(channels, heads, groups, image_width)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        text, image = context
        return self.image(self.text(x, text), image)


class ConditioningEmbedding(nn.Module):
    """The conditioning image, or its features where they are at hand already; the channels tell which."""

    def __init__(self, channels: int, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            blocks += [nn.Conv2d(before, before, 3, padding=1), nn.Conv2d(before, after, 3, padding=1, stride=2)]
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, conditioning: Tensor) -> Tensor:
        """[B, 3, f*h, f*w] -> [B, C, h, w]; [B, C, h, w] passes."""
        if conditioning.shape[1] != self.conv_in.in_channels:
            return conditioning
        x = F.silu(self.conv_in(conditioning))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)
