"""A region of the output has the pixels of the whole run, from fewer tiles."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import skimage.data

from seesr import Output, Settings, Upscaler
from seesr.images.color import REACH
from seesr.images.image_data import ImageData
from seesr.pipeline.tile_skipping import needed
from seesr.runtime.tiling import grid
from seesr.settings.parsing import settings_of
from seesr.vae.autoencoder import HALO_TINY

QUICK = Settings(num_inference_steps=1, seed=1, latent_tiled_size=16, scale_factor=2)
REGIONS = {
    "corner": (0, 0, 20, 15),
    "last corner": (107, 71, 13, 9),
    "middle": (51, 33, 30, 20),
    "across all tiles": (3, 40, 115, 5),
    "all": (0, 0, 120, 80),
}
RGB = skimage.data.chelsea()[60:100, 100:160]


def deep() -> ImageData:
    noise = np.random.default_rng(0).integers(0, 200, RGB.shape)
    return ImageData((RGB.astype(np.uint16) * 257) // 2 + noise.astype(np.uint16))


def with_alpha() -> ImageData:
    return ImageData(RGB, alpha=np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1)))


def flat() -> ImageData:
    rgb = RGB.copy()
    rgb[:, 20:] = 250
    return ImageData(rgb)


SOURCES = {
    "rgb": ImageData(RGB),
    "16 bits": deep(),
    "grey": ImageData(np.repeat(RGB[..., :1], 3, axis=2)),
    "alpha": with_alpha(),
    "flat": flat(),
}
HALF = np.zeros((40, 60), np.uint8)
HALF[:, :33] = 255


@pytest.fixture(scope="module")
def whole(pocket: Upscaler):
    """Runs without a region, each once."""

    @functools.cache
    def run(source: str, settings: Settings, masked: bool = False) -> Output:
        return pocket(SOURCES[source], settings, mask=HALF if masked else None)

    return run


def check(pocket: Upscaler, whole: Output, region: tuple[int, int, int, int], mask: np.ndarray | None = None) -> None:
    """Compares a run of the region with the crop of the whole run."""
    text = ",".join(map(str, region))
    part = pocket(whole.source, whole.settings.replace(region=text), mask=mask)
    left, top, width, height = region
    place = slice(top, top + height), slice(left, left + width)
    np.testing.assert_array_equal(part.image_data.rgb, whole.image_data.rgb[place])
    if whole.image_data.alpha is not None:
        np.testing.assert_array_equal(part.image_data.alpha, whole.image_data.alpha[place])
    assert part.image_data.size == (width, height) and part.metrics["output_size"] == f"{width}x{height}"
    assert part.metrics["region"] == text and part.metrics["tiles"] == whole.metrics["tiles"]


@pytest.mark.parametrize("region", REGIONS.values(), ids=REGIONS)
def test_a_region_is_the_crop_of_the_whole_image(pocket: Upscaler, whole, region: tuple) -> None:
    check(pocket, whole("rgb", QUICK), region)


@pytest.mark.parametrize("source", SOURCES)
def test_a_region_of_every_kind_of_image(pocket: Upscaler, whole, source: str) -> None:
    check(pocket, whole(source, QUICK), (70, 20, 31, 22))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_inference_steps": 2},
        {"scale_factor": 3.5, "latent_tiled_size": 32},
        {"fidelity": 0.3},
        {"fidelity": 1.0},
    ],
    ids=str,
)
def test_a_region_with_every_setting(pocket: Upscaler, whole, changes: dict) -> None:
    check(pocket, whole("rgb", QUICK.replace(**changes)), (0, 55, 41, 23))


def test_a_region_across_the_edge_of_a_mask(pocket: Upscaler, whole) -> None:
    for fidelity in (0.0, 0.3):
        check(pocket, whole("rgb", QUICK.replace(fidelity=fidelity), True), (50, 10, 40, 20), HALF)


def test_global_layers_compute_every_tile_of_a_region(tiny_upscaler: Upscaler) -> None:
    settings = QUICK.replace(latent_tiled_size=None)
    whole = tiny_upscaler(SOURCES["rgb"], settings)
    check(tiny_upscaler, whole, (5, 6, 40, 30))
    part = tiny_upscaler(SOURCES["rgb"], settings.replace(region="5,6,40,30"))
    assert part.metrics["tiles_skipped"] == 0
    with pytest.raises(ValueError, match="view comparison is drawn of the whole image; run again without region"):
        part.view("comparison")


@pytest.mark.parametrize("steps", [1, 2])
def test_the_networks_run_only_for_what_the_region_needs(pocket: Upscaler, steps: int) -> None:
    """An input of 160x40 pixels: 4 tiles of 15; encoder and decoder see what these can depend on."""
    wide = ImageData(np.concatenate([RGB, RGB[:, ::-1], RGB], axis=1)[:, :160])
    seen: dict[str, int] = {}
    networks = pocket.networks.vae
    hooks = [
        getattr(networks, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: inputs[0].shape[3]})
        )
        for name in ("encoder", "decoder")
    ]
    try:
        settings = QUICK.replace(num_inference_steps=steps, region="0,0,16,16")
        part = pocket(wide, settings)
    finally:
        for hook in hooks:
            hook.remove()
    reach = 4 + HALO_TINY + -(-REACH // 4)  # latent pixels: 16 pixels, the decoder, the color fix
    columns = [left for left in sorted({tile.left for tile in part.layout[0]}) if left < reach]
    rows = len({tile.top for tile in part.layout[0]})
    assert part.metrics["tiles"] - part.metrics["tiles_skipped"] == len(columns) * rows
    assert part.metrics["tiles_skipped"] >= part.metrics["tiles"] / 2
    assert seen["decoder"] <= reach + HALO_TINY + 1
    widest = columns[-1] + 16 + (16 if steps == 2 else 0)  # at the first step also the tiles that these overlap
    assert seen["encoder"] <= (widest + HALO_TINY) * 4 < 160 * 2


def tile_count(pocket: Upscaler, side: int, region: tuple[int, int, int, int]) -> tuple[int, int]:
    """Tiles of 64 latent pixels that a square output of `side` latent pixels has, and that a region needs."""
    tiles, pixels = grid(side, side, 64, 6), 4 * side
    settings = Settings(region=",".join(map(str, region)))
    result = needed(HALO_TINY, settings, 1, None, tiles, (pixels, pixels), (pixels, pixels), 4.0)
    return len(tiles), len(result[0])


def test_tiles_of_a_tenth_of_the_area(pocket: Upscaler) -> None:
    """Tiles that a square region needs, in a corner and in the middle: 10 % of the area, then 256 pixels of 4096."""
    assert tile_count(pocket, 236, (0, 0, 298, 298)) == (16, 4)
    assert tile_count(pocket, 236, (323, 323, 298, 298)) == (16, 16)
    assert tile_count(pocket, 1024, (0, 0, 1295, 1295)) == (324, 49)
    assert tile_count(pocket, 1024, (1400, 1400, 1295, 1295)) == (324, 64)
    assert tile_count(pocket, 1024, (0, 0, 256, 256)) == (324, 4)
    assert tile_count(pocket, 1024, (2000, 2000, 256, 256)) == (324, 9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"region": "abc"}, "region is 'abc'; it must be left,top,width,height"),
        ({"region": "1,2,3"}, "must be left,top,width,height"),
        ({"region": "1,2,3,4.5"}, "must be left,top,width,height"),
        ({"region": "-1,0,9,9"}, "must be left,top,width,height"),
        ({"region": "\u0661,0,9,9"}, "must be left,top,width,height"),
        ({"region": 7}, "region is 7; it must be a str"),
        ({"region": "0,0,0,9"}, "region 0,0,0,9 has no pixels"),
        ({"region": "0,0,9,0"}, "has no pixels"),
        ({"region": "100,0,101,9"}, "ends at pixel 201,9, outside the output of 200x160"),
        ({"region": "0,160,9,1"}, "outside the output of 200x160"),
        ({"region": "0,0,9,9", "color_fix": "adain"}, "color_fix adain, .*; set color_fix wavelet or none"),
        ({"region": "0,0,9,9", "use_kds": True}, "use_kds, .*; set use_kds off"),
        ({"region": "0,0,9,9", "output_view": "tiles"}, "output_view tiles, .*; set output_view image"),
        ({"region": "0,0,9,9", "output_view": "all"}, "output_view all, .*; set output_view image"),
    ],
)
def test_regions_that_cannot_be_are_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Settings(scale_factor=2, **changes).output_size(100, 80)
    assert "\n" not in str(caught.value)


def test_a_region_is_text_in_one_form_and_names_its_file() -> None:
    settings = Settings(region=" 100, 50,400,300 ")
    assert settings.region == "100,50,400,300"
    assert settings.label == "x4-region-100-50-400-300"
    assert Settings().label == "x4"
    assert Settings(region="0,0,100,50", target_side=100).output_size(40, 20) == (100, 50)
    assert settings_of({"region": ""}) == Settings()
    assert settings_of({"region": "0,0,9,9"}) == Settings(region="0,0,9,9")
    assert dataclasses.asdict(Settings())["region"] is None
