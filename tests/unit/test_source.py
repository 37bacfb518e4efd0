"""Arrays and files of a caller, and the arrays of results."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from seesr.images import read, source
from seesr.images.image_data import ImageData
from seesr.images.source import Layout, from_array, load_source, read_bytes, to_array


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_an_array_and_back(dtype: type, channels: int | None, rng: np.random.Generator) -> None:
    shape = (6, 5) if channels is None else (6, 5, channels)
    array = rng.integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    loaded = from_array(array)
    image = loaded.image_data
    assert loaded.layout == Layout(channels, False) and loaded.sha256 is None
    assert image.rgb.shape == (6, 5, 3) and image.grey == (channels in (None, 1))
    np.testing.assert_array_equal(to_array(image, loaded.layout), array)
    if channels in (3, 4):
        np.testing.assert_array_equal(image.rgb, array[..., :3])
    assert (image.alpha is not None) == (channels == 4)
    if image.alpha is not None:
        np.testing.assert_array_equal(image.alpha, array[..., 3])
    np.testing.assert_array_equal(to_array(image, None), array if channels == 4 else image.rgb)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_from_0_to_1_become_16_bits(dtype: type) -> None:
    array = np.array([[0, 0.25, 0.5, 1]], dtype)
    loaded = from_array(array)
    assert loaded.image_data.rgb[0, :, 1].tolist() == [0, 16384, 32768, 65535]
    back = to_array(loaded.image_data, loaded.layout)
    assert back.dtype == np.float32 and np.abs(back - array).max() < 1e-5 and back.shape == array.shape


@pytest.mark.parametrize(("value", "fits"), [(-1e-7, True), (1 + 1e-7, True), (-1e-5, False), (1 + 1e-5, False)])
def test_floats_may_be_rounded(value: float, fits: bool) -> None:
    array = np.full((4, 4), 0.5)
    array[1, 2] = value
    if fits:
        assert from_array(array).image_data.rgb[1, 2, 0] == (65535 if value > 0 else 0)
        return
    with pytest.raises(ValueError, match="floats must be from 0 to 1"):
        from_array(array)
    assert from_array(np.ones((4, 4))).image_data.rgb.min() == 65535  # one value everywhere


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_alpha_that_is_opaque_is_none(dtype: type) -> None:
    top = np.iinfo(dtype).max
    array = np.full((4, 5, 4), top, dtype)
    array[..., :3] = 7
    assert from_array(array).image_data.alpha is None
    np.testing.assert_array_equal(to_array(from_array(array).image_data, Layout(4, False)), array)
    array[3, 4, 3] = top - 1
    assert from_array(array).image_data.alpha is not None


@pytest.mark.parametrize("shape", [(6,), (6, 5, 2), (6, 5, 5), (6, 0), (0, 6, 3), (2, 6, 5, 3), (6, 5, 0)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"it must be \(H, W\), \(H, W, 1\), \(H, W, 3\) or \(H, W, 4\)$"):
        from_array(np.zeros(shape, np.uint8))
    for channels in (1, 3, 4):
        with pytest.raises(ValueError, match=r"channels last with array.transpose\(1, 2, 0\)$"):
            from_array(np.zeros((channels, 9, 8), np.uint8))


def test_the_size_of_an_array_is_checked_as_width_and_height() -> None:
    checked = []
    load_source(np.zeros((6, 5), np.uint8), lambda *size: checked.append(size))
    assert checked == [(5, 6)]


def test_kinds_of_sources() -> None:
    image = ImageData(np.zeros((4, 5, 3), np.uint8))
    assert not source.is_file(image) and not source.is_file(np.zeros(3)) and source.is_file(io.BytesIO())
    assert all(source.is_file(one) for one in ("a", b"a", bytearray(b"a"), memoryview(b"a"), Path("a")))
    assert source.is_many(["a"]) and source.is_many(one for one in "ab")
    singles = ("a", b"a", bytearray(b"a"), memoryview(b"a"), Path("a"), image, np.zeros(3), io.BytesIO(b"a"), {}, 3)
    assert not any(source.is_many(one) for one in (*singles, load_source(image)))


def test_a_file_is_read_up_to_a_byte_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one that is too large is refused by its size, and no more of it is held."""
    for module in (read, source):
        monkeypatch.setattr(module, "LARGEST_FILE", 2**20)
    file = tmp_path / "a"
    for length, expected in ((2**20, 2**20), (2**20 + 1, 2**20 + 1), (2**20 + 9, 2**20 + 1)):
        file.write_bytes(bytes(length))
        assert len(read.read_upload(file, tmp_path)) == len(read.read_file(file)) == expected
        with file.open("rb") as opened:
            assert len(read_bytes(opened)) == expected
        message = "not an image" if length == 2**20 else "the image file is larger than 1 MiB"
        with pytest.raises(ValueError, match=message):
            load_source(file)


def test_a_file_may_have_100_mib() -> None:
    for length, message in ((100 * 2**20, "not an image"), (100 * 2**20 + 1, "is larger than 100 MiB")):
        with pytest.raises(ValueError, match=message):
            load_source(bytes(length))
