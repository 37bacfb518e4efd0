"""Reads colour tag and transforms of the primary image in a HEIF or AVIF file (ISO/IEC 14496-12 and 23008-12).

The decoder of HEIC applies the transforms itself; that of AVIF applies none of them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from seesr.images.color_tags import Encoding, from_numbers
from seesr.images.image_data import Pixels


class Crop(NamedTuple):
    """A clean aperture (`clap`), of an image of any size."""

    width: Fraction
    height: Fraction
    right: Fraction  # offset of the centre from the image's
    down: Fraction

    def box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in an image of this size, rounded as libheif does."""
        left, top = (
            self.right + Fraction(width) / 2 - self.width / 2,
            self.down + Fraction(height) / 2 - self.height / 2,
        )
        x, y = left.__floor__(), rounded(top)
        box = max(0, x), max(0, y), min(width, x + rounded(self.width)), min(height, y + rounded(self.height))
        return box if box[0] < box[2] and box[1] < box[3] else (0, 0, width, height)


class Turn(NamedTuple):
    """A rotation (`irot`) by quarter turns against the clock."""

    quarters: int


class Mirror(NamedTuple):
    """A reflection (`imir`): left and right change places, or top and bottom."""

    sideways: bool


Transform = Crop | Turn | Mirror


class Properties(NamedTuple):
    """What the container says about its primary image.

    Attributes:
        size: (width, height) before the transforms; (0, 0): not known.
        bits: per colour.
        icc: its profile, or None.
        encoding: of its nclx colour tag; None: there is none, or a profile, which counts more.
        transforms: in the order in which they are applied.
    """

    size: tuple[int, int] = (0, 0)
    bits: int = 8
    icc: bytes | None = None
    encoding: Encoding | None = None
    transforms: tuple[Transform, ...] = ()


def rounded(value: Fraction) -> int:
    """To the nearest integer, halves upwards."""
    return (value + Fraction(1, 2)).__floor__()


def read_properties(data: bytes, warnings: list[str]) -> Properties:
    """The properties of the primary image; none where the boxes cannot be read, which is added to `warnings`.

    Raises:
        ValueError: a colour tag that cannot be converted.
    """
    try:
        properties = list(primary_properties(data))
    except (IndexError, KeyError, struct.error):
        warnings.append("the boxes of the image cannot be read; its transforms and colour tag are not known")
        return Properties()
    named: dict[bytes, bytes] = {}
    for name, body in properties:
        named.setdefault(name + body[:4] if name == b"colr" else name, body)
    icc = (named.get(b"colrprof") or named.get(b"colrrICC") or b"")[4:] or None
    result = Properties(icc=icc, transforms=tuple(filter(None, (transform(*each) for each in properties))))
    if len(body := named.get(b"ispe", b"")) >= 12:
        result = result._replace(size=struct.unpack_from(">II", body, 4))
    if len(body := named.get(b"av1C", b"")) > 2 and body[2] & 0x40:  # AV1 ISOBMFF binding, 2.3: high_bitdepth
        result = result._replace(bits=12 if body[2] & 0x20 else 10)
    if icc is None and len(tag := named.get(b"colrnclx", b"")) >= 10:  # the decoder widens the range
        result = result._replace(encoding=from_numbers(*struct.unpack_from(">HH", tag, 4), True, warnings))
    return result


def transform(name: bytes, body: bytes) -> Transform | None:
    """The transform of a property; None of any other."""
    if name == b"irot" and body:
        return Turn(body[0] & 3)
    if name == b"imir" and body:
        return Mirror(bool(body[0] & 1))
    if name == b"clap" and len(body) == 32:
        values = struct.unpack(">IIIIiIiI", body)
        if min(values[0], values[2], *values[1::2]) > 0:
            return Crop(*(Fraction(values[k], values[k + 1]) for k in range(0, 8, 2)))
    return None


def apply(transforms: Sequence[Transform], pixels: Pixels) -> Pixels:
    """[H, W, C] as the container wants it shown."""
    for each in transforms:
        if isinstance(each, Crop):
            left, top, right, bottom = each.box(pixels.shape[1], pixels.shape[0])
            pixels = pixels[top:bottom, left:right]
        elif isinstance(each, Turn):
            pixels = np.rot90(pixels, each.quarters)
        else:
            pixels = pixels[:, ::-1] if each.sideways else pixels[::-1]
    return np.ascontiguousarray(pixels)


def size_after(transforms: Sequence[Transform], width: int, height: int) -> tuple[int, int]:
    """(width, height) as the container wants it shown."""
    for each in transforms:
        if isinstance(each, Crop):
            left, top, right, bottom = each.box(width, height)
            width, height = right - left, bottom - top
        elif isinstance(each, Turn) and each.quarters % 2:
            width, height = height, width
    return width, height


def primary_properties(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of every property of the primary item, in the order of its associations."""
    meta = next((body for name, body in boxes(data) if name == b"meta"), b"")[4:]
    inside = dict(boxes(meta))
    primary = item_number(inside[b"pitm"][4:], inside[b"pitm"][0] > 0)
    parts = list(boxes(inside[b"iprp"]))
    properties = list(boxes(dict(parts)[b"ipco"]))
    for name, body in parts:
        if name == b"ipma":
            for item, places in associations(body):
                if item == primary:
                    yield from (properties[place - 1] for place in places if place)


def associations(body: bytes) -> Iterator[tuple[int, list[int]]]:
    """(item, places of its properties from 1 on) of an ItemPropertyAssociationBox."""
    large_item, large_place = body[0] > 0, body[3] & 1
    count, place = struct.unpack_from(">I", body, 4)[0], 8
    for _ in range(count):
        item = item_number(body[place:], large_item)
        place += 4 if large_item else 2
        number, step = body[place], 2 if large_place else 1
        place += 1
        raw = [int.from_bytes(body[place + k * step : place + (k + 1) * step], "big") for k in range(number)]
        place += number * step
        yield item, [value & (0x7FFF if large_place else 0x7F) for value in raw]  # the top bit: "essential"


def item_number(body: bytes, large: bool) -> int:
    return struct.unpack_from(">I" if large else ">H", body)[0]


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name and body of the boxes that follow each other."""
    place = 0
    while place + 8 <= len(data):
        size, name, head = struct.unpack_from(">I", data, place)[0], data[place + 4 : place + 8], 8
        if size == 1:
            size, head = struct.unpack_from(">Q", data, place + 8)[0], 16
        elif size == 0:
            size = len(data)  # to the end
        if size < head:
            return
        yield name, data[place + head : place + size]
        place += size
