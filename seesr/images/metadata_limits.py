"""Limits on the metadata of JPEG and TIFF files, checked before a decoder whose time is quadratic in their size."""

from __future__ import annotations

import struct

LARGEST_METADATA = 16 * 2**20  # bytes of all segments before the pixels of a JPEG
MAX_SEGMENTS = 5000  # of a JPEG, before its pixels
MAX_TAGS = 1000  # of a TIFF's first page
SOS, EOI = 0xDA, 0xD9
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD9)}  # markers without a length


def check_metadata(data: bytes) -> None:
    """Refuses a JPEG or TIFF with more metadata than any camera writes. Other files and damage are for the decoder.

    Raises:
        ValueError: one line with the limit.
    """
    if data[:3] == b"\xff\xd8\xff":
        check_jpeg(data)
    elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        check_tiff(data)


def check_jpeg(data: bytes) -> None:
    place, count = 2, 0
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in (SOS, EOI):
            return
        if marker == 0xFF:  # padding
            place += 1
            continue
        place += 2 if marker in WITHOUT_LENGTH else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        count += 1
        if count > MAX_SEGMENTS or place > LARGEST_METADATA:
            size = f"{place / 2**20:.0f} MiB in {count} segments"
            limit = f"{LARGEST_METADATA // 2**20} MiB in {MAX_SEGMENTS} segments"
            raise ValueError(f"the image file has at least {size} of metadata; the limit is {limit}; remove them")


def check_tiff(data: bytes) -> None:
    order, big = "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+")
    at, place_form, count_form = (8, "Q", "Q") if big else (4, "I", "H")
    try:
        (place,) = struct.unpack_from(order + place_form, data, at)
        (count,) = struct.unpack_from(order + count_form, data, place)
    except struct.error:
        return
    if count > MAX_TAGS:
        raise ValueError(f"the TIFF has {count} tags; the limit is {MAX_TAGS}; remove its metadata")
