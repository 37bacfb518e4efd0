"""AutoencoderKL and AutoencoderTiny, compatible with the weights of the diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.blocks import Downsample, Network, ResnetBlock, Upsample

EPS = 1e-6  # of every GroupNorm


class Attention(nn.Module):
    """Self-attention of all latent pixels, one head, with its norm before it and a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        rows = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (project(rows)[:, None] for project in (self.to_q, self.to_k, self.to_v))
        attended = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return attended.transpose(1, 2).reshape(x.shape) + x


class Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, EPS) for _ in range(1 + attention))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention, resnet in zip(self.attentions, list(self.resnets)[1:], strict=True):
            x = resnet(attention(x))
        return x


class Level(nn.Module):
    """The residual blocks of one resolution, then the step to the next."""

    def __init__(self, resnets: Sequence[ResnetBlock], down: Downsample | None, up: Upsample | None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = None if down is None else nn.ModuleList([down])
        self.upsamplers = None if up is None else nn.ModuleList([up])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *(self.downsamplers or []), *(self.upsamplers or [])]:
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels [B, 3, f*h, f*w] in [-1, 1] -> means and log variances [B, 2 * C, h, w]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        channels, groups = config["block_out_channels"], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["in_channels"], channels[0], 3, padding=1)
        levels, before = [], channels[0]
        for number, after in enumerate(channels):
            count, last = config["layers_per_block"], number == len(channels) - 1
            resnets = [ResnetBlock(before if n == 0 else after, after, groups, EPS) for n in range(count)]
            levels.append(Level(resnets, None if last else Downsample(after, padding=0), None))
            before = after
        self.down_blocks = nn.ModuleList(levels)
        self.mid_block = Middle(before, groups, config["mid_block_add_attention"])
        self.conv_norm_out = nn.GroupNorm(groups, before, EPS)
        self.conv_out = nn.Conv2d(before, 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents [B, C, h, w] -> pixels [B, 3, f*h, f*w], nominally in [-1, 1]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        channels, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        self.conv_in = nn.Conv2d(config["latent_channels"], channels[0], 3, padding=1)
        self.mid_block = Middle(channels[0], groups, config["mid_block_add_attention"])
        levels, before = [], channels[0]
        for number, after in enumerate(channels):
            count, last = config["layers_per_block"] + 1, number == len(channels) - 1
            resnets = [ResnetBlock(before if n == 0 else after, after, groups, EPS) for n in range(count)]
            levels.append(Level(resnets, None, None if last else Upsample(after)))
            before = after
        self.up_blocks = nn.ModuleList(levels)
        self.conv_norm_out = nn.GroupNorm(groups, before, EPS)
        self.conv_out = nn.Conv2d(before, config["out_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(Network):
    """The autoencoder of Stable Diffusion. Weights of diffusers' class of this name load."""

    DEFAULTS: ClassVar = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
    }
    FIXED: ClassVar = {"act_fn": "silu"}

    def __init__(self, **arguments: Any) -> None:
        super().__init__(arguments)
        config, latent = self.config, self.config["latent_channels"]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config["use_quant_conv"] else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config["use_post_quant_conv"] else None


class TinyBlock(nn.Module):
    """Three convolutions with ReLU and a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class EncoderTiny(nn.Module):
    """Pixels [B, 3, f*h, f*w] in [-1, 1] -> latents [B, C, h, w], unscaled."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, (count, channels) in enumerate(
            zip(config["num_encoder_blocks"], config["encoder_block_out_channels"], strict=True)
        ):
            first = nn.Conv2d(config["in_channels"], channels, 3, padding=1)
            layers.append(first if level == 0 else nn.Conv2d(channels, channels, 3, 2, 1, bias=False))
            layers += [TinyBlock(channels) for _ in range(count)]
        last = nn.Conv2d(config["encoder_block_out_channels"][-1], config["latent_channels"], 3, padding=1)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.add(1).div(2))


class DecoderTiny(nn.Module):
    """Latents [B, C, h, w] -> pixels [B, 3, f*h, f*w], nominally in [-1, 1]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        counts, channels = config["num_decoder_blocks"], config["decoder_block_out_channels"]
        layers: list[nn.Module] = [nn.Conv2d(config["latent_channels"], channels[0], 3, padding=1), nn.ReLU()]
        for count, width in zip(counts[:-1], channels[:-1], strict=True):
            layers += [TinyBlock(width) for _ in range(count)]
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        layers += [TinyBlock(channels[-1]) for _ in range(counts[-1])]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels[-1], config["out_channels"], 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.tanh(x / 3) * 3).mul(2).sub(1)


class AutoencoderTiny(Network):
    """An autoencoder without layers that see the whole image. Weights of diffusers' class of this name load."""

    DEFAULTS: ClassVar = {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "decoder_block_out_channels": (64, 64, 64, 64),
        "num_encoder_blocks": (1, 3, 3, 3),
        "num_decoder_blocks": (3, 3, 3, 1),
        "latent_channels": 4,
        "scaling_factor": 1.0,
        "block_out_channels": None,  # written by diffusers for its own use
    }
    FIXED: ClassVar = {
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "shift_factor": 0,
    }

    def __init__(self, **arguments: Any) -> None:
        super().__init__({**arguments, "block_out_channels": arguments.get("decoder_block_out_channels", (64,) * 4)})
        self.encoder, self.decoder = EncoderTiny(self.config), DecoderTiny(self.config)
