"""Multithreaded PNG encoder: row strips are filtered and compressed in parallel (RFC 1950, RFC 1951).

The common libraries compress with one thread: 5 to 20 seconds for 8192 x 8192 pixels.
"""

from __future__ import annotations

import json
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from seesr.images.image_data import ImageData
from seesr.images.record import KEY

STRIP = 256  # rows that are compressed together
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def encode_png(image: ImageData) -> bytes:
    """A PNG file of 8 or 16 bits with profile, resolution, EXIF, XMP and record; grey or RGB, with or without alpha."""
    pixels = image.rgb[..., :1] if image.written_grey else image.rgb
    if image.alpha is not None:
        pixels = np.dstack([pixels, image.alpha])
    height, width, channels = pixels.shape
    depth = 8 * pixels.itemsize
    rows = pixels.astype(pixels.dtype.newbyteorder(">"), copy=False).reshape(height, -1).view(np.uint8)
    strips = [(top, min(top + STRIP, height)) for top in range(0, height, STRIP)]

    def compress(strip: tuple[int, int]) -> tuple[bytes, bytes]:
        top, bottom = strip
        above = rows[max(0, top - 1) : bottom - 1]
        if top == 0:
            above = np.concatenate([np.zeros_like(rows[:1]), above])
        filtered = np.empty((bottom - top, rows.shape[1] + 1), np.uint8)
        filtered[:, 0] = 2  # the filter "up": the difference to the row above
        np.subtract(rows[top:bottom], above, out=filtered[:, 1:])
        raw = filtered.tobytes()
        coder = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_RLE)
        return raw, coder.compress(raw) + coder.flush(zlib.Z_FINISH if bottom == height else zlib.Z_FULL_FLUSH)

    parts = [SIGNATURE]
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    parts.append(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)))
    if image.icc is not None:
        parts.append(chunk(b"iCCP", b"profile\0\0" + zlib.compress(image.icc)))
    if image.dpi is not None:
        parts.append(chunk(b"pHYs", struct.pack(">IIB", *(round(dots / 0.0254) for dots in image.dpi), 1)))
    if image.exif is not None:
        parts.append(chunk(b"eXIf", image.exif.removeprefix(b"Exif\0\0")))
    if image.xmp is not None:
        parts.append(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + image.xmp))
    if image.record is not None:
        parts.append(chunk(b"iTXt", KEY.encode() + b"\0\0\0\0\0" + json.dumps(image.record).encode()))
    checksum = 1
    with ThreadPoolExecutor() as pool:
        for number, (raw, packed) in enumerate(pool.map(compress, strips)):
            checksum = zlib.adler32(raw, checksum)
            parts.append(chunk(b"IDAT", (b"\x78\x01" if number == 0 else b"") + packed))
    parts.append(chunk(b"IDAT", struct.pack(">I", checksum)))
    parts.append(chunk(b"IEND", b""))
    return b"".join(parts)


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
