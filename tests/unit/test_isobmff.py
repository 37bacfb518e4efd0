"""Properties of the primary image in the boxes of HEIF and AVIF files."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest

from seesr.images import color_tags, isobmff


def box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


def boxes_of(
    properties: list[tuple[bytes, bytes]], size: tuple[int, int] = (10, 6), item: int = 1, large: bool = False
) -> bytes:
    """A HEIF header of one item with these properties behind its size.

    Args:
        large: numbers of items have 32 bits and those of properties 16, as version 1 of the boxes has them.
    """
    stored = [box(b"ispe", bytes(4) + struct.pack(">II", *size))] + [box(*each) for each in properties]
    essential = 0x8000 if large else 0x80
    places = [struct.pack(">H" if large else ">B", essential | (k + 1)) for k in range(len(stored))]
    number = struct.pack(">I" if large else ">H", item)
    version = b"\1\0\0\1" if large else bytes(4)
    other = struct.pack(">I" if large else ">H", item - 1) + b"\1" + places[0]  # another item, before
    ipma = box(b"ipma", version + struct.pack(">I", 2) + other + number + bytes([len(places)]) + b"".join(places))
    pitm = box(b"pitm", version[:1] + bytes(3) + number)
    meta = bytes(4) + pitm + box(b"iprp", box(b"ipco", b"".join(stored)) + ipma)
    return box(b"ftyp", b"avif" + bytes(4)) + box(b"meta", meta)


def test_transforms_are_applied_in_the_order_of_their_properties(rng: np.random.Generator) -> None:
    pixels = rng.integers(0, 256, (6, 10, 3), dtype=np.uint8)
    clap = (b"clap", struct.pack(">IIIIiIiI", 4, 1, 2, 1, -3, 1, -2, 1))  # the corner at the top left
    turn, flip = (b"irot", b"\1"), (b"imir", b"\1")
    for order, expected in (
        ([clap, turn], np.rot90(pixels[:2, :4])),
        ([turn, clap], np.rot90(pixels)[2:4, :2]),
        ([turn, flip], np.rot90(pixels)[:, ::-1]),
        ([flip, turn], np.rot90(pixels[:, ::-1])),
    ):
        result = isobmff.read_properties(boxes_of(order, (10, 6)), []).transforms
        assert isobmff.size_after(result, 10, 6) == expected.shape[1::-1]
        np.testing.assert_array_equal(isobmff.apply(result, pixels), expected)


def test_boxes_that_cannot_be_read_are_said() -> None:
    warnings: list[str] = []
    found = isobmff.read_properties(b"\0\0\0\x10ftypavif\0\0\0\0", warnings)
    assert found == isobmff.Properties((0, 0), 8, None, None, ())
    assert "its transforms and colour tag are not known" in warnings[0]


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("item", [1, 258, 70_000])
def test_the_properties_of_the_primary_item(large: bool, item: int) -> None:
    item = item if large else item % 65536
    nclx = (b"colr", b"nclx" + struct.pack(">HHHB", 9, 16, 9, 0x80))
    data = boxes_of([(b"irot", b"\xfd\xff"), nclx, (b"imir", b"\xfe\xff")], (10, 6), item, large)
    found = isobmff.read_properties(data, [])
    assert found.size == (10, 6) and found.bits == 8 and found.icc is None
    assert found.encoding == color_tags.from_numbers(9, 16, True, [])
    assert found.transforms == (isobmff.Turn(1), isobmff.Mirror(False))


def test_places_of_properties_can_have_15_bits() -> None:
    fillers = [(b"free", b"")] * 200
    found = isobmff.read_properties(boxes_of([*fillers, (b"irot", b"\3")], large=True), [])
    assert found.transforms == (isobmff.Turn(3),)


@pytest.mark.parametrize(
    ("flags", "bits"), [(0x00, 8), (0x40, 10), (0x60, 12), (0x20, 8), (0x9F, 8), (0xDF, 10), (0xFF, 12)]
)
def test_the_depth_of_av1(flags: int, bits: int) -> None:
    """AV1 ISOBMFF binding, 2.3.3: high_bitdepth and twelve_bit."""
    assert isobmff.read_properties(boxes_of([(b"av1C", bytes([0x81, 0x20, flags, 0]))]), []).bits == bits
    assert isobmff.read_properties(boxes_of([(b"av1C", bytes([0x81, 0x20, flags]))]), []).bits == bits
    assert isobmff.read_properties(boxes_of([(b"av1C", b"\x81\x60")]), []).bits == 8  # cut


@pytest.mark.parametrize("kind", [b"prof", b"rICC"])
def test_a_profile_counts_more_than_numbers(kind: bytes) -> None:
    nclx = (b"colr", b"nclx" + struct.pack(">HHH", 9, 16, 9))
    for order in ([nclx, (b"colr", kind + b"profile")], [(b"colr", kind + b"profile"), nclx]):
        found = isobmff.read_properties(boxes_of(order), [])
        assert found.icc == b"profile" and found.encoding is None
    found = isobmff.read_properties(boxes_of([(b"colr", kind), nclx, (b"colr", b"nclx" + bytes(6))]), [])
    assert found.icc is None and found.encoding == color_tags.from_numbers(9, 16, True, [])  # empty; the first counts
    assert isobmff.read_properties(boxes_of([(b"colr", nclx[1][:-1])]), []).encoding is None  # cut


@pytest.mark.parametrize("zero", [None, 0, 1, 2, 3, 5, 7])
def test_a_crop_without_an_area_is_none(zero: int | None) -> None:
    numbers = [4, 2, 2, 1, -3, 2, 0, 1]
    if zero is not None:
        numbers[zero] = 0
    crop = isobmff.transform(b"clap", struct.pack(">IIIIiIiI", *numbers))
    expected = isobmff.Crop(Fraction(2), Fraction(2), Fraction(-3, 2), Fraction(0))
    assert crop == (expected if zero is None else None)
    assert isobmff.transform(b"clap", bytes(31)) is isobmff.transform(b"irot", b"") is None
    assert isobmff.transform(b"imir", b"") is isobmff.transform(b"pasp", bytes(8)) is None


@pytest.mark.parametrize(
    ("width", "height", "right", "down", "expected"),
    [
        (4, 2, 0, 0, (3, 2, 7, 4)),
        (10, 6, 0, 0, (0, 0, 10, 6)),
        (5, 3, 0, 0, (2, 2, 7, 5)),  # half a pixel: to the left, and down
        (Fraction(7, 2), Fraction(5, 2), 0, 0, (3, 2, 7, 5)),
        (4, 2, -3, -2, (0, 0, 4, 2)),
        (4, 2, 5, 3, (8, 5, 10, 6)),  # beyond the edge
        (4, 2, -5, -3, (0, 0, 2, 1)),
        (1, 1, Fraction(9, 2), Fraction(5, 2), (9, 5, 10, 6)),
        (4, 2, 7, 0, (0, 0, 10, 6)),  # outside: as a whole
        (4, 2, 0, 4, (0, 0, 10, 6)),
        (4, 2, 0, -4, (0, 0, 10, 6)),
    ],
)
def test_the_place_of_a_crop(
    width: int | Fraction, height: int | Fraction, right: int | Fraction, down: int | Fraction, expected: tuple
) -> None:
    """ISO/IEC 14496-12, 12.1.4.1: its centre is that of the image, moved."""
    crop = isobmff.Crop(Fraction(width), Fraction(height), Fraction(right), Fraction(down))
    assert crop.box(10, 6) == expected
    pixels = np.arange(60).reshape(6, 10, 1).astype(np.uint8)
    left, top, end, bottom = expected
    np.testing.assert_array_equal(isobmff.apply([crop], pixels), pixels[top:bottom, left:end])
    assert isobmff.size_after([crop, isobmff.Turn(3), isobmff.Turn(2)], 10, 6) == (bottom - top, end - left)


def test_sizes_of_boxes() -> None:
    """32 bits; 64 bits; 0: to the end of the file. A size below that of its own head ends the reading."""
    large = struct.pack(">I4sQ", 1, b"wide", 16 + 3) + b"abc"
    first, last = box(b"free", b"xy"), struct.pack(">I4s", 0, b"rest") + b"z" * 9
    assert list(isobmff.boxes(first + large + last)) == [(b"free", b"xy"), (b"wide", b"abc"), (b"rest", b"z" * 9)]
    assert list(isobmff.boxes(first + box(b"void", b""))) == [(b"free", b"xy"), (b"void", b"")]
    assert list(isobmff.boxes(first + struct.pack(">I4s", 7, b"tiny") + first)) == [(b"free", b"xy")]
    assert list(isobmff.boxes(first + struct.pack(">I4sQ", 1, b"wide", 15) + first)) == [(b"free", b"xy")]
    assert list(isobmff.boxes(first + bytes(7))) == [(b"free", b"xy")]
