"""Markers of JPEG files."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from seesr.images import jpeg


def file(**options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


@pytest.mark.parametrize("number", [*range(16), 55])
def test_the_frame_says_kind_and_depth(number: int) -> None:
    data = file()
    place = data.index(b"\xff\xc0")
    data = data[: place + 1] + bytes([0xC0 + number, *data[place + 2 : place + 4], 12]) + data[place + 5 :]
    frame = jpeg.read_frame(data)
    if number in (4, 8, 12):  # tables, and a reserved marker
        assert frame.number is None and frame.bits == 8
    else:
        assert (frame.number, frame.bits, frame.place) == (number, 12, place + 4)
    assert frame.ended and not jpeg.read_frame(data[:-2]).ended


def test_the_first_frame_counts() -> None:
    data = file()
    place = data.index(b"\xff\xc0")
    second = segment(0xC2, b"\x0c" + bytes(4) + b"\3" + bytes(9))
    end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    assert jpeg.read_frame(data[:end] + second + data[end:]) == jpeg.read_frame(data)
    assert jpeg.read_frame(data[:place] + segment(0xC2, bytes(5)) + data[place:]).number == 0  # too short


def scan(components: bytes, first: int, last: int, bits: int) -> bytes:
    tables = b"".join(bytes([number, 0]) for number in components)
    return segment(0xDA, bytes([len(components)]) + tables + bytes([first, last, bits]))


@pytest.mark.parametrize(
    ("scans", "complete"),
    [
        ([(b"\1\2", 0, 0, 0x00), (b"\1", 1, 63, 0x00), (b"\2", 1, 63, 0x00)], True),
        ([(b"\1\2", 0, 0, 0x01), (b"\1\2", 0, 0, 0x10), (b"\1", 1, 63, 0x00), (b"\2", 1, 63, 0x00)], True),
        ([(b"\1\2", 0, 0, 0x01), (b"\1", 1, 63, 0x00), (b"\2", 1, 63, 0x00)], False),  # the lowest bit is missing
        ([(b"\1\2", 0, 0, 0x00), (b"\1", 1, 63, 0x00)], False),  # a component of the second
        ([(b"\1\2", 0, 0, 0x00), (b"\1", 1, 63, 0x00), (b"\2", 1, 62, 0x00)], False),  # its last coefficient
        ([(b"\1\2", 0, 0, 0x00), (b"\1", 1, 63, 0x00), (b"\2", 2, 63, 0x00)], False),
        ([(b"\1", 0, 0, 0x00), (b"\1", 1, 63, 0x00)], False),  # the second component
    ],
)
@pytest.mark.parametrize("number", [0, 2, 6, 10, 14])
def test_a_progressive_file_is_complete_with_every_bit(
    scans: list[tuple[bytes, int, int, int]], complete: bool, number: int
) -> None:
    frame = segment(0xC0 + number, b"\x08\0\x08\0\x08\2" + bytes(6))
    data = b"\xff\xd8" + frame + b"".join(scan(*each) for each in scans) + jpeg.END
    assert jpeg.read_frame(data).complete == (complete or number == 0)


def test_segments_and_their_places() -> None:
    data = (
        b"\xff\xd8"
        + segment(0xE1, b"abc")
        + b"\xff\xff"
        + segment(0xFE, b"")
        + b"\xff\0x"
        + b"\xff\xd5"
        + jpeg.END
        + b"more"
    )
    found = list(jpeg.segments(data))
    assert [(marker, body) for marker, _, body in found] == [(0xE1, b"abc"), (0xFE, b""), (0xD9, b"")]
    assert data[found[0][1] : found[0][1] + 3] == b"abc"


def test_a_jpeg_without_exif() -> None:
    exif = Image.Exif()
    exif[271] = "maker"
    with_exif = file(exif=exif.tobytes(), comment=b"Exif\0\0 is text here")
    rest, block = jpeg.without_exif(with_exif)
    assert block == exif.tobytes() and rest == file(comment=b"Exif\0\0 is text here")
    assert jpeg.without_exif(rest) == (rest, b"")


@pytest.mark.parametrize("count", [0, 1, 16, 17])
def test_at_most_16_bytes_before_the_start_are_skipped(count: int) -> None:
    assert jpeg.start_of(b"\n" * count + file()) == (count if count <= 16 else -1)
