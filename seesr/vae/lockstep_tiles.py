"""Lockstep tiles: VAE tiles that pause at every global layer, so that the result equals one pass over the image.

A convolution needs only its neighbours: a tile with a margin (halo) gives it the same values as the whole image. But
a GroupNorm and the middle attention look at every pixel. So a tile runs as a generator that waits at each of these
layers; when the layer has observed every tile, it has the statistics of the whole image and the tiles continue. The
activations of a paused tile are cached if memory allows, else recomputed: the result is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.autoencoders import Attention, Decoder, Encoder
from seesr.runtime.memory import Budget
from seesr.runtime.precision import check_finite
from seesr.runtime.progress import Progress
from seesr.runtime.tiling import Tile
from seesr.vae.global_layers import GlobalAttention, GlobalLayer, GlobalNorm

Walk = Generator[tuple[nn.Module, Tensor], Tensor, Tensor]  # yields (layer, its input), is sent the output
Stage = Callable[[Tensor], Walk]


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


def waits(network: nn.Module) -> int:
    """Number of layers at which a tile waits for the others."""
    return sum(isinstance(module, (nn.GroupNorm, Attention)) for module in network.modules())


def walk_tiles(
    name: str,
    network: nn.Module,
    stages: list[Stage],
    source: Callable[[Tile], Tensor],
    tiles: list[Tile],
    parts: list[Tile],
    size: tuple[int, int],
    budget: Budget,
    progress: Progress,
) -> Iterator[tuple[Tile, Tensor]]:
    """Walks every tile through the stages; yields (part in latent pixels, values of that part).

    Args:
        parts: for every tile the latent pixels that only it contributes; together they cover the whole.
        size: (h, w) of the whole, latent pixels.
    """
    walks = [TileWalk(stages, source, tile, part) for tile, part in zip(tiles, parts, strict=True)]
    known: dict[nn.Module, GlobalLayer] = {}
    progress.start(name, len(walks) * (waits(network) + 1))

    def forget() -> None:
        for walk in walks:
            walk.forget()

    while True:
        whole: GlobalLayer | None = None
        for walk in walks:

            def advance(walk: TileWalk = walk) -> nn.Module | None:
                """Walks to the next global layer and shows it this tile's part; None at the end."""
                nonlocal whole
                layer = walk.go_on(known)
                if layer is not None:
                    whole = whole or (
                        GlobalNorm(layer) if isinstance(layer, nn.GroupNorm) else GlobalAttention(layer, size)
                    )
                    whole.observe(walk.inner(), walk.part)
                return layer

            layer = budget.hold.attempt(advance, forget)
            progress.advance()
            if layer is None:
                check_finite(walk.x, name)
                yield walk.part, walk.inner()
                walk.forget()
                continue
            walk.spare(budget.hold.amount // len(walks))
        if whole is None:
            return
        check_finite(budget.hold.attempt(whole.finish, forget), name)
        known[whole.module] = whole


class TileWalk:
    """The state of one tile between stages, and the part of the image that only it contributes, in latent pixels."""

    x: Tensor  # the input of the layer that it waits for, or the result

    def __init__(self, stages: list[Stage], source: Callable[[Tile], Tensor], tile: Tile, part: Tile) -> None:
        self.stages, self.source, self.tile, self.part = stages, source, tile, part
        self.forget()

    def forget(self) -> None:
        """Drops all activations: the tile starts again from its source."""
        self.mark: tuple[int, Tensor | None] = (0, None)  # a stage to start again from, and its input (None: source)
        self.latest = self.mark
        self.walk: Walk | None = None
        self.layer: nn.Module | None = None
        self.x = torch.empty(0)

    def go_on(self, known: dict[nn.Module, GlobalLayer]) -> nn.Module | None:
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
        """Drops activations that do not fit in `allowance` bytes: first the generator, then the input of its stage."""
        _, x = self.latest
        mark = 0 if x is None else x.nbytes
        if mark <= allowance:
            self.mark = self.latest
        if mark + 2 * self.x.nbytes > allowance:  # the layer's input and the residual beside it
            self.latest, self.walk, self.x = self.mark, None, torch.empty(0)

    def inner(self) -> Tensor:
        """The crop of `x` to the part that only this tile contributes, [1, C, h, w]."""
        tile, part = self.tile, self.part
        scale = self.x.shape[3] // (tile.right - tile.left)
        shifted = Tile(part.top - tile.top, part.left - tile.left, part.bottom - tile.top, part.right - tile.left)
        return shifted.scaled(scale).crop(self.x)
