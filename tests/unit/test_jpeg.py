"""Markers of JPEG files, and the limits on metadata before their pixels."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from seesr.images import jpeg, metadata_limits
from seesr.images.metadata_limits import check_metadata
from seesr.images.read import decode, open_header


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


# --- Limits on metadata


def test_a_jpeg_may_have_5000_segments() -> None:
    head, rest = file()[:2], file()[2:]
    empty, known = segment(0xFE, b""), sum(marker not in (0xDA, 0xD9) for marker, *_ in jpeg.segments(file()))
    assert open_header(head + empty * (5000 - known) + rest).size == (10, 10)
    with pytest.raises(ValueError, match=r"at least 0 MiB in 5001 segments of metadata; the limit is 16 MiB in 5000"):
        open_header(head + empty * (5001 - known) + rest)


def test_a_jpeg_may_have_16_mib_before_its_pixels() -> None:
    head, rest = file()[:2], file()[2:]
    full = segment(0xE5, bytes(65533))
    check_metadata(head + full * 255 + rest)
    with pytest.raises(ValueError, match=r"at least 16 MiB in 256 segments of metadata"):
        check_metadata(head + full * 256 + rest)


def test_markers_without_a_length_and_padding_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_limits, "MAX_SEGMENTS", 3)
    head = b"\xff\xd8\xff"
    short = b"".join(bytes([0xFF, marker]) for marker in (0x01, 0xD0, 0xD8))
    check_metadata(head[:2] + short + b"\xff" * 9 + b"\xda" + bytes(99))
    check_metadata(head[:2] + b"\xff" * 3 + segment(0xE0, b"abc") * 3 + b"\xff\xd9" + segment(0xE0, b"") * 9)
    check_metadata(head[:2] + segment(0xE0, b"abc") * 2 + b"pixels" + segment(0xE0, b"") * 9)  # damage: for the decoder
    for data in (short + segment(0xE0, b""), b"\xff" * 3 + segment(0xFE, b"abc") * 4, segment(0xCC, b"") * 4):
        with pytest.raises(ValueError, match="in 4 segments"):
            check_metadata(head[:2] + data + bytes(4))


@pytest.mark.parametrize("start", [b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"])
def test_a_tiff_may_have_1000_tags(start: bytes) -> None:
    order = "<" if start[:2] == b"II" else ">"
    for count in (1000, 1001):
        if b"+" in start:
            data = start + struct.pack(f"{order}HHQ4xQ", 8, 0, 20, count)
        else:
            data = start + struct.pack(f"{order}I4xH", 12, count)
        if count == 1000:
            check_metadata(data)
            check_metadata(data[:-1])  # cut: for the decoder
            continue
        with pytest.raises(ValueError, match="the TIFF has 1001 tags; the limit is 1000"):
            decode(data)
