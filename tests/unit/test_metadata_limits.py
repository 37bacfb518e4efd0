"""Limits on the metadata before the pixels of JPEG and TIFF files."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from seesr.images import jpeg, metadata_limits
from seesr.images.metadata_limits import check_metadata
from seesr.images.read import decode, open_header


def file() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 10)).save(buffer, "JPEG")
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


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
