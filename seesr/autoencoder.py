"""Pixels to latents and back, in one go or by tiles that share their GroupNorm statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor, nn

Norm = Callable[[list[Tensor], nn.GroupNorm], list[Tensor]]


@torch.no_grad()
def encode(vae: Any, pixels: Tensor, noise: Tensor | None) -> Tensor:
    """[1, 3, H, W] in [0, 1] -> scaled latents [1, C, H/f, W/f], float32.

    Args:
        noise: standard normal, latent shape: a sample of the posterior. None: its mean. An AutoencoderTiny has no
            posterior and ignores it.
    """
    x = (2 * pixels - 1).to(vae.dtype)
    if isinstance(vae, AutoencoderTiny):
        (latents,) = vae.encode(x, return_dict=False)
        return latents.float() * vae.config["scaling_factor"]
    posterior = vae.encode(x).latent_dist
    z = posterior.mean.float()
    if noise is not None:
        z = z + posterior.std.float() * noise
    return z * vae.config["scaling_factor"]


@torch.no_grad()
def decode(vae: Any, z: Tensor) -> Tensor:
    """Scaled latents [1, C, h, w] float32 -> [1, 3, f*h, f*w] float32, nominally in [0, 1], not clamped."""
    z = (z / vae.config["scaling_factor"]).to(vae.dtype)
    return vae.decode(z).sample.float() / 2 + 0.5


class SharedNorm:
    """GroupNorm over several tiles as if they were one picture.

    The first tiles that come to a norm set its statistics, later ones use them. So one pass over some tiles measures,
    and every tile can then be run alone.

    Args:
        between: count the variance between the tiles' means too, which is what a norm over one picture does. The
            SeeSR reference leaves it out.
    """

    def __init__(self, between: bool = True) -> None:
        self.between = between
        self.statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def __call__(self, tiles: list[Tensor], norm: nn.GroupNorm) -> list[Tensor]:
        groups = norm.num_groups
        if norm not in self.statistics:
            shares = torch.tensor([tile[0, 0].numel() for tile in tiles], dtype=torch.float32)
            shares = (shares / shares.sum()).to(tiles[0].device)[:, None]
            parts = [torch.var_mean(t.float().reshape(groups, -1), dim=1, correction=0) for t in tiles]
            variances, means = (torch.stack(values) for values in zip(*parts, strict=True))
            mean = (shares * means).sum(0)
            variance = (shares * variances).sum(0)
            if self.between:
                variance = variance + (shares * (means - mean).square()).sum(0)
            self.statistics[norm] = mean, variance
        mean, variance = self.statistics[norm]
        scale = norm.weight.float() * (variance + norm.eps).rsqrt().repeat_interleave(norm.num_channels // groups)
        shift = norm.bias.float() - mean.repeat_interleave(norm.num_channels // groups) * scale
        return [torch.addcmul(shift[:, None, None], t, scale[:, None, None]).to(t.dtype) for t in tiles]


@torch.no_grad()
def run_tiles(network: Any, tiles: list[Tensor], norm: Norm) -> list[Tensor]:
    """Runs an AutoencoderKL's encoder or decoder over several tiles layer by layer, so that norms can see them all."""
    tiles = [network.conv_in(tile) for tile in tiles]
    if hasattr(network, "up_blocks"):
        tiles = middle(network.mid_block, tiles, norm)
        for block in network.up_blocks:
            for layer in block.resnets:
                tiles = resnet(layer, tiles, norm)
            for layer in block.upsamplers or []:
                tiles = [layer(tile) for tile in tiles]
    else:
        for block in network.down_blocks:
            for layer in block.resnets:
                tiles = resnet(layer, tiles, norm)
            for layer in block.downsamplers or []:
                tiles = [layer(tile) for tile in tiles]
        tiles = middle(network.mid_block, tiles, norm)
    return [network.conv_out(F.silu(tile)) for tile in norm(tiles, network.conv_norm_out)]


def resnet(layer: Any, tiles: list[Tensor], norm: Norm) -> list[Tensor]:
    inner = [layer.conv1(F.silu(tile)) for tile in norm(tiles, layer.norm1)]
    inner = [layer.conv2(F.silu(tile)) for tile in norm(inner, layer.norm2)]
    skips = tiles if layer.conv_shortcut is None else [layer.conv_shortcut(tile) for tile in tiles]
    return [skip + tile for skip, tile in zip(skips, inner, strict=True)]


def middle(block: Any, tiles: list[Tensor], norm: Norm) -> list[Tensor]:
    tiles = resnet(block.resnets[0], tiles, norm)
    for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
        inner = [attend(attention, tile) for tile in norm(tiles, attention.group_norm)]
        tiles = [tile + change for tile, change in zip(tiles, inner, strict=True)]
        tiles = resnet(layer, tiles, norm)
    return tiles


def attend(attention: Any, x: Tensor) -> Tensor:
    """Single-head self-attention over all cells of [1, C, H, W], normalised before, residual added after."""
    rows = x.flatten(2).transpose(1, 2)
    q, k, v = attention.to_q(rows), attention.to_k(rows), attention.to_v(rows)
    rows = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    return attention.to_out[0](rows).transpose(1, 2).reshape(x.shape)
