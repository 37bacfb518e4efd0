"""Plans and units of work of one image, counted by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from seesr import Settings
from seesr.pipeline import work
from seesr.runtime.tiling import ATTENTION_AREA, Tile

OUTLINE = work.Outline(4, 2, 64, 1, (64, 72), 24, 512, 512)  # as the pocket bundle's
GLOBAL = work.Outline(8, 4, 64, 2, (64, 72), None, 96, 96)  # as the full one's


@pytest.mark.parametrize(
    ("outline", "size", "expected"),
    [
        (OUTLINE, (100, 50), (64, 64)),
        (OUTLINE, (300, 270), (68, 76)),
        (OUTLINE, (300, 64), (16, 76)),
        (OUTLINE, (64, 301), (76, 16)),
        (GLOBAL, (1000, 520), (72, 128)),
        (GLOBAL, (512, 64), (64, 64)),
        (GLOBAL, (513, 64), (8, 72)),
    ],
)
def test_the_latents_of_a_padded_image(outline: work.Outline, size: tuple[int, int], expected: tuple) -> None:
    """(height, width): multiples of what the networks halve, and a tile at least unless the image is thin."""
    sides = outline.tile_sides(Settings())
    assert sides == (64, 72) and outline.tile_sides(Settings(latent_tiled_size=40)) == (40,)
    assert outline.latent_size(sides, size) == expected


def test_the_plan_of_an_image_and_of_a_region() -> None:
    settings = Settings(scale_factor=4)
    whole = work.plan(OUTLINE, settings, (160, 80))
    assert whole.output == (640, 320) and whole.latent == (80, 160)
    assert (whole.part, whole.seen, len(whole.steps)) == (None, None, 1)
    assert whole.tile_area == 64 * 64 and whole.tiles == len(whole.steps[0]) == 2 * 3
    part = work.plan(OUTLINE, settings.replace(region="0,0,16,16"), (160, 80))
    assert part.output == whole.output and part.latent == whole.latent
    assert part.part == Tile(0, 0, 12, 12)  # 16 pixels and 31 more
    assert part.steps == [[Tile(0, 0, 64, 64), Tile(16, 0, 80, 64)]] and part.seen == Tile(0, 0, 80, 64)
    blurred = work.plan(OUTLINE, settings.replace(region="0,0,16,16", fidelity=0.5), (160, 80))
    assert blurred.part == Tile(0, 0, 14, 14)  # 9 more at a scale of 4
    several = work.plan(OUTLINE, settings.replace(num_inference_steps=3), (160, 80))
    assert several.tiles == 3 * whole.tiles
    everything = work.plan(GLOBAL, settings.replace(region="0,0,16,16"), (160, 80))
    assert (everything.part, everything.seen, len(everything.steps)) == (None, None, 2)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.08),
        ({"output_view": "comparison"}, 0.16),
        ({"output_view": "all"}, 0.08 * 5),  # two of them side by side
        ({"output_view": "all", "use_kds": True}, 0.08 * 6),
        ({"region": "0,0,100,20"}, 0.002),
    ],
)
def test_the_pixels_in_a_file(changes: dict[str, Any], expected: float) -> None:
    assert work.shown_megapixels(Settings(**changes), (400, 200)) == pytest.approx(expected)


CHANGES: list[dict[str, Any]] = [
    {}, {"cfg_scale": 1.5}, {"num_inference_steps": 3}, {"use_kds": True, "num_particles": 3}, {"fidelity": 1.0},
    {"latent_tiled_size": 16}, {"cfg_scale": 1.5, "num_inference_steps": 2, "use_kds": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("outline", [OUTLINE, GLOBAL], ids=["local", "global"])
def test_terms_have_the_units_of_their_stages(changes: dict[str, Any], outline: work.Outline) -> None:
    """Of the denoiser: passes over each tile, times what all tiles of one step cost."""
    settings, size = Settings(scale_factor=2, **changes), (150, 100)
    planned = work.plan(outline, settings, size)
    units = {name.partition(":")[0]: value for name, value in work.units(outline, settings, size, planned).items()}
    terms = work.terms(outline, settings, size, planned)
    assert terms.keys() == units.keys()
    for stage, term in terms.items():
        assert term.units * term.times == pytest.approx(units[stage]), stage
    passes = (2 if settings.cfg_scale > 1 else 1) * (settings.num_particles if settings.steered else 1)
    steps = outline.steps if settings.num_inference_steps is None else settings.num_inference_steps
    denoise = terms["denoise"]
    assert denoise.names == (f"denoise:{planned.tile_area}", "denoise") and terms["file"].names == ("file:png",)
    assert denoise.units == (0 if settings.fidelity == 1 else passes * steps)
    area = planned.tile_area * (1 + planned.tile_area / ATTENTION_AREA)
    assert denoise.times == pytest.approx(len(planned.steps[0]) * area / 1e6)


def test_units_of_the_autoencoder_and_the_finish() -> None:
    settings, size = Settings(scale_factor=4), (160, 80)
    units = work.count(OUTLINE, settings, size)
    assert units["encode"] == units["decode"] == pytest.approx(80 * 160 * 16 / 1e6)
    assert units["read"] == pytest.approx(0.0128) and units["tags"] == units["text"] == 1
    assert work.count(OUTLINE, settings.replace(cfg_scale=1.5), size)["text"] == 2
    part = work.count(OUTLINE, settings.replace(region="0,0,16,16"), size)
    assert part["encode"] == pytest.approx(80 * (64 + 24) * 16 / 1e6)
    assert part["decode"] == pytest.approx((12 + 24) ** 2 * 16 / 1e6) and part["file:png"] == pytest.approx(256 / 1e6)
    assert units["finish"] == units["enlarge"] == pytest.approx(640 * 320 / 1e6)
    for more in (work.count(OUTLINE, settings.replace(fidelity=0.01), size),
                 work.count(OUTLINE, settings, size, np.full((8, 16), 9, np.uint8))):  # fmt: skip
        assert more["finish"] == 2 * units["finish"]


@pytest.mark.parametrize(("side", "tiles"), [(200, 1), (199, 2), (128, 2), (124, 2), (123, 3)])
def test_overlaps_of_the_autoencoder_s_tiles_count(side: int, tiles: int) -> None:
    """Of 100 x 200 latent pixels: neighbours have twice the halo of 24 in common."""
    assert work.autoencoder_work(OUTLINE, side, (100, 200), None) == tiles * 100 * side
    assert work.autoencoder_work(OUTLINE, side, (200, 100), None) == tiles * 100 * side
    assert tiles == max(1, math.ceil((200 - 48) / (side - 48)))
