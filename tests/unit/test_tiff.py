"""Kinds of TIFF: what the tags mean, and what is not read."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import ExifTags, Image, ImageCms

from seesr.images import tiff
from seesr.images.limits import LARGEST_SIDE
from seesr.images.read import decode, from_pil, open_header


def written(pixels: np.ndarray, photometric: str = "rgb", bigtiff: bool = False, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, bigtiff=bigtiff) as writer:
        writer.write(pixels, photometric=photometric, **options)  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


def changed(data: bytes, tag: int, value: int) -> bytes:
    """A file whose first page has another value of a tag."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        entry = file.pages[0].tags[tag]  # pyright: ignore[reportAttributeAccessIssue]
    size = {3: 2, 4: 4}[entry.dtype]
    return data[: entry.valueoffset] + value.to_bytes(size, "little") + data[entry.valueoffset + size :]


@pytest.fixture
def deep(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 65536, (12, 10, 3)).astype(np.uint16)


def test_numbers_of_tags_are_those_of_the_format() -> None:
    """As tifffile names them."""
    names = {
        "grey": ("MINISWHITE", "MINISBLACK"), "RGB": ("RGB",), "palette": ("PALETTE",), "mask": ("MASK",),
        "CMYK": ("SEPARATED",), "YCbCr": ("YCBCR",), "Lab": ("CIELAB", "ICCLAB", "ITULAB"),
        "camera raw (CFA)": ("CFA",), "camera raw (linear)": ("LINEAR_RAW",), "LogL": ("LOGL",), "LogLuv": ("LOGLUV",),
    }  # fmt: skip
    kinds = {tifffile.PHOTOMETRIC[name]: kind for kind, group in names.items() for name in group}
    assert {int(number): kind for number, kind in kinds.items()} == tiff.PHOTOMETRICS
    known = ["NONE", "LZW", "JPEG", "ADOBE_DEFLATE", "PACKBITS", "DEFLATE", "LZMA", "ZSTD", "WEBP"]
    assert {int(tifffile.COMPRESSION[name]) for name in known} == tiff.COMPRESSIONS
    assert tifffile.FILETYPE(tiff.REDUCED) == tifffile.FILETYPE.REDUCEDIMAGE
    assert tifffile.FILETYPE(tiff.MASK) == tifffile.FILETYPE.MASK
    assert tiff.PREMULTIPLIED == tifffile.EXTRASAMPLE.ASSOCALPHA and tiff.STRAIGHT == tifffile.EXTRASAMPLE.UNASSALPHA
    assert (tifffile.TIFF.TAGS[tiff.SUBIFDS], tifffile.TIFF.TAGS[tiff.DNG_VERSION]) == ("SubIFDs", "DNGVersion")


@pytest.mark.parametrize(("unit", "expected"), [(2, (300.5, 150.25)), (3, (763.27, 381.635)), (1, None)])
@pytest.mark.parametrize("depth", [8, 16])
def test_the_resolution_is_per_inch(deep: np.ndarray, unit: int, expected: tuple | None, depth: int) -> None:
    pixels = deep if depth == 16 else deep.astype(np.uint8)
    data = written(pixels, resolution=(300.5, 150.25), resolutionunit=unit)
    assert decode(data).dpi == (expected and pytest.approx(expected, rel=1e-4))


@pytest.mark.parametrize("tag", [282, 283])
@pytest.mark.parametrize("place", [0, 4])
def test_a_resolution_of_zero_is_none(deep: np.ndarray, tag: int, place: int) -> None:
    data = written(deep, resolution=(300, 150), resolutionunit=2)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        at = file.pages[0].tags[tag].valueoffset + place  # pyright: ignore[reportAttributeAccessIssue]
    assert decode(data[:at] + bytes(4) + data[at + 4 :]).dpi is None


@pytest.mark.parametrize(("bigtiff", "byteorder"), [(False, "<"), (False, ">"), (True, "<")])
def test_exif_of_every_header_is_kept(deep: np.ndarray, bigtiff: bool, byteorder: str) -> None:
    buffer = io.BytesIO()
    tags = [(271, 2, 6, "maker", True)]
    with tifffile.TiffWriter(buffer, bigtiff=bigtiff, byteorder=byteorder) as writer:  # pyright: ignore[reportArgumentType]
        writer.write(deep, photometric="rgb", extratags=tags)
    decoded = decode(buffer.getvalue())
    np.testing.assert_array_equal(decoded.rgb, deep)
    exif = Image.Exif()
    exif.load(decoded.exif or b"")
    assert exif[ExifTags.Base.Make] == "maker" and ExifTags.Base.ImageWidth not in exif


@pytest.mark.parametrize(("extra", "alpha"), [([0, 2], 1), ([2, 0], 0), ([0, 1], 1), ([0, 0], None)])
def test_alpha_is_the_first_extra_channel_that_is_alpha(
    deep: np.ndarray, extra: list[int], alpha: int | None, rng: np.random.Generator
) -> None:
    more = rng.integers(20_000, 65536, (12, 10, 2)).astype(np.uint16)
    decoded = decode(written(np.dstack([deep // 4, more]), extrasamples=extra))
    if alpha is None:
        assert decoded.alpha is None
    else:
        np.testing.assert_array_equal(decoded.alpha, more[..., alpha])
    assert np.array_equal(decoded.rgb, deep // 4) == (1 not in extra)


def test_extra_channels_without_a_kind_are_alpha(rng: np.random.Generator) -> None:
    grey = rng.integers(0, 65536, (12, 10, 2)).astype(np.uint16)
    data = written(grey, "minisblack", planarconfig="contig", extrasamples=[2])
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        entry = file.pages[0].tags[338]  # pyright: ignore[reportAttributeAccessIssue]
    data = data[: entry.offset] + b"\xff\x7f" + data[entry.offset + 2 :]  # ExtraSamples becomes an unknown tag
    np.testing.assert_array_equal(decode(data).alpha, grey[..., 1])


@pytest.mark.parametrize("pages", [1, 2, 3])
def test_a_file_of_thumbnails_alone(deep: np.ndarray, pages: int) -> None:
    """The only page is the image, whatever it is called; of several none is."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for _ in range(pages):
            writer.write(deep, photometric="rgb", subfiletype=1)
    if pages == 1:
        np.testing.assert_array_equal(decode(buffer.getvalue()).rgb, deep)
        return
    with pytest.raises(ValueError, match=f"the image has {pages} pages; send one still image"):
        decode(buffer.getvalue())


def test_more_pages_than_are_counted(deep: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiff, "MAX_PAGES", 3)
    for pages, number in ((3, "3"), (4, "more than 3"), (5, "more than 3")):
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer) as writer:
            for _ in range(pages):
                writer.write(deep, photometric="rgb")
        with pytest.raises(ValueError, match=f"the image has {number} pages"):
            decode(buffer.getvalue())


@pytest.mark.parametrize("rows", [12, 100, 65535])
def test_a_strip_may_declare_more_rows_than_there_are(deep: np.ndarray, rows: int) -> None:
    """The default of RowsPerStrip is the largest number."""
    data = changed(written(deep, rowsperstrip=12), 278, rows)
    np.testing.assert_array_equal(decode(data).rgb, deep)


def test_unequal_tables_of_strips_are_damage(deep: np.ndarray) -> None:
    data = written(deep, rowsperstrip=4)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        count = file.pages[0].tags[279].offset + 4  # pyright: ignore[reportAttributeAccessIssue]
    assert data[count : count + 4] == (3).to_bytes(4, "little")
    with pytest.raises(ValueError, match="damaged"):
        decode(data[:count] + (2).to_bytes(4, "little") + data[count + 4 :])


@pytest.mark.parametrize("tag", [273, 279])
def test_a_strip_without_a_place_or_bytes_is_damage(deep: np.ndarray, tag: int) -> None:
    data = written(deep, rowsperstrip=12)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        kind = file.pages[0].tags[tag].dtype  # pyright: ignore[reportAttributeAccessIssue]
    assert kind in (3, 4)
    with pytest.raises(ValueError, match="damaged"):
        decode(changed(data, tag, 0))


def page(**changes: Any) -> Any:
    """What tifffile says of a page of RGB with 16 bits."""
    known = {
        "photometric": 2, "bitspersample": 16, "samplesperpixel": 3, "imagedepth": 1, "sampleformat": 1,
        "dtype": np.dtype(np.uint16), "compression": 1, "is_tiled": False, "imagewidth": 100, "imagelength": 80,
        "rowsperstrip": 80, "tilewidth": 0, "tilelength": 0, "extrasamples": (),
    }  # fmt: skip
    return SimpleNamespace(**{**known, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"photometric": 0, "samplesperpixel": 1}, {"photometric": 5, "samplesperpixel": 4}, {"photometric": 8},
        {"samplesperpixel": 16}, {"bitspersample": 32}, {"sampleformat": 3, "bitspersample": 64},
        {"photometric": 1, "samplesperpixel": 1, "sampleformat": 3}, 
        {"imagewidth": LARGEST_SIDE, "imagelength": 2048, "rowsperstrip": 2048},
        {"rowsperstrip": 2**32 - 1}, {"is_tiled": True, "tilewidth": 8192, "tilelength": 8192, "imagelength": 16},
    ],
)  # fmt: skip
def test_a_page_that_is_read(changes: dict[str, Any]) -> None:
    tiff.check_kind(page(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bitspersample": (5, 6, 5)}, "with channels of different depths"),
        ({"photometric": 6}, "a TIFF of 16-bit YCbCr, which is not supported"),
        ({"photometric": 77}, "16-bit photometric 77"),
        ({"photometric": 5}, "16-bit CMYK"),
        ({"samplesperpixel": 2}, "16-bit RGB, which"),
        ({"imagedepth": 2}, "16-bit RGB, which"),
        ({"bitspersample": 33}, "33-bit RGB, which"),
        ({"sampleformat": 2}, "16-bit signed RGB, which"),
        ({"sampleformat": 3, "photometric": 5, "samplesperpixel": 4}, "16-bit floating-point CMYK, which"),
        ({"sampleformat": 5}, "complex RGB"),
        ({"sampleformat": 6}, "complex RGB"),
        ({"dtype": None}, "16-bit RGB, which"),
        ({"compression": 2}, "16-bit RGB, 2 compression, which"),
        ({"compression": tifffile.COMPRESSION.CCITTFAX3}, "16-bit RGB, CCITTFAX3 compression, which"),
        ({"extrasamples": (1,), "dtype": None}, "16-bit RGB with alpha, which"),
        ({"extrasamples": (0, 2), "dtype": None}, "16-bit RGB with alpha, which"),
        ({"extrasamples": (0,), "dtype": None}, "16-bit RGB, which"),
        ({"samplesperpixel": 17}, "the TIFF has 17 channels; the limit is 16"),
        ({"imagewidth": LARGEST_SIDE + 1, "rowsperstrip": 40}, f"TIFF are {LARGEST_SIDE + 1}x40; the limit is"),
        ({"is_tiled": True, "tilewidth": 8192, "tilelength": 8193}, "the tiles of the TIFF are 8192x8193; the limit"),
        ({"is_tiled": True, "tilewidth": 16, "tilelength": LARGEST_SIDE + 16}, "are 16x32784; the limit"),
    ],
)
def test_a_page_that_is_not_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(tiff.Unreadable, match=message):
        tiff.check_kind(page(**changes))


@pytest.mark.parametrize("kind", ["12 bits", "zero is white"])
def test_a_tiff_that_pillow_has_opened_is_the_same(kind: str) -> None:
    grey = np.linspace(0, 4095 if kind == "12 bits" else 65535, 60).astype(np.uint16).reshape(6, 10)
    if kind == "12 bits":
        first, second = grey.ravel()[::2], grey.ravel()[1::2]
        packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)
        data = changed(written(packed.reshape(6, 15), "minisblack"), 256, 10)
        data = changed(data, 258, 12)
    else:
        data = written(grey, "miniswhite")
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(from_pil(image).rgb, decode(data).rgb)


def test_the_profile_of_a_deep_file(deep: np.ndarray) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert decode(written(deep, iccprofile=icc)).icc == icc


@pytest.mark.parametrize("orientation", [0, 1, 5, 8, 9])
def test_an_unknown_orientation_is_none(deep: np.ndarray, orientation: int) -> None:
    header = open_header(written(deep, extratags=[(274, 3, 1, orientation, True)]))
    assert header.orientation == (orientation if orientation in (5, 8) else 1)
    assert header.size == ((12, 10) if orientation in (5, 8) else (10, 12))


@pytest.mark.parametrize("bits", range(1, 33))
def test_integers_of_any_depth_fill_the_range(bits: int) -> None:
    top = np.array([0, 2**bits - 1], np.uint8 if bits <= 8 else np.uint16 if bits <= 16 else np.uint32)
    result, warnings = tiff.to_integers(top, page(bitspersample=bits, dtype=top.dtype))
    assert result.dtype == (np.uint8 if bits <= 8 else np.uint16) and result.tolist() == [0, np.iinfo(result.dtype).max]
    assert bool(warnings) == (bits > 16)


@pytest.mark.parametrize("bits", [17, 24, 32])
def test_more_than_16_bits_keep_the_upper_ones(bits: int) -> None:
    values = (np.arange(0, 65536, 257, dtype=np.uint32) << (bits - 16)) + 1
    result, warnings = tiff.to_integers(values, page(bitspersample=bits, dtype=values.dtype))
    np.testing.assert_array_equal(result, np.arange(0, 65536, 257))
    assert warnings == (f"{bits} bits per colour are reduced to 16",)


def test_bits_become_black_and_white() -> None:
    result, warnings = tiff.to_integers(np.array([False, True]), page(bitspersample=1, dtype=np.dtype(bool)))
    assert result.tolist() == [0, 255] and result.dtype == np.uint8 and not warnings


@pytest.mark.parametrize("share", [0.0, 0.05, 0.06])
@pytest.mark.parametrize("outside", [-0.5, 2.0, np.nan])
def test_floats_may_leave_the_range_in_one_of_twenty_values(share: float, outside: float) -> None:
    values = np.array([0.5, 0, 1, 0.5] * 25, np.float32)  # the ends are inside
    values[: round(100 * share)] = outside
    described = page(sampleformat=3, bitspersample=32, dtype=values.dtype)
    if share > 0.05:
        with pytest.raises(tiff.Unreadable, match=r"with values from -?[\d.]+ to [\d.]+: 0 to 1 is read"):
            tiff.to_integers(values, described)
        return
    result, warnings = tiff.to_integers(values, described)
    assert result.dtype == np.uint16 and result[-1] == 32768
    assert result[0] == (32768 if not share else 65535 if outside > 1 else 0)
    expected = f"{share:.2%} of the floating-point values are outside of 0 to 1 and are clipped"
    assert warnings == ((expected,) if share else ())


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_lab_has_signed_colors(depth: type) -> None:
    unit = np.iinfo(depth).max // 255
    offset = np.array([[[10, 128, 255], [255, 0, 1]]]).astype(depth) * unit
    assert (
        tiff.signed_lab(offset, 9).tolist() == tiff.signed_lab(offset, 10).tolist() == [[[10, 0, 127], [255, 128, 129]]]
    )
    assert tiff.signed_lab(offset, 8).tolist() == [[[10, 128, 255], [255, 0, 1]]]
