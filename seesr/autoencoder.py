"""Pixels to latents and back, tile by tile, with the result of one pass over the whole picture.

A convolution needs only its neighbours: a tile with a margin (halo) gives it the same values as the whole picture. But
a GroupNorm and the middle attention look at every pixel. So a tile runs as a generator that waits at each of these
layers; when every tile has shown the layer its part, the layer knows the whole picture and the tiles go on. What a
waiting tile has computed is kept if memory allows, else it is computed again: the result is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import Tensor, nn

from seesr.budget import Budget
from seesr.precision import again_in_float32, check_finite
from seesr.progress import Progress
from seesr.tiling import Tile, cores, grid

TILE = 96  # side of a tile with its halo, cells
HALO = 8  # cells; pixels farther away can still matter through 30 layers, but hardly do (docs/decisions/0005)
HALO_TINY = 16  # an AutoencoderTiny has no layer to wait at; nothing beyond this can matter
KEYS = 2**18  # cells that the middle attention looks at: all of them up to 4096 x 4096 pixels, evenly spread ones above
TINY = 1e-12  # keeps the deviation of a flat part finite
WEIGHTS = 2**28  # attention weights computed at once

Walk = Generator[tuple[nn.Module, Tensor], Tensor, Tensor]  # yields (layer, its input), is sent the output
Stage = Callable[[Tensor], Walk]


@torch.no_grad()
def encode(
    vae: Any,
    pixels: Callable[[Tile], Tensor],
    size: tuple[int, int],
    noise: Tensor | None,
    budget: Budget,
    progress: Progress | None = None,
) -> Tensor:
    """Pixels -> scaled latents [1, C, h, w], float32, on the device of the autoencoder.

    Args:
        pixels: takes a tile in latent cells and returns the picture under it, [1, 3, f*h, f*w] in [0, 1].
        size: (h, w) of the latents.
        noise: standard normal, latent shape: a sample of the posterior. None: its mean. An AutoencoderTiny has no
            posterior and ignores it.
        budget: says how much memory waiting tiles may hold.
    """

    def source(tile: Tile) -> Tensor:
        return (2 * pixels(tile) - 1).to(vae.dtype)

    outer = vae.quant_conv if getattr(vae, "quant_conv", None) is not None else nn.Identity()

    moments = torch.empty(0)
    for part, values in run("encode", vae.encoder, source, size, halo(vae), budget, progress):
        values = outer(values)
        if moments.numel() == 0:
            moments = values.new_empty((1, values.shape[1], *size), dtype=torch.float32)
        part.of(moments).copy_(values)
    if isinstance(vae, AutoencoderTiny):
        return moments * vae.config["scaling_factor"]
    z, log_variance = moments.chunk(2, dim=1)
    if noise is not None:
        z = z + (log_variance.clamp(-30, 20) / 2).exp() * noise
    return z * vae.config["scaling_factor"]


@torch.no_grad()
def decode(vae: Any, z: Tensor, factor: int, budget: Budget, progress: Progress | None = None) -> Tensor:
    """Scaled latents [1, C, h, w] -> [3, f*h, f*w] float32 in host memory, nominally in [0, 1], not clamped."""
    z = z / vae.config["scaling_factor"]
    size = (z.shape[2], z.shape[3])
    whole = torch.empty(3, factor * size[0], factor * size[1])
    inner = vae.post_quant_conv if getattr(vae, "post_quant_conv", None) is not None else nn.Identity()

    def source(tile: Tile) -> Tensor:
        return inner(tile.of(z).to(vae.dtype))

    def work() -> Tensor:
        for part, pixels in run("decode", vae.decoder, source, size, halo(vae), budget, progress):
            part.times(factor).of(whole).copy_(pixels[0].float() / 2 + 0.5)
        return whole

    return again_in_float32(work, budget, vae)


def encoder_stages(encoder: Any) -> list[Stage]:
    """Pixels -> moments (or a tiny one's latents), a stage per resolution."""
    if not isinstance(encoder, Encoder):
        return [functools.partial(never_waits, encoder)]

    def last(x: Tensor) -> Walk:
        x = yield from middle(encoder.mid_block, x)
        x = yield encoder.conv_norm_out, x
        return encoder.conv_out(F.silu(x))

    first = functools.partial(never_waits, encoder.conv_in)
    return [first, *(functools.partial(level, block) for block in encoder.down_blocks), last]


def decoder_stages(decoder: Any) -> list[Stage]:
    """Latents -> pixels, a stage per resolution."""
    if not isinstance(decoder, Decoder):
        return [functools.partial(never_waits, decoder)]

    def first(x: Tensor) -> Walk:
        return (yield from middle(decoder.mid_block, decoder.conv_in(x)))

    def last(x: Tensor) -> Walk:
        x = yield decoder.conv_norm_out, x
        return decoder.conv_out(F.silu(x))

    return [first, *(functools.partial(level, block) for block in decoder.up_blocks), last]


def never_waits(network: Callable[[Tensor], Tensor], x: Tensor) -> Walk:
    yield from ()
    return network(x)


def level(block: Any, x: Tensor) -> Walk:
    """The residual blocks of one resolution, then the step to the next."""
    for layer in block.resnets:
        x = yield from resnet(layer, x)
    for layer in [*(getattr(block, "upsamplers", None) or []), *(getattr(block, "downsamplers", None) or [])]:
        x = layer(x)
    return x


def middle(block: Any, x: Tensor) -> Walk:
    x = yield from resnet(block.resnets[0], x)
    for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
        inner = yield attention.group_norm, x
        inner = yield attention, inner
        x = yield from resnet(layer, x + inner)
    return x


def resnet(layer: Any, x: Tensor) -> Walk:
    inner = yield layer.norm1, x
    inner = yield layer.norm2, layer.conv1(F.silu(inner))
    inner = layer.conv2(F.silu(inner))
    return (x if layer.conv_shortcut is None else layer.conv_shortcut(x)) + inner


def halo(vae: Any) -> int:
    return HALO_TINY if isinstance(vae, AutoencoderTiny) else HALO


def waits(network: nn.Module) -> int:
    """At how many layers a tile has to wait for the others."""
    return sum(isinstance(module, (nn.GroupNorm, Attention)) for module in network.modules())


def run(
    name: str,
    network: nn.Module,
    source: Callable[[Tile], Tensor],
    size: tuple[int, int],
    halo: int,
    budget: Budget,
    progress: Progress | None,
) -> Iterator[tuple[Tile, Tensor]]:
    """Walks every tile of `size` cells through the network; yields (part in cells, values of that part)."""
    tiles = grid(*size, TILE, 2 * halo)
    if len(tiles) == 1:
        yield tiles[0], at_once(name, network, source(tiles[0]), budget, progress or Progress())
        return
    stages = (encoder_stages if name == "encode" else decoder_stages)(network)
    walks = [TileWalk(stages, source, tile, part) for tile, part in zip(tiles, cores(tiles), strict=True)]
    known: dict[nn.Module, Whole] = {}
    progress = progress or Progress()
    progress.start(name, len(walks) * (waits(network) + 1))

    def forget() -> None:
        for walk in walks:
            walk.forget()

    while True:
        found: Whole | None = None
        for walk in walks:
            layer = budget.attempt("hold", functools.partial(walk.go_on, known), forget)
            progress.advance()
            if layer is None:
                check_finite(walk.x, name)
                yield walk.part, walk.inner()
                walk.forget()
                continue
            found = found or (WholeNorm(layer) if isinstance(layer, nn.GroupNorm) else WholeAttention(layer, size))
            found.look(walk.inner(), walk.part)
            walk.spare(budget.hold // len(walks))
        if found is None:
            return
        check_finite(found.finish(), name)
        known[found.module] = found


def at_once(name: str, network: nn.Module, x: Tensor, budget: Budget, progress: Progress) -> Tensor:
    """What fits in one tile needs no waiting."""
    progress.start(name, 1)
    found = budget.attempt("hold", lambda: network(x))
    check_finite(found, name)
    progress.advance()
    return found


class TileWalk:
    """One tile on its way through the stages, and the part of the picture that it alone gives, in cells."""

    x: Tensor  # what it has come to: the input of the layer it waits for, or the result

    def __init__(self, stages: list[Stage], source: Callable[[Tile], Tensor], tile: Tile, part: Tile) -> None:
        self.stages, self.source, self.tile, self.part = stages, source, tile, part
        self.forget()

    def forget(self) -> None:
        """Back to the beginning, nothing held."""
        self.mark: tuple[int, Tensor | None] = (0, None)  # a stage to start again from, and its input (None: source)
        self.latest = self.mark
        self.walk: Walk | None = None
        self.layer: nn.Module | None = None
        self.x = torch.empty(0)

    def go_on(self, known: dict[nn.Module, Whole]) -> nn.Module | None:
        """Walks up to the next layer that is not known yet, and returns it; None at the end."""
        if self.walk is None:
            stage, x = self.latest = self.mark
            self.walk, self.layer = self.stages[stage](self.source(self.tile) if x is None else x), None
        while True:
            try:
                if self.layer is None:
                    self.layer, self.x = next(self.walk)
                elif self.layer in known:
                    self.layer, self.x = self.walk.send(known[self.layer](self.x))
                else:
                    return self.layer
            except StopIteration as end:
                self.x = end.value
                stage = self.latest[0] + 1
                if stage == len(self.stages):
                    return None
                self.latest = stage, self.x
                self.walk, self.layer = self.stages[stage](self.x), None

    def spare(self, allowance: int) -> None:
        """Gives up what does not fit in `allowance` bytes: first the walk, then the input of its stage."""
        _, x = self.latest
        mark = 0 if x is None else x.nbytes
        if mark <= allowance:
            self.mark = self.latest
        if mark + 2 * self.x.nbytes > allowance:  # the layer's input and the residual beside it
            self.latest, self.walk, self.x = self.mark, None, torch.empty(0)

    def inner(self) -> Tensor:
        """What `x` says of the tile's own part, [1, C, h, w]."""
        tile, part = self.tile, self.part
        scale = self.x.shape[3] // (tile.right - tile.left)
        shifted = Tile(part.top - tile.top, part.left - tile.left, part.bottom - tile.top, part.right - tile.left)
        return shifted.times(scale).of(self.x)


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
