"""Fidelity, masks, target sizes, views, and the metrics `invented` and `faithful`."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lab.quality.metrics import luma, psnr
from seesr import Engine, Settings, Upscaler
from seesr.images import mask
from seesr.images.image_data import ImageData, resize
from seesr.images.png import encode_png
from seesr.images.read import decode
from seesr.images.record import read_record

QUICK = Settings(num_inference_steps=1, seed=1, latent_tiled_size=32)
FIDELITIES = (0.0, 0.3, 0.7, 1.0)


@pytest.fixture(scope="module")
def small() -> ImageData:
    """A piece of a photograph that takes several tiles."""
    return ImageData(np.asarray(Image.fromarray(skimage.data.chelsea()[40:168, 110:270]).reduce(2)))


def made(pocket: Upscaler, source: ImageData, shape: np.ndarray | None = None, **changes: object) -> np.ndarray:
    return pocket(source, dataclasses.replace(QUICK, **changes), mask=shape).image_data.rgb


def bicubic(source: ImageData, scale: float = 4) -> np.ndarray:
    return resize(source.visible, tuple(round(side * scale) for side in source.size))


def sharpness(image: np.ndarray) -> float:
    return float(np.abs(np.diff(luma(image), axis=1)).mean())


SLOW = ({"use_kds": True, "num_particles": 2}, {"num_inference_steps": 3})


@pytest.mark.parametrize("more", [{}, *(pytest.param(more, marks=pytest.mark.slow) for more in SLOW)])
def test_fidelity_goes_from_the_model_to_the_bicubic_upscale(pocket: Upscaler, small: ImageData, more: dict) -> None:
    images = [made(pocket, small, fidelity=value, **more) for value in FIDELITIES]
    np.testing.assert_array_equal(images[0], made(pocket, small, **more))
    np.testing.assert_array_equal(images[-1], bicubic(small))
    near = [psnr(image, bicubic(small)) for image in images]
    sharp = [sharpness(image) for image in images]
    assert near == sorted(set(near)) and sharp == sorted(set(sharp), reverse=True)


def test_fidelity_1_is_the_bicubic_upscale_in_every_depth_and_format(engine: Engine, tiny_upscaler: Upscaler) -> None:
    rng = np.random.default_rng(1)
    deep = ImageData(rng.integers(0, 65536, (20, 30, 3)).astype(np.uint16))
    for upscaler in (engine.upscaler, tiny_upscaler):
        assert upscaler is not None
        result = upscaler(deep, dataclasses.replace(QUICK, fidelity=1.0, scale_factor=3))
        np.testing.assert_array_equal(result.image_data.rgb, resize(deep.rgb, (90, 60)))
        assert result.metrics["tiles_skipped"] == result.metrics["tiles"]
        assert result.metrics["invented"] == 0


@pytest.mark.slow
def test_fidelity_replaces_uncertain_pixels_first(pocket: Upscaler, small: ImageData) -> None:
    settings = dataclasses.replace(QUICK, use_kds=True, num_particles=4, fidelity=0.0)
    model, blended = (pocket(small, dataclasses.replace(settings, fidelity=value)) for value in (0.0, 0.5))
    assert model.uncertainty is not None
    moved = np.abs(blended.image_data.rgb.astype(int) - model.image_data.rgb).sum(2)
    possible = np.abs(bicubic(small).astype(int) - model.image_data.rgb).sum(2)
    share = moved / np.maximum(possible, 1)
    unsure = model.uncertainty > np.quantile(model.uncertainty, 0.8)
    sure = model.uncertainty < np.quantile(model.uncertainty, 0.2)
    seen = possible > 12
    assert share[unsure & seen].mean() > share[sure & seen].mean() + 0.02  # the pocket model disagrees nearly alike


def left_half(source: ImageData, scale: int = 1) -> np.ndarray:
    """White left, black right."""
    width, height = source.size[0] * scale, source.size[1] * scale
    shape = np.zeros((height, width), np.uint8)
    shape[:, : width // 2] = 255
    return shape


@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.long)])
def test_black_is_bicubic_and_white_is_the_model_without_the_black_tiles(
    pocket: Upscaler, small: ImageData, steps: int
) -> None:
    wide = ImageData(np.concatenate([small.rgb] * 3, axis=1))
    shape = np.zeros((wide.size[1], wide.size[0]), np.uint8)
    shape[:, : wide.size[0] // 6] = 255
    settings = dataclasses.replace(QUICK, num_inference_steps=steps)
    whole, part = pocket(wide, settings), pocket(wide, settings, mask=shape)
    edge = 4 * wide.size[0] // 6
    np.testing.assert_array_equal(part.image_data.rgb[:, : edge - 4], whole.image_data.rgb[:, : edge - 4])
    np.testing.assert_array_equal(part.image_data.rgb[:, edge + 4 :], bicubic(wide)[:, edge + 4 :])
    assert 0 < part.metrics["tiles_skipped"] < part.metrics["tiles"] == whole.metrics["tiles"]
    assert whole.metrics["tiles_skipped"] == 0


def test_an_edge_is_soft_and_has_no_halo(pocket: Upscaler, small: ImageData) -> None:
    """Between the two images, pixel by pixel, also at the edge of a mask of another resolution."""
    shape = left_half(small, 2)
    model, result = made(pocket, small), made(pocket, small, shape)
    low, high = np.minimum(model, bicubic(small)), np.maximum(model, bicubic(small))
    assert (result.astype(int) >= low.astype(int) - 1).all() and (result.astype(int) <= high.astype(int) + 1).all()


def test_grey_blends_and_a_wholly_black_mask_denoises_nothing(pocket: Upscaler, small: ImageData) -> None:
    grey = np.full((10, round(10 * small.size[0] / small.size[1])), 128, np.uint8)
    model, half = made(pocket, small).astype(float), made(pocket, small, grey).astype(float)
    np.testing.assert_allclose(half, (model * 128 + bicubic(small) * 127.0) / 255, atol=1)
    black = pocket(small, QUICK, mask=np.zeros_like(grey))
    np.testing.assert_array_equal(black.image_data.rgb, bicubic(small))
    assert black.metrics["tiles_skipped"] == black.metrics["tiles"]


def test_global_layers_skip_no_tile(tiny_upscaler: Upscaler, small: ImageData) -> None:
    settings = dataclasses.replace(QUICK, scale_factor=2)
    result = tiny_upscaler(small, settings, mask=left_half(small))
    assert result.metrics["tiles_skipped"] == 0
    half = small.size[0]
    np.testing.assert_array_equal(result.image_data.rgb[:, half + 2 :], bicubic(small, 2)[:, half + 2 :])
    np.testing.assert_array_equal(
        result.image_data.rgb[:, : half - 2], tiny_upscaler(small, settings).image_data.rgb[:, : half - 2]
    )


def file(image: Image.Image, kind: str = "PNG", **more: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def test_masks_that_can_be_read_mean_what_they_show() -> None:
    size = (40, 30)
    assert mask.read_mask(file(Image.new("L", (4, 3), 200)), size).tolist() == [[200] * 4] * 3
    assert mask.read_mask(file(Image.new("RGB", (40, 30), (255, 255, 255))), size).min() == 255
    assert mask.read_mask(file(Image.new("RGBA", (40, 30), (255, 255, 255, 0))), size).max() == 0
    assert mask.read_mask(file(Image.new("I;16", (40, 30), 65535)), size).min() == 255
    assert mask.read_mask(file(Image.new("1", (403, 300), 1)), size).min() == 255  # within a hundredth


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (file(Image.new("L", (30, 40))), "the mask is 30x40 and the image 40x30: their aspect ratios differ"),
        (file(Image.new("L", (41, 30))), "their aspect ratios differ"),
        (b"", "the mask cannot be used: the image file is empty"),
        (b"no image at all", "the mask cannot be used: "),
        (
            file(Image.new("L", (40, 30)), save_all=True, append_images=[Image.new("L", (40, 30), 9)], duration=9),
            "the mask cannot be used: the image has 2 frames",
        ),
    ],
    ids=["turned", "too wide", "empty", "words", "animated"],
)
def test_a_mask_that_cannot_be_used_is_refused(engine: Engine, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine.run(file(Image.new("RGB", (40, 30))), QUICK, mask=data)


def test_the_engine_takes_a_mask_and_the_record_names_it(engine: Engine, small: ImageData) -> None:
    source = file(small.pil())
    output = engine.run(source, QUICK, mask=file(Image.fromarray(left_half(small))))
    assert output.data != engine.run(source, QUICK).data
    assert b"mask_sha256" in output.data


@given(
    width=st.integers(8, 3000), height=st.integers(8, 3000), side=st.integers(1, 32768), size=st.floats(0.0001, 67.1)
)
def test_the_named_side_is_exact_and_the_other_within_a_pixel(width: int, height: int, side: int, size: float) -> None:
    for settings in (Settings(target_side=side), Settings(target_megapixels=size)):
        try:
            result = settings.output_size(width, height)
        except ValueError as error:
            assert "scale of" in str(error) or "gives" in str(error)
            continue
        scale = settings.scale_for(width, height)
        assert 1 <= scale <= 8
        if settings.target_side:
            assert max(result) == side
        else:
            assert abs(result[0] * result[1] - size * 1e6) <= result[0] + result[1]
        assert all(abs(actual - own * scale) <= 1 for actual, own in zip(result, (width, height), strict=True))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target_side": 100}, r"target_side 100 of a 200x150 image needs a scale of 0.5; it must be from 1 to 8"),
        ({"target_side": 2000}, "needs a scale of 10"),
        ({"target_megapixels": 0.001}, "needs a scale of 0.18"),
        ({"target_side": 400, "target_megapixels": 1.0}, "are both set"),
        ({"target_side": 0}, "must be from 1 to 32768"),
        ({"target_side": 10**9}, "must be from 1 to 32768"),
        ({"target_megapixels": float("nan")}, "must be a float"),
        ({"target_megapixels": 0}, "must be from"),
        ({"fidelity": 1.01}, "must be from 0 to 1"),
        ({"fidelity": float("nan")}, "must be a float"),
    ],
)
def test_targets_that_cannot_be_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**values).output_size(200, 150)


def test_a_target_replaces_the_scale(pocket: Upscaler, small: ImageData) -> None:
    result = pocket(small, dataclasses.replace(QUICK, target_side=300, scale_factor=8.0))
    assert max(result.image_data.size) == 300
    assert result.metrics["output_size"] == f"300x{round(300 * small.size[1] / small.size[0])}"


def test_the_views_of_difference_and_tiles(pocket: Upscaler, small: ImageData) -> None:
    icc = b"a profile"
    source = dataclasses.replace(small, icc=icc)
    result = pocket(source, QUICK)
    added = result.view("difference")
    expected = 2 * (result.image_data.rgb.astype(int) - bicubic(small)) + 128
    np.testing.assert_array_equal(added.rgb, expected.clip(0, 255))
    shown = pocket(source, dataclasses.replace(QUICK, output_view="difference"))
    assert shown.metrics["difference_gain"] == 2 and "difference_gain" not in result.metrics
    assert added.icc == result.view("comparison").icc == icc
    nothing = pocket(source, dataclasses.replace(QUICK, fidelity=1.0)).view("difference")
    assert (nothing.rgb == 128).all()
    shown = result.view("tiles")
    assert shown.size == result.image_data.size and result.metrics["tiles"] > 1
    assert len(np.unique(shown.rgb.reshape(-1, 3).argmax(1))) > 1  # colours of several tiles


@pytest.mark.slow
def test_all_views_come_from_one_run_and_are_those_of_single_runs(
    engine: Engine, small: ImageData, tmp_path: Path
) -> None:
    requested = dataclasses.replace(QUICK, use_kds=True, num_particles=2, output_format="jpg", output_view="all")
    data = encode_png(ImageData(small.rgb[:40]))
    output = engine.run(data, requested)
    assert output.metrics["difference_gain"] == 2
    with zipfile.ZipFile(io.BytesIO(output.data)) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    views = ["image", "comparison", "difference", "tiles"]
    assert list(files) == [*(f"{view}.jpg" for view in views), "uncertainty.png"]
    for name, file in files.items():
        view, _, kind = name.partition(".")
        alone = engine.run(data, dataclasses.replace(requested, output_view=view, output_format=kind)).data
        both = [Image.open(io.BytesIO(result)) for result in (file, alone)]
        assert both[0].mode == both[1].mode and both[0].size == both[1].size
        np.testing.assert_array_equal(*map(np.asarray, both))
    (tmp_path / "all.zip").write_bytes(output.data)
    assert read_record(tmp_path / "all.zip")["settings"] == dataclasses.asdict(requested)
    assert engine.run(data, requested).data == output.data
    with zipfile.ZipFile(io.BytesIO(engine.run(data, dataclasses.replace(requested, use_kds=False)).data)) as archive:
        assert archive.namelist() == [f"{view}.jpg" for view in views]  # one sample has no uncertainty


def test_all_views_are_saved_as_a_zip_alone(pocket: Upscaler, small: ImageData, tmp_path: Path) -> None:
    small = ImageData(small.rgb[:40])
    result = pocket(small, dataclasses.replace(QUICK, output_view="all"))
    with pytest.raises(ValueError, match=r"must end in \.zip"):
        result.save(tmp_path / "x.png")
    result.save(tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == result.data
    with pytest.raises(ValueError, match=r"must end in \.png, \.webp, \.jpg"):
        pocket(small, QUICK).save(tmp_path / "y.zip")
    (tmp_path / "x.zip").write_bytes(b"cut")
    with pytest.raises(ValueError, match="no settings record"):
        read_record(tmp_path / "x.zip")


def test_faithful_and_invented_follow_the_added_detail(pocket: Upscaler, small: ImageData) -> None:
    results = [pocket(small, dataclasses.replace(QUICK, fidelity=value)).metrics for value in (0.0, 0.5, 1.0)]
    invented = [metrics["invented"] for metrics in results]
    assert invented == sorted(invented, reverse=True) and invented[0] > 0.001 and invented[2] == 0
    assert all(25 < metrics["faithful"] <= 100 for metrics in results)


def test_a_record_with_fidelity_and_masks_is_replayed(engine: Engine, small: ImageData) -> None:
    settings = dataclasses.replace(QUICK, fidelity=0.3, target_side=300)
    data = engine.run(file(small.pil()), settings).data
    decoded = decode(data)
    assert decoded.size[0] == 300
