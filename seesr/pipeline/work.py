"""Counts the work of every stage of one image, before it begins and without computing it."""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Plan(NamedTuple):
    """What the networks compute for one image.

    Attributes:
        output: (width, height) of the whole output.
        latent: (height, width) of the latents.
        steps: for each denoising step the tiles that are computed.
        tile_area: latent pixels of a tile.
        part: latent pixels whose image is decoded; None: all.
        seen: latent pixels that are encoded; None: all.
    """

    output: tuple[int, int]
    latent: tuple[int, int]
    steps: list[list[Tile]]
    tile_area: int
    part: Tile | None
    seen: Tile | None

    @property
    def tiles(self) -> int:
        """Tiles of all steps."""
        return sum(map(len, self.steps))


def plan(networks: Models, settings: Settings, size: tuple[int, int], mask: Grey | None = None) -> Plan:
    """Plans an image, see `count` for the arguments and errors."""
    output, factor = settings.output_size(*size), networks.factor
    scale = output[0] / size[0]
    steps, sides = settings.num_inference_steps, tile_sides(networks, settings)
    steps = networks.bundle.defaults.num_inference_steps if steps is None else steps
    multiple, least = padding(networks, sides, output)
    width, height = (max(least, -(-side // multiple) * multiple) for side in output)
    latent = height // factor, width // factor
    tiles = grid(*latent, least_work(*latent, sides, settings.latent_tiled_overlap), settings.latent_tiled_overlap)
    each = needed(networks.vae, settings, steps, mask, tiles, output, (height, width), scale) or [tiles] * steps
    part = visible_part(settings, scale, factor, latent) if autoencoder.is_local(networks.vae) else None
    seen = None if part is None else bounds([part, *each[0]])
    area = (tiles[0].bottom - tiles[0].top) * (tiles[0].right - tiles[0].left)
    return Plan(output, latent, each, area, part, seen)


def shown_megapixels(settings: Settings, output: tuple[int, int]) -> float:
    """Megapixels of all images in the result's file, of an output of (width, height)."""
    region = settings.rectangle
    shown = output[0] * output[1] if region is None else region.width * region.height
    return sum(view.columns for view in settings.views.values()) * shown / 1e6


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
    return units(networks, settings, size, plan(networks, settings, size, mask), mask is not None)


def units(
    networks: Models, settings: Settings, size: tuple[int, int], planned: Plan, masked: bool = False
) -> dict[str, float]:
    """The units of a planned image, see `count`."""
    factor, area, output = networks.factor, planned.tile_area, planned.output
    passes = (2 if settings.cfg_scale > 1 else 1) * (settings.num_particles if settings.steered else 1)
    vae: Any = networks.vae
    budget = Budget.for_device(networks.device, max(tile_sides(networks, settings)) ** 2)
    changed = settings.fidelity > 0 or masked
    return {
        "read": size[0] * size[1] / 1e6,
        "tags": 1.0,
        "text": 2.0 if settings.cfg_scale > 1 else 1.0,
        "enlarge": output[0] * output[1] / 1e6,
        "encode": autoencoder_work(vae, vae.encoder, planned.latent, planned.seen, budget) * factor**2 / 1e6,
        "denoise": planned.tiles * passes * area * (1 + area / ATTENTION_AREA) / 1e6,
        "decode": autoencoder_work(vae, vae.decoder, planned.latent, planned.part, budget) * factor**2 / 1e6,
        "finish": (2 if changed else 1) * output[0] * output[1] / 1e6,
        f"file:{settings.suffix}": shown_megapixels(settings, output),
    }


class Term(NamedTuple):
    """The time of a stage: `times` x what the line of the first measured name of `names` gives for `units`."""

    names: tuple[str, ...]
    units: float
    times: float = 1.0


def terms(
    networks: Models, settings: Settings, size: tuple[int, int], planned: Plan, masked: bool = False
) -> dict[str, Term]:
    """The units of a planned image for rates by line, by stage.

    A tile of the denoiser costs its conditioning features once, and each pass over it. Tiles of another area have
    another rate, so that each area has its own line and all of them share one for areas that were not measured.
    """
    found = {name.partition(":")[0]: Term((name,), value) for name, value in units(
        networks, settings, size, planned, masked
    ).items()}  # fmt: skip
    area, tiles = planned.tile_area, len(planned.steps[0])
    passes = planned.tiles * (2 if settings.cfg_scale > 1 else 1) * (settings.num_particles if settings.steered else 1)
    whole = tiles * area * (1 + area / ATTENTION_AREA) / 1e6
    found["denoise"] = Term((f"denoise:{area}", "denoise"), passes / max(1, tiles), whole)
    return found


def autoencoder_work(vae: Any, network: Any, size: tuple[int, int], part: Tile | None, budget: Budget) -> float:
    """Latent pixels that half an autoencoder computes for `part` of `size` = (height, width); None: for all of it."""
    if part is not None and autoencoder.is_local(vae):
        window = part.grown(autoencoder.halo(vae), *size)
        size = window.bottom - window.top, window.right - window.left
    return autoencoder.work(vae, network, size, budget)
