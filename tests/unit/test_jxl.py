"""Fields of the header of a JPEG XL (ISO/IEC 18181-1), from their bits."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
import pytest

from seesr.images import color_tags, jxl
from seesr.images.read import decode, open_header


def bits(*fields: tuple[int, int]) -> jxl.Bits:
    """The fields, each a value and its number of bits."""
    value = place = 0
    for number, count in fields:
        value |= number << place
        place += count
    result = jxl.Bits(value.to_bytes((place + 7) // 8, "little"))
    result.end = place  # no field may read more
    return result


@pytest.mark.parametrize(
    ("choice", "rest", "count", "expected"),
    [
        (0, 0, 19, 0), (0, 1, 19, -1), (0, 10, 19, 5), (0, 2**19 - 1, 19, -(2**18)), (1, 0, 19, 2**18),
        (1, 1, 19, -(2**18) - 1), (2, 0, 20, 2**19), (3, 0, 21, 2**20), (3, 2**21 - 1, 21, -(2**21)),
    ],
)  # fmt: skip
def test_signed_numbers(choice: int, rest: int, count: int, expected: int) -> None:
    read = bits((choice, 2), (rest, count))
    assert read.signed() == expected and read.place == read.end


def test_sizes() -> None:
    assert jxl.read_size(bits((1, 1), (4, 5), (0, 3), (31, 5))) == (256, 40)
    for choice, count in enumerate((9, 13, 18, 30)):
        side = (choice, 2), (2**count - 1, count)
        assert jxl.read_size(bits((0, 1), *side, (0, 3), *side)) == (2**count, 2**count)
    for ratio, width in enumerate((360, 432, 480, 540, 640, 450, 720), 1):
        assert jxl.read_size(bits((0, 1), (0, 2), (359, 9), (ratio, 3))) == (width, 360)
    with pytest.raises(IndexError, match="ends early"):
        jxl.read_size(bits((1, 1), (4, 5), (0, 3), (31, 4)))


def test_depths() -> None:
    assert [jxl.read_depth(bits((0, 1), (choice, 2))) for choice in range(3)] == [8, 10, 12]
    assert jxl.read_depth(bits((0, 1), (3, 2), (15, 6))) == 16
    for fields, message in ((((0, 1), (3, 2), (16, 6)), "17 bits"), (((1, 1),), "floating-point")):
        with pytest.raises(jxl.Unreadable, match=message):
            jxl.read_depth(bits(*fields))


def test_extra_channels() -> None:
    assert not jxl.read_alpha(bits((1, 1)))
    alpha, depth = ((0, 1), (0, 2)), ((0, 1), (0, 2))
    names = [((0, 2),), ((1, 2), (2, 4), (0x4241, 16)), ((2, 2), (0, 5), (0, 128)), ((3, 2), (1, 10), (0, 392))]
    for name in names:
        for resolution in (((0, 2),), ((1, 2),), ((2, 2),), ((3, 2), (7, 3))):
            for premultiplied in (False, True):
                read = bits(*alpha, *depth, *resolution, *name, (premultiplied, 1))
                assert jxl.read_alpha(read) is premultiplied and read.place == read.end
    with pytest.raises(jxl.Unreadable, match="extra channels"):
        jxl.read_alpha(bits((0, 1), (1, 2), *depth))


@pytest.mark.parametrize(
    ("fields", "white", "red", "transfer", "colours"),
    [
        (((1, 1),), (0.3127, 0.329), (0.64, 0.33), "sRGB", 3),
        (((0, 1), (0, 1), (0, 2), (1, 2), (1, 2), (0, 1), (2, 2), (11, 4)), (0.3127, 0.329), (0.64, 0.33), "sRGB", 3),
        (((0, 1), (0, 1), (1, 2), (1, 2), (1, 1), (4545455, 24)), (0.3127, 0.329), (0.64, 0.33), 2.2, 1),
        (((0, 1), (0, 1), (0, 2), (1, 2), (2, 2), (7, 4), (1, 1), (0, 24)), (0.3127, 0.329), (0.708, 0.292), 1.0, 3),
        (((0, 1), (0, 1), (0, 2), (2, 2), (9, 4), (2, 2), (9, 4), (0, 1), (2, 2), (14, 4)), (0.314, 0.351),
         (0.68, 0.32), "PQ", 3),
    ],
)  # fmt: skip
def test_encodings(
    fields: tuple[tuple[int, int], ...],
    white: tuple[float, float],
    red: tuple[float, float],
    transfer: str | float,
    colours: int,
) -> None:
    encoding, count = jxl.read_encoding(bits(*fields))
    assert (encoding.primaries.white, encoding.primaries.red, count) == (white, red, colours)
    assert encoding.transfer == (transfer if isinstance(transfer, str) else pytest.approx(transfer, abs=1e-4))


def test_chromaticities_of_a_file() -> None:
    numbers = [300_000, 310_000, 640_000, 330_000, 290_000, 600_000, 150_000, 60_000]
    ranges = ((0, 19), (2**19, 19), (2**20, 20))
    choices = [max(choice for choice in range(3) if 2 * number >= ranges[choice][0]) for number in numbers]
    points = [
        ((choice, 2), (2 * number - ranges[choice][0], ranges[choice][1]))
        for number, choice in zip(numbers, choices, strict=True)
    ]
    fields = [field for point in points for field in point]
    start = ((0, 1), (0, 1), (0, 2), (2, 2), (0, 4))  # no ICC, RGB, a white point of its own
    own = [*start, *fields[:4], (2, 2), (0, 4), *fields[4:], (0, 1), (2, 2), (11, 4)]
    encoding, count = jxl.read_encoding(bits(*own))
    found = [value for point in encoding.primaries for value in point]
    assert found == pytest.approx([number / 1e6 for number in numbers], abs=1e-9) and count == 3


def test_an_icc_profile_is_refused() -> None:
    for fields in (((0, 1), (1, 1), (0, 2)), ((0, 1), (0, 1), (2, 2), (0, 4))):
        with pytest.raises(jxl.Unreadable, match="with an ICC profile"):
            jxl.read_encoding(bits(*fields))


# --- The header of a codestream

Fields = tuple[tuple[int, int], ...]
SIZE: Fields = ((0, 1), (0, 2), (29, 9), (0, 3), (0, 2), (19, 9))  # 20 x 30
DEPTH: Fields = ((0, 1), (1, 2), (1, 1))  # 10 bits; 16 are enough to decode
PQ: Fields = ((1, 1), (0, 1), (0, 1), (0, 2), (1, 2), (1, 2), (0, 1), (2, 2), (14, 4))  # XYB; D65, BT.709, PQ


def stream(*fields: tuple[int, int]) -> bytes:
    """A codestream with these fields in its header."""
    value = place = 0
    for number, count in fields:
        value |= number << place
        place += count
    return jxl.CODESTREAM + value.to_bytes((place + 7) // 8, "little")


def test_a_header_that_ends_early() -> None:
    data = stream(*SIZE, (0, 1), (0, 1), *DEPTH, *NONE, *PQ)
    for length in range(len(data)):
        with pytest.raises(IndexError):
            jxl.read_header(data[:length])


def test_a_header_without_metadata() -> None:
    found = jxl.read_header(stream(*SIZE, (1, 1)))
    assert found == jxl.JpegXl((20, 30), 8, 3, False, color_tags.Encoding(), None, None)


NONE: Fields = ((0, 2),)  # extra channels
ALPHA: Fields = ((1, 2), (1, 1))
PREMULTIPLIED: Fields = ((1, 2), (0, 1), (0, 2), (0, 1), (0, 2), (0, 2), (0, 2), (1, 1))
SPOT: Fields = ((0, 1), (2, 2), (0, 4))  # a kind that is no alpha


@pytest.mark.parametrize(
    ("channels", "alpha", "premultiplied"),
    [(NONE, 0, False), (ALPHA, 1, False), (PREMULTIPLIED, 1, True), (((3, 2), (0, 12), (1, 1)), 1, False)],
)
@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("intrinsic", [False, True])
def test_a_header_with_metadata(
    channels: Fields, alpha: int, premultiplied: bool, orientation: int | None, intrinsic: bool
) -> None:
    more: Fields = ((0, 1),)
    if orientation is not None:
        more = ((1, 1), (orientation - 1, 3), (intrinsic, 1), *(SIZE if intrinsic else ()), (0, 1), (0, 1))
    found = jxl.read_header(stream(*SIZE, (0, 1), *more, *DEPTH, *channels, *PQ))
    size = (30, 20) if orientation in (5, 6, 7, 8) else (20, 30)
    assert found == (size, 10, 3 + alpha, premultiplied, color_tags.from_numbers(1, 16, True, []), None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (((1, 1), (0, 3), (0, 1), (1, 1)), "with a preview"),
        (((1, 1), (0, 3), (0, 1), (0, 1), (1, 1)), "an animated JPEG XL"),
        (((0, 1), *DEPTH, (1, 2), *SPOT), "extra channels"),
        (((0, 1), *DEPTH, (2, 2), (0, 4), (1, 1), (1, 1)), "extra channels"),  # two of them, both alpha
        (((0, 1), *DEPTH, (3, 2), (1, 12), (1, 1), (1, 1)), "extra channels"),
    ],
)
def test_what_a_header_says_is_not_read(fields: Fields, message: str) -> None:
    with pytest.raises(jxl.Unreadable, match=message):
        jxl.read_header(stream(*SIZE, (0, 1), *fields, *PQ))


def test_numbers_of_the_encoding_from_18_on() -> None:
    """HLG is 18; primaries and white points of 18 and more are none that are known."""
    hlg = (0, 1), (0, 1), (0, 2), (1, 2), (1, 2), (0, 1), (3, 2), (0, 6)
    assert jxl.read_encoding(bits(*hlg)) == (color_tags.Encoding(color_tags.BT709, "HLG"), 3)
    unknown = (0, 1), (0, 1), (0, 2), (3, 2), (1, 6), (3, 2), (63, 6), (0, 1), (2, 2), (11, 4)
    assert jxl.read_encoding(bits(*unknown)) == (color_tags.Encoding(), 3)
    grey = (0, 1), (0, 1), (1, 2), (2, 2), (8, 4), (0, 1), (2, 2), (11, 4)
    encoding, colours = jxl.read_encoding(bits(*grey))
    assert colours == 1 and encoding.primaries.white == (1 / 3, 1 / 3) and encoding.transfer == "sRGB"


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


@pytest.mark.parametrize("parts", [[b"jxlc"], [b"jxlp"], [b"jxlp", b"jxlp"]])
@pytest.mark.parametrize("packed", [False, True])
def test_the_boxes_of_a_container(parts: list[bytes], packed: bool) -> None:
    def metadata(name: bytes, body: bytes) -> bytes:
        return box(b"brob", name + imagecodecs.brotli_encode(body)) if packed else box(name, body)

    exif = struct.pack(">I", 6) + b"Exif\0\0II*\0"  # where the TIFF structure begins
    data = jxl.CONTAINER + box(b"ftyp", b"jxl ") + metadata(b"Exif", exif) + metadata(b"xml ", b"<x/>")
    header = stream(*SIZE, (1, 1))
    for number, name in enumerate(parts):
        data += box(name, header if name == b"jxlc" else struct.pack(">I", number) + (header if number == 0 else b"x"))
    found = jxl.read_header(data)
    assert (found.size, found.exif, found.xmp) == ((20, 30), b"II*\0", b"<x/>")
    with pytest.raises(IndexError, match="no codestream"):
        jxl.read_header(jxl.CONTAINER + box(b"ftyp", b"jxl ") + box(b"jxlx", header))


def test_metadata_of_one_mib_once_decompressed() -> None:
    for length, expected in ((2**20, 2**20), (2**20 + 1, 0)):
        assert len(jxl.inflated(imagecodecs.brotli_encode(bytes(length), level=1))) == expected
    assert jxl.inflated(b"no Brotli") == b""


@pytest.mark.parametrize("bits_stored", [1, 4, 7])
def test_values_of_few_bits_fill_the_range(bits_stored: int, monkeypatch: pytest.MonkeyPatch) -> None:
    depth: Fields = ((0, 1), (3, 2), (bits_stored - 1, 6), (1, 1))
    data = stream(*SIZE, (0, 1), (0, 1), *depth, *NONE, (1, 1), (1, 1))
    values = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(30, 20, 3) % 2**bits_stored
    monkeypatch.setattr(imagecodecs, "jpegxl_decode", lambda _: values)
    np.testing.assert_array_equal(decode(data).rgb, values.astype(int) * 255 // (2**bits_stored - 1))
    for wrong in (values[:-1], values[:, :-1], values[..., :2]):
        monkeypatch.setattr(imagecodecs, "jpegxl_decode", lambda _, wrong=wrong: wrong)
        with pytest.raises(ValueError, match="it does not hold what its header says"):
            decode(data)


def test_premultiplied_colors_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stream(*SIZE, (0, 1), (0, 1), (0, 1), (0, 2), (1, 1), *PREMULTIPLIED, (1, 1), (1, 1))
    values = np.full((30, 20, 4), 64, np.uint8)
    values[..., 3] = 128
    monkeypatch.setattr(imagecodecs, "jpegxl_decode", lambda _: values)
    read = decode(data)
    assert read.alpha is not None and set(read.rgb.ravel()) == {128} and set(read.alpha.ravel()) == {128}
    assert open_header(data).orientation == 1
