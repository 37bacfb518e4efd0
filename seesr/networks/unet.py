"""SeeSR's UNet and ControlNet: those of Stable Diffusion 2 with a second transformer for the image tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.blocks import Downsample, Network, ResnetBlock, Upsample
from seesr.networks.transformer import ConditioningEmbedding, Context, TextThenImage

DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "image_cross_attention_dim": 512,  # SeeSR's configs do not say it
    "attention_head_dim": 8,  # the number of heads; diffusers named it wrongly
}
FIXED = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
    "use_image_cross_attention": True,
    "use_linear_projection": True,
}


class TimeEmbedding(nn.Module):
    """Timesteps [B] -> [B, 4 * width]: sines and cosines (Ho et al. 2020), then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps[:, None].float() * exponent.exp()[None]
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class Block(nn.Module):
    """Residual blocks of one resolution, each followed by a pair of transformers where `transformers` is not empty."""

    def __init__(self, resnets: Sequence[ResnetBlock], transformers: Sequence[TextThenImage]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(transformers) if transformers else None

    def layer(self, number: int, x: Tensor, time: Tensor, context: Context) -> Tensor:
        x = self.resnets[number](x, time)
        return x if self.attentions is None else self.attentions[number](x, context)


class DownBlock(Block):
    def __init__(
        self, resnets: Sequence[ResnetBlock], transformers: Sequence[TextThenImage], channels: int, last: bool
    ) -> None:
        super().__init__(resnets, transformers)
        self.downsamplers = None if last else nn.ModuleList([Downsample(channels, padding=1)])

    def forward(self, x: Tensor, time: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """[B, C, H, W] -> the output, and what the UNet's other side is given."""
        skips = []
        for number in range(len(self.resnets)):
            x = self.layer(number, x, time, context)
            skips.append(x)
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x, skips


class MidBlock(Block):
    def forward(self, x: Tensor, time: Tensor, context: Context) -> Tensor:
        x = self.layer(0, x, time, context)
        return self.resnets[1](x, time)


class UpBlock(Block):
    def __init__(
        self, resnets: Sequence[ResnetBlock], transformers: Sequence[TextThenImage], channels: int, last: bool
    ) -> None:
        super().__init__(resnets, transformers)
        self.upsamplers = None if last else nn.ModuleList([Upsample(channels)])

    def forward(
        self, x: Tensor, time: Tensor, context: Context, skips: list[Tensor], size: tuple[int, int] | None
    ) -> Tensor:
        """Takes one of `skips` from its end for every layer; `size`: (h, w) of the result, None: double."""
        for number in range(len(self.resnets)):
            x = self.layer(number, torch.cat([x, skips.pop()], dim=1), time, context)
        return x if self.upsamplers is None else self.upsamplers[0](x, size)


class Half(Network):
    """The downward half, which UNet and ControlNet have in common."""

    down_blocks: Sequence[DownBlock]

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__(arguments)
        config = self.config
        self.channels: list[int] = list(config["block_out_channels"])
        heads = config["attention_head_dim"]
        self.heads: list[int] = [heads] * len(self.channels) if isinstance(heads, int) else list(heads)
        self.conv_in = nn.Conv2d(config["in_channels"], self.channels[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(self.channels[0])
        blocks, before = [], self.channels[0]
        for level, (kind, channels) in enumerate(zip(config["down_block_types"], self.channels, strict=True)):
            count = config["layers_per_block"]
            resnets = [self.resnet(before if n == 0 else channels, channels) for n in range(count)]
            pairs = [self.pair(level) for _ in range(count)] if kind == "CrossAttnDownBlock2D" else []
            blocks.append(DownBlock(resnets, pairs, channels, level == len(self.channels) - 1))
            before = channels
        self.down_blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        last = self.channels[-1]
        self.mid_block = MidBlock([self.resnet(last, last) for _ in range(2)], [self.pair(-1)])

    def resnet(self, before: int, after: int) -> ResnetBlock:
        config = self.config
        return ResnetBlock(before, after, config["norm_num_groups"], config["norm_eps"], 4 * self.channels[0])

    def pair(self, level: int) -> TextThenImage:
        config = self.config
        widths = config["cross_attention_dim"], config["image_cross_attention_dim"]
        return TextThenImage(self.channels[level], self.heads[level], config["norm_num_groups"], *widths)

    def embed_time(self, x: Tensor, timestep: Tensor | int) -> Tensor:
        """A timestep, or one for each of the batch -> [B, width]."""
        times = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], device=x.device)
        return self.time_embedding(times.expand(len(x)))

    def go_down(self, x: Tensor, time: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        """The output of `conv_in` -> the input of the middle, and all skips."""
        skips = [x]
        for block in self.down_blocks:
            x, more = block(x, time, context)
            skips += more
        return x, skips


class ControlNetModel(Half):
    """The downward half again, beside the UNet: it looks at the conditioning image.

    Weights of diffusers' ControlNetModel load, those of the second transformers beside them.
    """

    DEFAULTS: ClassVar = {
        **DEFAULTS,
        "conditioning_channels": 3,
        "conditioning_embedding_out_channels": (16, 32, 96, 256),
    }
    FIXED: ClassVar = {**FIXED, "controlnet_conditioning_channel_order": "rgb"}

    def __init__(self, **arguments: Any) -> None:
        super().__init__(arguments)
        config, channels = self.config, self.channels
        embedding = config["conditioning_channels"], config["conditioning_embedding_out_channels"]
        self.controlnet_cond_embedding = ConditioningEmbedding(channels[0], *embedding)
        sides = [channels[0]]
        for level, width in enumerate(channels):
            sides += [width] * (config["layers_per_block"] + (level < len(channels) - 1))
        self.controlnet_down_blocks = nn.ModuleList(nn.Conv2d(width, width, 1) for width in sides)
        self.controlnet_mid_block = nn.Conv2d(channels[-1], channels[-1], 1)

    def forward(
        self, x: Tensor, timestep: Tensor | int, context: Context, conditioning: Tensor, scale: float = 1.0
    ) -> tuple[list[Tensor], Tensor]:
        """What is added to the UNet's skips and to its middle.

        Args:
            x: latents [B, C, h, w].
            conditioning: [B, 3, f*h, f*w] in [0, 1], or its features [B, C', h, w].
        """
        time = self.embed_time(x, timestep)
        x = self.conv_in(x) + self.controlnet_cond_embedding(conditioning)
        x, skips = self.go_down(x, time, context)
        x = self.mid_block(x, time, context)
        sides = [conv(skip) * scale for conv, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        return sides, self.controlnet_mid_block(x) * scale


class UNet2DConditionModel(Half):
    """Predicts the noise of latents. Weights of diffusers' UNet2DConditionModel load, as in ControlNet."""

    DEFAULTS: ClassVar = {
        **DEFAULTS,
        "sample_size": 64,
        "out_channels": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    FIXED: ClassVar = FIXED

    up_blocks: Sequence[UpBlock]

    def __init__(self, **arguments: Any) -> None:
        super().__init__(arguments)
        config, channels = self.config, self.channels
        blocks, before = [], channels[-1]
        for number, kind in enumerate(config["up_block_types"]):
            level = len(channels) - 1 - number
            width, count = channels[level], config["layers_per_block"] + 1
            skips = [width] * (count - 1) + [channels[max(level - 1, 0)]]
            resnets = [self.resnet((before if n == 0 else width) + skips[n], width) for n in range(count)]
            pairs = [self.pair(level) for _ in range(count)] if kind == "CrossAttnUpBlock2D" else []
            blocks.append(UpBlock(resnets, pairs, width, last=level == 0))
            before = width
        self.up_blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.conv_norm_out = nn.GroupNorm(config["norm_num_groups"], channels[0], config["norm_eps"])
        self.conv_out = nn.Conv2d(channels[0], config["out_channels"], 3, padding=1)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | int,
        context: Context,
        sides: list[Tensor] | None = None,
        middle: Tensor | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] -> the noise in them, the same shape.

        Args:
            sides, middle: what the ControlNet gave.
        """
        time = self.embed_time(x, timestep)
        x, skips = self.go_down(self.conv_in(x), time, context)
        if sides is not None:
            skips = [skip + side for skip, side in zip(skips, sides, strict=True)]
        x = self.mid_block(x, time, context)
        if middle is not None:
            x = x + middle
        for block in self.up_blocks:
            rest = len(skips) - len(block.resnets)
            size = tuple(skips[rest - 1].shape[2:]) if block.upsamplers is not None else None
            x = block(x, time, context, skips, size if size != (2 * x.shape[2], 2 * x.shape[3]) else None)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
