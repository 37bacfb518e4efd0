"""VAE encode and decode: one pass for images of one tile, the same result by row strips or tiles for larger ones."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seesr.networks.autoencoders import AutoencoderTiny, Decoder, DecoderTiny, Encoder, EncoderTiny
from seesr.runtime.memory import Budget
from seesr.runtime.precision import check_finite, retry_in_float32
from seesr.runtime.progress import Progress
from seesr.runtime.shared_tiles import SharedTiles
from seesr.runtime.tiling import Tile, cores, grid
from seesr.vae import row_strips
from seesr.vae.lockstep_tiles import Stage, decoder_stages, encoder_stages, walk_tiles

TILE = 96  # side of a tile with its halo, latent pixels
TINY_ACTIVATIONS = 6  # activations of the widest layer that one pass of an AutoencoderTiny holds at once, at most
HALO = 8  # latent pixels; values farther away have no measurable effect (docs/decisions/0005)
TILE_TINY = 256  # the same of an AutoencoderTiny, where memory allows; larger ones are cancelled late
HALO_TINY = 16  # an AutoencoderTiny has no layer to wait at; nothing beyond this can matter


class Posterior(NamedTuple):
    """The encoder's posterior: a normal distribution per latent value, [1, C, h, w] float32, unscaled."""

    centre: Tensor
    deviation: Tensor
    scaling: float

    def mean(self) -> Tensor:
        """The scaled mode of the distribution."""
        return self.centre * self.scaling

    def sample(self, noise: Tensor) -> Tensor:
        """Scaled latents drawn with standard normal `noise` of the same shape."""
        return (self.centre + self.deviation * noise) * self.scaling


@torch.no_grad()
def encode(
    vae: Any,
    pixels: Callable[[Tile], Tensor],
    size: tuple[int, int],
    budget: Budget,
    progress: Progress,
    part: Tile | None = None,
    share: SharedTiles | None = None,
) -> Posterior:
    """Pixels -> the posterior of the latents, on the device of the autoencoder.

    An AutoencoderTiny has no posterior: its deviation is 0.

    Args:
        pixels: takes a tile in latent pixels and returns the image under it, [1, 3, f*h, f*w] in [0, 1].
        size: (h, w) of the latents.
        budget: limits the memory that paused tiles may hold.
        part: the latent pixels that are needed; others are 0. None, or an autoencoder that is not local: all.
        share: computes the tiles of a local autoencoder together with other processes.

    Raises:
        NotFinite, OutOfMemory: one line.
    """
    outer = vae.quant_conv if getattr(vae, "quant_conv", None) is not None else nn.Identity()

    def source(tile: Tile) -> Tensor:
        return (2 * pixels(tile) - 1).to(vae.dtype)

    def work() -> Tensor:
        moments = torch.empty(0)
        for place, values in run_part(
            "encode", vae, vae.encoder, encoder_stages, source, size, part, budget, progress, share
        ):
            values = outer(values)
            if moments.numel() == 0:
                moments = values.new_zeros((1, values.shape[1], *size), dtype=torch.float32)
            place.crop(moments).copy_(values)
        return moments

    moments = retry_in_float32(work, budget, vae)
    scaling = vae.config["scaling_factor"]
    if is_local(vae):
        return Posterior(moments, torch.zeros_like(moments), scaling)
    centre, log_variance = moments.chunk(2, dim=1)
    return Posterior(centre, (log_variance.clamp(-30, 20) / 2).exp(), scaling)


@torch.no_grad()
def decode(
    vae: Any,
    z: Tensor,
    factor: int,
    budget: Budget,
    progress: Progress,
    part: Tile | None = None,
    share: SharedTiles | None = None,
) -> Tensor:
    """Scaled latents [1, C, h, w] -> [3, f*h, f*w] float32, nominally in [0, 1], not clamped; on a GPU it stays there.

    Args:
        part: the latent pixels whose image is needed; the rest of it is 0. None, or an autoencoder that is not local:
            all.
        share: as for `encode`.

    Raises:
        NotFinite, OutOfMemory: one line.
    """
    z = z / vae.config["scaling_factor"]
    size = (z.shape[2], z.shape[3])
    inner = vae.post_quant_conv if getattr(vae, "post_quant_conv", None) is not None else nn.Identity()

    def source(tile: Tile) -> Tensor:
        return inner(tile.crop(z).to(vae.dtype))

    def work() -> Tensor:
        whole = torch.empty(0)
        for place, pixels in run_part(
            "decode", vae, vae.decoder, decoder_stages, source, size, part, budget, progress, share
        ):
            if whole.numel() == 0:
                whole = torch.zeros(3, factor * size[0], factor * size[1], device=z.device)
            place.scaled(factor).crop(whole).copy_(pixels[0].float() / 2 + 0.5)
        return whole

    return retry_in_float32(work, budget, vae)


def halo(vae: Any) -> int:
    return HALO_TINY if is_local(vae) else HALO


def is_local(vae: Any) -> bool:
    """Whether the receptive field ends at HALO_TINY latent pixels: no layer sees the whole image."""
    return isinstance(vae, AutoencoderTiny)


def run_part(
    name: str,
    vae: Any,
    network: nn.Module,
    stages: Callable[[Any], list[Stage]],
    source: Callable[[Tile], Tensor],
    size: tuple[int, int],
    part: Tile | None,
    budget: Budget,
    progress: Progress,
    share: SharedTiles | None = None,
) -> Iterator[tuple[Tile, Tensor]]:
    """Sends `part` and what it can depend on through the network, see `run`; None or global layers: everything."""
    if part is None or not is_local(vae):
        yield from run(name, network, stages, source, size, halo(vae), budget, progress, share)
        return
    window = part.grown(halo(vae), *size)

    def inside(tile: Tile) -> Tensor:
        return source(tile.moved(window.top, window.left))

    inner = window.bottom - window.top, window.right - window.left
    for place, values in run(name, network, stages, inside, inner, halo(vae), budget, progress, share):
        yield place.moved(window.top, window.left), values


def run(
    name: str,
    network: nn.Module,
    stages: Callable[[Any], list[Stage]],
    source: Callable[[Tile], Tensor],
    size: tuple[int, int],
    halo: int,
    budget: Budget,
    progress: Progress,
    share: SharedTiles | None = None,
) -> Iterator[tuple[Tile, Tensor]]:
    """Runs the network over `size` latent pixels; yields (part in latent pixels, finite values of that part).

    Args:
        name: of the stage, for progress and errors.
        stages: cuts the network where a tile can start again.
        source: gives the network's input under a tile.
    """
    tiles = grid(*size, TILE, 2 * halo)
    if len(tiles) > 1:
        work = functools.partial(run_whole, name, network, source, size, budget, progress)
        whole = budget.whole.attempt(work, lower=functools.partial(smaller, network, size))
        if whole is not None:
            yield Tile(0, 0, *size), whole
            return
        if is_tiny(network):
            tiles = grid(*size, tiny_side(network, budget.whole.amount), 2 * halo)
            if share is not None:
                yield from run_shared(name, network, source, tiles, budget, progress, share)
                return
        yield from walk_tiles(name, network, stages(network), source, tiles, cores(tiles), size, budget, progress)
        return
    progress.start(name)
    values = budget.single.attempt(lambda: network(source(tiles[0])))
    check_finite(values, name)
    progress.advance()
    yield tiles[0], values


def run_shared(
    name: str,
    network: nn.Module,
    source: Callable[[Tile], Tensor],
    tiles: list[Tile],
    budget: Budget,
    progress: Progress,
    share: SharedTiles,
) -> Iterator[tuple[Tile, Tensor]]:
    """Runs independent tiles together with other processes, see `run`."""
    parts = cores(tiles)
    progress.start(name, len(tiles))
    inner = [part.moved(-tile.top, -tile.left) for tile, part in zip(tiles, parts, strict=True)]

    def run(tile: Tile) -> Tensor:
        return budget.hold.attempt(lambda: network(source(tile)))

    try:
        for part, values in zip(parts, share.parts(name, network, run, source, tiles, inner), strict=True):
            check_finite(values, name)
            progress.advance()
            yield part, values
    finally:
        share.stop()


def is_tiny(network: nn.Module) -> bool:
    """Whether a network is a half of an AutoencoderTiny."""
    return isinstance(network, (EncoderTiny, DecoderTiny))


def tiny_side(network: nn.Module, amount: int) -> int:
    """Side of the largest tile whose activations fit in `amount` bytes, latent pixels: from TILE to TILE_TINY."""
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    doublings = sum(isinstance(m, nn.Upsample) or getattr(m, "stride", None) == (2, 2) for m in network.modules())
    width = max(module.out_channels for module in convolutions)
    each = TINY_ACTIVATIONS * width * 4**doublings * convolutions[0].weight.element_size()
    return max(TILE, min(TILE_TINY, math.isqrt(amount // each)))


def smaller(network: Any, size: tuple[int, int], amount: int) -> int:
    """The bytes of the next smaller way to pass over the whole, for one that did not fit; 0 where there is none."""
    if is_tiny(network):
        return 0
    peak, frugal = (row_strips.peak(network, size, frugal) for frugal in (False, True))
    return frugal if frugal < peak <= amount else 0


def run_whole(
    name: str,
    network: nn.Module,
    source: Callable[[Tile], Tensor],
    size: tuple[int, int],
    budget: Budget,
    progress: Progress,
) -> Tensor | None:
    """One pass, in strips where a layer sees the whole, see `run`; None where it does not fit in memory."""
    if is_tiny(network):
        if max(size) > tiny_side(network, budget.whole.amount):
            return None
        progress.start(name)
        values = network(source(Tile(0, 0, *size)))
        check_finite(values, name)
        progress.advance()
        return values
    assert isinstance(network, (Encoder, Decoder))
    frugal = row_strips.peak(network, size) > budget.whole.amount
    if frugal and row_strips.peak(network, size, frugal) > budget.whole.amount:
        return None
    progress.start(name, row_strips.layers(network))
    values = row_strips.Strips(network, progress.advance, frugal).run(source(Tile(0, 0, *size)))
    check_finite(values, name)
    return values
