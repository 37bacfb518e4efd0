"""Counts the work of every stage of one image, before it begins and without computing it."""

from __future__ import annotations

from typing import Any

from seesr.images.mask import Grey
from seesr.networks.models import Models
from seesr.pipeline.tile_skipping import bounds, needed, visible_part
from seesr.runtime.memory import Budget
from seesr.runtime.tiling import ATTENTION_AREA, Tile, grid, least_work
from seesr.settings import Settings
from seesr.vae import autoencoder


def padding(networks: Models, sides: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
    """(multiple, least) of the sides of the bicubic upscale that the networks see, pixels.

    Args:
        sides: that the denoiser's tiles may have, latent pixels.
        size: (width, height) of the output.
    """
    multiple = networks.factor * 2 ** (len(networks.unet.config["block_out_channels"]) - 1)
    tile = min(networks.tile, *sides) * networks.factor
    thin = min(size) <= tile // 4 and max(size) > tile  # a whole tile would multiply its cost
    return multiple, tile // 8 if thin else tile


def tile_sides(networks: Models, settings: Settings) -> tuple[int, ...]:
    """The sides that the denoiser's tiles may have, latent pixels."""
    side = settings.latent_tiled_size
    return networks.bundle.defaults.latent_tiled_size if side is None else (side,)


def count(networks: Models, settings: Settings, size: tuple[int, int], mask: Grey | None = None) -> dict[str, float]:
    """Units of work of every stage of one image; the time of a stage is proportional to its units on one machine.

    read: megapixels of the input. tags, text: passes. enlarge, finish, file: megapixels of the output. encode, decode:
    megapixels that the autoencoder computes, its tiles' overlaps included. denoise: millions of latent pixels over all
    tiles and passes, each with its attention.

    Args:
        size: (width, height) of the input.
        mask: where the model may change the image, of any size; None: everywhere.

    Raises:
        ValueError: the output would be too large, see Settings.output_size.
    """
    output, factor = settings.output_size(*size), networks.factor
    scale = output[0] / size[0]
    steps, sides = settings.num_inference_steps, tile_sides(networks, settings)
    steps = networks.bundle.defaults.num_inference_steps if steps is None else steps
    multiple, least = padding(networks, sides, output)
    width, height = (max(least, -(-side // multiple) * multiple) for side in output)
    latent = height // factor, width // factor
    tiles = grid(*latent, least_work(*latent, sides, settings.latent_tiled_overlap), settings.latent_tiled_overlap)
    each = needed(networks.vae, settings, steps, mask, tiles, output, (height, width), scale) or [tiles] * steps
    part = visible_part(settings, scale, factor, latent)
    seen = None if part is None else bounds([part, *each[0]])
    area = (tiles[0].bottom - tiles[0].top) * (tiles[0].right - tiles[0].left)
    passes = (2 if settings.cfg_scale > 1 else 1) * (settings.num_particles if settings.steered else 1)
    region = settings.rectangle
    shown = output[0] * output[1] if region is None else region.width * region.height
    columns = sum(view.columns for view in settings.views.values())
    vae: Any = networks.vae
    budget = Budget.for_device(networks.device, max(sides) ** 2)
    changed = settings.fidelity > 0 or mask is not None
    return {
        "read": size[0] * size[1] / 1e6,
        "tags": 1.0,
        "text": 2.0 if settings.cfg_scale > 1 else 1.0,
        "enlarge": output[0] * output[1] / 1e6,
        "encode": autoencoder_work(vae, vae.encoder, latent, seen, budget) * factor**2 / 1e6,
        "denoise": sum(map(len, each)) * passes * area * (1 + area / ATTENTION_AREA) / 1e6,
        "decode": autoencoder_work(vae, vae.decoder, latent, part, budget) * factor**2 / 1e6,
        "finish": (2 if changed else 1) * output[0] * output[1] / 1e6,
        f"file:{settings.suffix}": columns * shown / 1e6,
    }


def autoencoder_work(vae: Any, network: Any, size: tuple[int, int], part: Tile | None, budget: Budget) -> float:
    """Latent pixels that half an autoencoder computes for `part` of `size` = (height, width); None: for all of it."""
    if part is not None and autoencoder.is_local(vae):
        window = part.grown(autoencoder.halo(vae), *size)
        size = window.bottom - window.top, window.right - window.left
    return autoencoder.work(vae, network, size, budget)
