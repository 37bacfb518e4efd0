"""Inspects JPEG markers (ITU-T T.81): repairs files without an end marker and identifies unsupported kinds."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image

START, END = b"\xff\xd8\xff", b"\xff\xd9"
MAX_LEADING_BYTES = 16  # bytes in front of the start that are passed over
KINDS = {  # by number of the start-of-frame marker: those that decoders do not read
    3: "lossless JPEG", 5: "hierarchical JPEG", 6: "hierarchical JPEG", 7: "hierarchical JPEG", 11: "lossless JPEG",
    55: "JPEG-LS",
}  # fmt: skip
MARKER = re.compile(rb"\xff[\x01-\xcf\xd9-\xfe]")  # those with parameters, and the end
MAX_SEGMENTS = 20000
TAIL = bytes(random.Random(0).choices(range(1, 255), k=4096))  # what no file holds; without a marker


class Truncated(ValueError):
    """A JPEG of which some pixels are missing."""


class Frame(NamedTuple):
    """What the markers say.

    Attributes:
        number: of the start-of-frame marker, 0 to 15, or 55; None: there is none.
        bits: per colour.
        place: of the byte that says so.
        ended: there is an end marker.
        complete: every scan of a progressive file is there, to the last bit of each coefficient.
    """

    number: int | None
    bits: int
    place: int
    ended: bool
    complete: bool


def start_of(data: bytes) -> int:
    """Where a JPEG starts, at most MAX_LEADING_BYTES bytes into the file; -1: nowhere."""
    return data.find(START, 0, MAX_LEADING_BYTES + len(START))


def read_frame(data: bytes) -> Frame:
    """Reads the markers of a JPEG."""
    number, bits, components, place, ended = None, 8, 0, 0, False
    low: dict[int, list[int]] = {}  # of a component: for each coefficient the lowest bit that is there
    for marker, start, body in itertools.islice(segments(data), MAX_SEGMENTS):
        frame = (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7
        if frame and len(body) > 5 and number is None:
            number, bits, components, place = marker - 0xC0, body[0], body[5], start
        elif marker == 0xDA and body:  # a scan of some coefficients of some components, down to a bit
            first, last, bit = (*body[1 + 2 * body[0] :], 0, 0, 0)[:3]
            for component in body[1 : 1 + 2 * body[0] : 2]:
                low.setdefault(component, [1] * 64)[first : last + 1] = [bit & 15] * (last + 1 - first)
        ended = ended or marker == 0xD9
    whole = len(low) == components and not any(any(bits) for bits in low.values())
    return Frame(number, bits, place, ended, whole or number not in (2, 6, 10, 14))


def segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Markers, the places of their parameters, and these; the last is the end marker."""
    place = 2
    while match := MARKER.search(data, place):
        place = match.end()
        marker, length = data[place - 1], int.from_bytes(data[place : place + 2], "big")
        yield marker, place + 2, b"" if marker == 0xD9 else data[place + 2 : place + length]
        if marker == 0xD9:
            return
        place += length


def without_exif(data: bytes) -> tuple[bytes, bytes]:
    """A JPEG without its EXIF block, and the block; empty: there is none."""
    for marker, start, body in itertools.islice(segments(data), MAX_SEGMENTS):
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            return data[: start - 4] + data[start + len(body) :], body
    return data, b""


def closed(data: bytes) -> bytes:
    """A JPEG without an end, with one.

    Raises:
        Truncated: some of its pixels are missing.
    """
    data = data.rstrip(b"\xff")  # half an end marker
    if not read_frame(data).complete or not is_whole(data):
        raise Truncated("the image file is damaged (its end is missing, with some of its pixels)")
    return data + END


def is_whole(data: bytes) -> bool:
    """Whether no pixel is missing: what would follow the data changes none of them."""
    seen = set()
    for tail in (b"", TAIL, TAIL[::-1]):
        with Image.open(io.BytesIO(data + tail + END), formats=["JPEG"]) as image:
            seen.add(hashlib.sha256(image.tobytes()).digest())
    return len(seen) == 1
