"""Swin Transformer (Liu et al. 2021), the tagger's encoder. Weights of timm's SwinTransformer load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -100.0  # added to the attention between pixels that are neighbours only because the map was rolled


def windows_of(x: Tensor, side: int) -> Tensor:
    """[B, H, W, C] -> [B * number of windows, side * side, C]."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // side, side, width // side, side, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, channels)


def from_windows(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """[B * number of windows, side * side, C] -> [B, H, W, C]."""
    x = windows.view(-1, height // side, width // side, side, side, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, windows.shape[-1])


def relative_positions(side: int) -> Tensor:
    """For every pair of pixels of a window the row of the bias table, [side**2, side**2]."""
    y, x = torch.arange(side * side, device="cpu") // side, torch.arange(side * side, device="cpu") % side
    down, across = y[:, None] - y[None] + side - 1, x[:, None] - x[None] + side - 1
    return down * (2 * side - 1) + across


def shifted_mask(side: int, shift: int, height: int, width: int) -> Tensor:
    """What is added to the attention in a rolled map, [number of windows, side**2, side**2]."""

    def regions(length: int) -> Tensor:
        at = torch.arange(length, device="cpu")
        return (at >= length - side).long() + (at >= length - shift).long()

    region = 3 * regions(height)[:, None] + regions(width)[None]
    region = windows_of(region[None, :, :, None], side)[..., 0]
    return torch.where(region[:, None] == region[:, :, None], 0.0, MASKED)


class WindowAttention(nn.Module):
    """Self-attention inside a window, with a learnt bias for every relative position."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_positions(side), persistent=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[windows, n, width] -> the same shape."""
        count, n, width = x.shape
        q, k, v = self.qkv(x).reshape(count, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q = q * (width // self.heads) ** -0.5
        bias = self.relative_position_bias_table[self.relative_position_index]
        weights = q @ k.transpose(-2, -1) + bias.permute(2, 0, 1).contiguous()[None]
        if mask is not None:
            weights = (weights.view(-1, len(mask), self.heads, n, n) + mask[None, :, None]).view(weights.shape)
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Attention in windows, which in every other block are shifted by half a window, then feed-forward."""

    attn_mask: Tensor | None

    def __init__(self, width: int, heads: int, window: int, shifted: bool, resolution: int) -> None:
        super().__init__()
        self.side = min(window, resolution)
        self.shift = window // 2 if shifted and resolution > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, self.side)
        self.mlp = FeedForward(width)
        padded = -(-resolution // self.side) * self.side
        mask = shifted_mask(self.side, self.shift, padded, padded) if self.shift else None
        self.register_buffer("attn_mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> the same shape."""
        batch, *_, channels = x.shape
        x = x + self.attend(self.norm1(x))
        rows = x.reshape(batch, -1, channels)
        return (rows + self.mlp(self.norm2(rows))).reshape(x.shape)

    def attend(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        x = F.pad(x, (0, 0, 0, -width % self.side, 0, -height % self.side))
        windows = self.attn(windows_of(x, self.side), self.attn_mask)
        x = from_windows(windows, self.side, x.shape[1], x.shape[2])[:, :height, :width].contiguous()
        return x.roll((self.shift, self.shift), (1, 2)) if self.shift else x


class PatchMerging(nn.Module):
    """[B, H, W, C] -> [B, H/2, W/2, 2 * C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        batch, height, width, channels = x.shape
        x = x.reshape(batch, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    def __init__(self, width: int, heads: int, window: int, depth: int, resolution: int, merge: bool) -> None:
        super().__init__()
        self.downsample = PatchMerging(width // 2) if merge else nn.Identity()
        blocks = (SwinBlock(width, heads, window, n % 2 == 1, resolution) for n in range(depth))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class PatchEmbedding(nn.Module):
    """[B, 3, H, W] -> [B, H/patch, W/patch, width]."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class SwinTransformer(nn.Module):
    """Square images -> features [B, h, w, C] of the last stage.

    Args:
        image_size: side of the input, pixels.
        embed_dim: width of the first stage; each further one has twice as much at half the resolution.
        depths: blocks of every stage.
        num_heads: attention heads of every stage.
        window_size: side of a window, patches.
        patch_size: side of a patch, pixels.
    """

    def __init__(
        self,
        image_size: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int = 7,
        patch_size: int = 4,
    ) -> None:
        super().__init__()
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbedding(embed_dim, patch_size)
        resolution, stages = image_size // patch_size, []
        for level, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            side = -(-resolution // 2**level)
            stages.append(Stage(embed_dim * 2**level, heads, window_size, depth, side, merge=level > 0))
        self.layers = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(self.num_features)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, h, w, C]."""
        return self.norm(self.layers(self.patch_embed(pixels)))
