"""Grey images: the output is grey, in the mode of the input file."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seesr import Engine, Settings, Upscaler
from seesr.cli import commands
from seesr.images.image_data import ImageData, to_grey
from seesr.images.png import encode_png

QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=16)


@pytest.fixture(scope="module")
def grey(photo: Image.Image) -> Image.Image:
    return photo.convert("L").crop((0, 0, 40, 32))


def file(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def opened(engine: Engine, data: bytes, mask: bytes | None = None, **changes: Any) -> Image.Image:
    output = engine.run(data, dataclasses.replace(QUICK, **changes), mask=mask)
    return Image.open(io.BytesIO(output.data))


def spread(image: Image.Image) -> int:
    """The largest difference of two channels in one pixel."""
    return int(np.ptp(np.asarray(image.convert("RGB")).astype(int), axis=2).max())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("output_format", ["png", "webp", "jpg"])
def test_the_mode_of_the_file_is_kept(engine: Engine, grey: Image.Image, mode: str, output_format: str) -> None:
    source = grey.convert(mode)
    if source.mode[-1] == "A":
        source.putalpha(Image.linear_gradient("L").resize(source.size))
    result = opened(engine, file(source), output_format=output_format)
    assert spread(result) <= (output_format == "webp")  # its decoder turns 3 of 256 greys into unequal channels
    remaining = {"1": "L"}.get(mode, mode)
    no_alpha = {"LA": "L", "RGBA": "RGB"}.get(remaining, remaining)
    three = {"L": "RGB", "LA": "RGBA"}.get(remaining, remaining)  # WebP has no grey
    assert result.mode == {"png": remaining, "jpg": no_alpha, "webp": three}[output_format]


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("one_channel", [False, True])
def test_sixteen_bits_stay_grey(engine: Engine, grey: Image.Image, alpha: bool, one_channel: bool) -> None:
    values = np.asarray(grey).astype(np.uint16) * 257
    deep = encode_png(ImageData(np.dstack([values] * 3), values if alpha else None, one_channel=one_channel))
    data = engine.run(deep, QUICK).data
    assert (
        data[24] == 16
        and data[25] == {(True, False): 0, (True, True): 4, (False, False): 2, (False, True): 6}[(one_channel, alpha)]
    )  # depth and color type in IHDR
    assert spread(Image.open(io.BytesIO(data)).convert("RGBA" if alpha else "RGB")) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"color_fix": "adain"},
        {"color_fix": "none"},
        {"fidelity": 0.5},
        {"fidelity": 1.0},
        {"cfg_scale": 2.0},
        {"use_kds": True, "num_particles": 2},
        {"use_kds": True, "num_particles": 2, "fidelity": 0.3},
        {"output_view": "comparison"},
        {"output_view": "difference"},
    ],
    ids=str,
)
def test_every_setting_and_view_stays_grey(engine: Engine, grey: Image.Image, changes: dict[str, Any]) -> None:
    result = opened(engine, file(grey), **changes)
    assert result.mode == "L"
    assert spread(opened(engine, file(grey.convert("RGB")), **changes)) == 0


def test_a_masked_image_and_every_view_of_a_zip_stay_grey(engine: Engine, grey: Image.Image) -> None:
    mask = Image.linear_gradient("L").resize(grey.size)
    assert opened(engine, file(grey), file(mask), fidelity=0.2).mode == "L"
    with zipfile.ZipFile(
        io.BytesIO(engine.run(file(grey), dataclasses.replace(QUICK, output_view="all")).data)
    ) as all_:
        modes = {name: Image.open(io.BytesIO(all_.read(name))).mode for name in all_.namelist()}
    assert modes.pop("tiles.png") == "RGB"  # its tiles are colored
    assert set(modes.values()) == {"L"}


def test_a_grey_result_is_the_luma_of_the_color_result(
    pocket: Upscaler, grey: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.asarray(grey.convert("RGB"))
    result = pocket(ImageData(pixels), QUICK).image_data.rgb
    monkeypatch.setattr(ImageData, "colorless", False)
    color = pocket(ImageData(pixels), QUICK).image_data.rgb
    assert np.ptp(color, axis=2).max() > 2  # the networks do add colors
    luma = color @ np.array([0.299, 0.587, 0.114])
    assert np.abs(result - luma[..., None]).max() <= 0.51


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_values_are_their_own_luma(dtype: type) -> None:
    values = np.arange(np.iinfo(dtype).max + 1).astype(dtype).reshape(256, -1)
    np.testing.assert_array_equal(to_grey(np.dstack([values] * 3))[..., 1], values)


def test_a_tint_is_a_color(engine: Engine, grey: Image.Image) -> None:
    sepia = Image.merge("RGB", [grey, grey.point(lambda v: v * 0.8), grey.point(lambda v: v * 0.6)])
    assert opened(engine, file(sepia)).mode == "RGB" and spread(opened(engine, file(sepia))) > 20
    almost = grey.convert("RGB")
    almost.putpixel((3, 3), (200, 100, 50))
    assert spread(opened(engine, file(almost))) > 20


def test_the_hidden_color_of_transparent_pixels_does_not_count(engine: Engine, grey: Image.Image) -> None:
    source = grey.convert("RGBA")
    source.paste((255, 0, 0, 0), (0, 0, 40, 8))
    assert spread(opened(engine, file(source))) == 0


def test_the_command_line_keeps_grey(grey: Image.Image, tmp_path: Path) -> None:
    grey.save(tmp_path / "scan.png")
    options = ["--num-inference-steps", "1", "--seed", "1", "--scale-factor", "2"]
    assert commands.main(["upscale", str(tmp_path / "scan.png"), "--out", str(tmp_path / "out"), *options]) == 0
    with Image.open(next((tmp_path / "out").glob("scan*.png"))) as result:
        assert result.mode == "L" and result.size == (80, 64)
