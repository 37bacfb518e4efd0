"""Counts the work of every stage of one image, before it begins and without computing it."""

from __future__ import annotations

from typing import NamedTuple

from seesr.images.mask import Grey
from seesr.pipeline.tile_skipping import bounds, needed, visible_part
from seesr.runtime.tiling import ATTENTION_AREA, Tile, attention_keys, grid, least_work
from seesr.settings import Settings

ATTENTION_KEYS = 300_000  # at which the middle attention costs as much as all convolutions; results/counts.md


class Outline(NamedTuple):
    """What has to be known of a bundle's networks on a device to plan an image. Numbers alone: it is kept in a file.

    Attributes:
        factor: pixels per latent pixel, each way.
        levels: resolutions of the UNet.
        tile: side of the latent square that the UNet was trained at.
        steps: denoising steps by default.
        sides: of the denoiser's tiles by default, latent pixels.
        halo: latent pixels around one that its image depends on; None: the autoencoder sees the whole image.
        encoder_side, decoder_side: of the largest part that a local autoencoder computes at once, latent pixels.
    """

    factor: int
    levels: int
    tile: int
    steps: int
    sides: tuple[int, ...]
    halo: int | None
    encoder_side: int
    decoder_side: int

    def padding(self, sides: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
        """(multiple, least) of the sides of the bicubic upscale that the networks see, pixels.

        Args:
            sides: that the denoiser's tiles may have, latent pixels.
            size: (width, height) of the output.
        """
        tile = min(self.tile, *sides) * self.factor
        thin = min(size) <= tile // 4 and max(size) > tile  # a whole tile would multiply its cost
        return self.factor * 2 ** (self.levels - 1), tile // 8 if thin else tile

    def latent_size(self, sides: tuple[int, ...], size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the latents of the padded upscale, see `padding` for the arguments."""
        multiple, least = self.padding(sides, size)
        width, height = (max(least, -(-side // multiple) * multiple) // self.factor for side in size)
        return height, width

    def tile_sides(self, settings: Settings) -> tuple[int, ...]:
        """The sides that the denoiser's tiles may have, latent pixels."""
        return self.sides if settings.latent_tiled_size is None else (settings.latent_tiled_size,)


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


def plan(outline: Outline, settings: Settings, size: tuple[int, int], mask: Grey | None = None) -> Plan:
    """Plans an image, see `count` for the arguments and errors."""
    output, factor = settings.output_size(*size), outline.factor
    scale = output[0] / size[0]
    steps, sides = settings.num_inference_steps, outline.tile_sides(settings)
    steps = outline.steps if steps is None else steps
    latent = outline.latent_size(sides, output)
    padded = latent[0] * factor, latent[1] * factor
    tiles = grid(*latent, least_work(*latent, sides, settings.latent_tiled_overlap), settings.latent_tiled_overlap)
    per_step = needed(outline.halo, settings, steps, mask, tiles, output, padded, scale) or [tiles] * steps
    part = visible_part(settings, scale, factor, latent) if outline.halo is not None else None
    seen = None if part is None else bounds([part, *per_step[0]])
    area = (tiles[0].bottom - tiles[0].top) * (tiles[0].right - tiles[0].left)
    return Plan(output, latent, per_step, area, part, seen)


def shown_megapixels(settings: Settings, output: tuple[int, int]) -> float:
    """Megapixels of all images in the result's file, of an output of (width, height)."""
    region = settings.rectangle
    shown = output[0] * output[1] if region is None else region.width * region.height
    return sum(view.columns for view in settings.views.values()) * shown / 1e6


def count(outline: Outline, settings: Settings, size: tuple[int, int], mask: Grey | None = None) -> dict[str, float]:
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
    return units(outline, settings, size, plan(outline, settings, size, mask), mask is not None)


def units(
    outline: Outline, settings: Settings, size: tuple[int, int], planned: Plan, masked: bool = False
) -> dict[str, float]:
    """The units of a planned image, see `count`."""
    factor, area, output = outline.factor, planned.tile_area, planned.output
    passes = (2 if settings.cfg_scale > 1 else 1) * (settings.num_particles if settings.steered else 1)
    changed = settings.fidelity > 0 or masked
    decoded = settings.num_particles if any(view.calibrated for view in settings.views.values()) else 1
    return {
        "read": size[0] * size[1] / 1e6,
        "tags": 1.0,
        "text": 2.0 if settings.cfg_scale > 1 else 1.0,
        "enlarge": output[0] * output[1] / 1e6,
        "encode": autoencoder_work(outline, outline.encoder_side, planned.latent, planned.seen) * factor**2 / 1e6,
        "denoise": planned.tiles * passes * area * (1 + area / ATTENTION_AREA) / 1e6,
        "decode": decoded
        * autoencoder_work(outline, outline.decoder_side, planned.latent, planned.part)
        * factor**2
        / 1e6,
        "finish": (2 if changed else 1) * output[0] * output[1] / 1e6,
        f"file:{settings.suffix}": shown_megapixels(settings, output),
    }


class Term(NamedTuple):
    """The time of a stage: `times` x what the line of the first measured name of `names` gives for `units`."""

    names: tuple[str, ...]
    units: float
    times: float = 1.0


def terms(
    outline: Outline, settings: Settings, size: tuple[int, int], planned: Plan, masked: bool = False
) -> dict[str, Term]:
    """The units of a planned image for rates by line, by stage.

    A tile of the denoiser costs its conditioning features once, and each pass over it. Tiles of another area have
    another rate, so that each area has its own line and all of them share one for areas that were not measured.
    """
    result = {name.partition(":")[0]: Term((name,), value) for name, value in units(
        outline, settings, size, planned, masked
    ).items()}  # fmt: skip
    area, tiles = planned.tile_area, len(planned.steps[0])
    passes = planned.tiles * (2 if settings.cfg_scale > 1 else 1) * (settings.num_particles if settings.steered else 1)
    whole = tiles * area * (1 + area / ATTENTION_AREA) / 1e6
    result["denoise"] = Term((f"denoise:{area}", "denoise"), passes / max(1, tiles), whole)
    return result


def autoencoder_work(outline: Outline, side: int, size: tuple[int, int], part: Tile | None) -> float:
    """Latent pixels that half an autoencoder computes, with the overlaps of tiles; attention adds what it costs.

    Args:
        side: of the largest part that is computed at once.
        size: (height, width) of the latents.
        part: what is needed of them; None: all.
    """
    halo = outline.halo
    if halo is None:
        return size[0] * size[1] * (1 + attention_keys(size) / ATTENTION_KEYS)
    if part is not None:
        window = part.grown(halo, *size)
        size = window.bottom - window.top, window.right - window.left
    tiles = [Tile(0, 0, *size)] if max(size) <= side else grid(*size, side, 2 * halo)
    return sum((tile.bottom - tile.top) * (tile.right - tile.left) for tile in tiles)
