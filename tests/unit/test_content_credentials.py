"""Files without their C2PA manifest."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from seesr.images import content_credentials, png_chunks
from seesr.images.image_data import ImageData
from seesr.images.png import encode_png

MANIFEST = b"JP\0\1\0\0\0\1\0\0\0\x20jumb" + bytes(20)


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )  # padded to an even length
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


@pytest.mark.parametrize("length", [10, 11])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_webp_without_its_manifest(length: int, place: int) -> None:
    chunks = [(b"VP8L", bytes(length)), (b"XMP ", b"C2PA is text here")]
    plain = webp(*chunks)
    for manifest in (b"abc", b"abcd"):
        chunks.insert(place, (b"C2PA", manifest))
        assert content_credentials.without(webp(*chunks)) == plain
        del chunks[place]
    assert content_credentials.without(plain) == plain and content_credentials.state(plain) is None


def test_a_jpeg_without_its_manifest() -> None:
    """It lies in segments APP11; other JUMBF boxes and other segments stay."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG")
    plain = buffer.getvalue()

    def segment(marker: int, body: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body

    signed = plain[:2] + segment(0xEB, MANIFEST) + segment(0xEB, MANIFEST + b"more") + plain[2:]
    assert content_credentials.without(signed) == plain
    for body in (b"HDR_RI ver=11", b"JP" + bytes(20)):
        other = plain[:2] + segment(0xEB, body) + segment(0xEA, MANIFEST) + plain[2:]
        assert content_credentials.without(other) == other


def test_a_png_without_its_manifest() -> None:
    plain = encode_png(ImageData(np.zeros((4, 5, 3), np.uint8)))
    signed = plain[:33] + png_chunks.chunk(b"caBX", b"manifest") + plain[33:]
    assert content_credentials.without(signed) == content_credentials.without(plain) == plain
    assert content_credentials.without(b"no image") == b"no image"
