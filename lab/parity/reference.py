"""Reproduces the parts of the SeeSR reference that this project does differently, so that the rest can be compared."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seesr.runtime.tiling import Tile
from seesr.vae import lockstep_tiles
from seesr.vae.global_layers import GlobalAttention, GlobalNorm


def foreign_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our UNet and ControlNet names -> the reference's; the inverse of convert.diffusion_keys."""
    names = {}
    for key, value in state.items():
        key = re.sub(r"attentions\.(\d+)\.image\.", r"image_attentions.\1.", key)
        names[re.sub(r"attentions\.(\d+)\.text\.", r"attentions.\1.", key)] = value
    return names


def latent_tiles(height: int, width: int, tile: int, overlap: int) -> list[Tile]:
    """The reference's tiles: one if height * width <= tile^2, else greedy steps with the last tile pushed back."""
    if height * width <= tile * tile:
        return [Tile(0, 0, height, width)]
    side = min(tile, height, width)

    def starts(size: int) -> list[int]:
        count = 1
        while (count - 1) * (side - overlap) + side < size:
            count += 1
        return [i * (side - overlap) for i in range(count - 1)] + [size - side]

    return [Tile(top, left, top + side, left + side) for top in starts(height) for left in starts(width)]


def gaussian_window(height: int, width: int) -> Tensor:
    """The reference's tile weights, [height, width] float64: variance 0.01 and a vertical centre half a cell off."""

    def profile(size: int, centre: float) -> Tensor:
        i = torch.arange(size, dtype=torch.float64)
        return torch.exp(-(((i - centre) / size) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)

    return profile(height, height / 2)[:, None] * profile(width, (width - 1) / 2)[None, :]


def real_tile(size: int, tile: int, pad: int) -> int:
    """The reference evens out tiles and rounds their size up to a multiple of 32, 16, 8, 4 or 2 that fits."""
    count = max(math.ceil((size - 2 * pad) / tile), 1)
    low = math.ceil((size - 2 * pad) / count)
    for divisor in (32, 16, 8, 4, 2):
        above = math.ceil(low / divisor) * divisor
        if above == low or above <= tile:
            return above
    return low


def vae_boxes(height: int, width: int, tile: int, encoder: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Input and output boxes [x1, x2, y1, y2] of the reference's tiled VAE."""
    pad = 32 if encoder else 11

    def spans(size: int) -> list[tuple[list[int], list[int]]]:
        count, real = max(math.ceil((size - 2 * pad) / tile), 1), real_tile(size, tile, pad)
        results = []
        for j in range(count):
            start, end = pad + j * real, min(pad + (j + 1) * real, size)
            out = [0 if start <= pad else start, size if end >= size - pad else end]
            scaled = [side // 8 if encoder else side * 8 for side in out]
            results.append(([max(start - pad, 0), min(end + pad, size)], scaled))
        return results

    inputs, outputs = [], []
    for row_in, row_out in spans(height):
        for column_in, column_out in spans(width):
            inputs.append([*column_in, *row_in])
            outputs.append([*column_out, *row_out])
    return inputs, outputs


class TilesNorm:
    """The reference's GroupNorm over tiles: statistics averaged over tiles, without the variance between them."""

    def __init__(self, norm: Any, tiles: list[Tensor]) -> None:
        self.whole = GlobalNorm(norm)
        shares = torch.tensor([tile[0, 0].numel() for tile in tiles], dtype=torch.float32)
        shares = (shares / shares.sum())[:, None].to(tiles[0].device)
        parts = [torch.var_mean(t.float().reshape(norm.num_groups, -1), dim=1, correction=0) for t in tiles]
        variance, mean = ((shares * torch.stack(values)).sum(0) for values in zip(*parts, strict=True))
        self.whole.use(mean, variance)

    def __call__(self, tile: Tensor) -> Tensor:
        return self.whole(tile)


def own_attention(attention: Any, x: Tensor) -> Tensor:
    """Attention within a tile: its latent pixels attend to each other only."""
    whole = GlobalAttention(attention, x.shape[2:])
    whole.observe(x, Tile(0, 0, 0, 0))
    whole.finish()
    return whole(x)


def in_step(stages: list[lockstep_tiles.Stage], tiles: list[Tensor]) -> list[Tensor]:
    """All tiles through all stages, layer by layer, with the reference's norms and attention."""

    def send(walk: lockstep_tiles.Walk, value: Any) -> tuple[Any, Tensor]:
        try:
            return walk.send(value)
        except StopIteration as end:
            return None, end.value

    for stage in stages:
        walks = [stage(tile) for tile in tiles]
        sent: list[Any] = [None] * len(walks)
        while True:
            waiting = [send(walk, value) for walk, value in zip(walks, sent, strict=True)]
            layer, tiles = waiting[0][0], [x for _, x in waiting]
            if layer is None:
                break
            if isinstance(layer, torch.nn.GroupNorm):
                norm = TilesNorm(layer, tiles)
                sent = [norm(x) for x in tiles]
            else:
                sent = [own_attention(layer, x) for x in tiles]
    return tiles


def tiled_encoder(encoder: Any, x: Tensor, tile: int | None) -> Tensor:
    return tiled(encoder, lockstep_tiles.encoder_stages(encoder), x, tile, True)


def tiled_decoder(decoder: Any, z: Tensor, tile: int | None) -> Tensor:
    return tiled(decoder, lockstep_tiles.decoder_stages(decoder), z, tile, False)


def tiled(network: Any, stages: list[lockstep_tiles.Stage], x: Tensor, tile: int | None, encoder: bool) -> Tensor:
    """The encoder or decoder network alone, un-tiled (tile None, or a small image) or as the reference tiles it."""
    height, width = x.shape[2:]
    pad = 32 if encoder else 11
    if tile is None or max(height, width) <= tile + 2 * pad:
        return network(x)
    inputs, outputs = vae_boxes(height, width, tile, encoder)
    parts = in_step(stages, [x[..., y1:y2, x1:x2] for x1, x2, y1, y2 in inputs])
    scale = (lambda side: side // 8) if encoder else (lambda side: side * 8)
    result = parts[0].new_zeros(1, parts[0].shape[1], scale(height), scale(width))
    for part, (x1, _, y1, _), (left, right, top, bottom) in zip(parts, inputs, outputs, strict=True):
        y, x_ = top - scale(y1), left - scale(x1)
        result[..., top:bottom, left:right] = part[..., y : y + bottom - top, x_ : x_ + right - left]
    return result


def prepare(pixels: np.ndarray, upscale: int, process_size: int) -> Image.Image:
    """The reference's resize chain, which resamples up to three times: small images up, then by scale, then to 8."""
    image = Image.fromarray(pixels)
    least = process_size // upscale
    if min(image.size) < least:
        ratio = least / min(image.size)
        image = image.resize((int(ratio * image.width), int(ratio * image.height)))
    image = image.resize((image.width * upscale, image.height * upscale))
    return image.resize((image.width // 8 * 8, image.height // 8 * 8))
