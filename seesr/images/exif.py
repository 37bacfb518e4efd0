"""Reads the EXIF orientation and keeps the EXIF tags that can be written to the output file."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from PIL import ExifTags, Image

TRANSPOSED = (5, 6, 7, 8)  # orientations whose rows are columns
ORIENTATION = ExifTags.Base.Orientation
DROPPED_TAGS = (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight)
KEPT_TIFF_TAGS = {  # tags of a TIFF that still hold for another file
    ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Software,
    ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright,
}  # fmt: skip
DIRECTORIES = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=[\"']|>)\s*([1-8])")
log = logging.getLogger(__name__)


def orientation(info: Mapping[Any, Any]) -> int:
    """The orientation (1 to 8) that EXIF says, else XMP, else 1. Damage elsewhere in them does not matter.

    Args:
        info: of a Pillow image: `exif` and `xmp` are bytes.
    """
    result = in_exif(info.get("exif") or b"")
    if result is None:
        packet = info.get("xmp") or info.get("XML:com.adobe.xmp") or b""
        match = XMP_ORIENTATION.search(packet.encode() if isinstance(packet, str) else packet)
        result = int(match[1]) if match else 1
    return result


def in_exif(block: bytes) -> int | None:
    """The orientation in the first directory of an EXIF block; None where there is no valid one."""
    block = block.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(block[:2], "")
    try:
        start = struct.unpack_from(f"{order}I", block, 4)[0] if order else len(block)
        for place in range(start + 2, start + 2 + 12 * struct.unpack_from(f"{order}H", block, start)[0], 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", block, place)
            if tag == ORIENTATION and count == 1 and kind in (1, 3, 4):  # BYTE, SHORT, LONG
                value = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], block, place + 8)[0]
                return value if 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def writable_block(getexif: Callable[[], Image.Exif], warnings: list[str], of_tiff: bool = False) -> bytes | None:
    """The EXIF block without orientation and pixel size; what cannot be written again is left out.

    Args:
        getexif: as of a Pillow image; may raise.
        warnings: takes the names of what is left out.
        of_tiff: it is the directory of a TIFF, most of which describes how the file is laid out.
    """
    try:
        exif = kept_tiff_tags(getexif()) if of_tiff else getexif()
        exif.pop(ORIENTATION, None)
        for tag in DROPPED_TAGS:
            exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
        return exif.tobytes() if len(exif) else None
    except Exception as error:  # struct.error, SyntaxError, TypeError, ValueError, ... of one tag or another
        log.debug("EXIF as a whole: %r", error)
        return readable_tags(getexif, warnings, of_tiff)


def readable_tags(getexif: Callable[[], Image.Exif], warnings: list[str], of_tiff: bool) -> bytes | None:
    """The tags that can be written again, each tried alone."""
    exif, lost = Image.Exif(), []
    for directory in (None, *DIRECTORIES):
        try:
            source = within(getexif(), directory)
            tags = list(source)
        except Exception:
            lost.append("all" if directory is None else directory.name)
            continue
        for tag in tags:
            if tag in (ORIENTATION, *DROPPED_TAGS, *ExifTags.IFD):
                continue
            if directory is None and of_tiff and tag not in KEPT_TIFF_TAGS:
                continue
            try:
                value, alone = source[tag], Image.Exif()
                within(alone, directory)[tag] = value
                alone.tobytes()
            except Exception:
                lost.append(name(directory, tag))
            else:
                within(exif, directory)[tag] = value
    warnings.append(f"EXIF data that cannot be read are left out: {', '.join(lost) or 'all'}")
    return exif.tobytes() if len(exif) else None


def with_resolution(block: bytes | None, dpi: int) -> bytes:
    """An EXIF block, or None, with this resolution in dots per inch."""
    exif = Image.Exif()
    exif.load(block or b"")
    exif.update({ExifTags.Base.XResolution: dpi, ExifTags.Base.YResolution: dpi, ExifTags.Base.ResolutionUnit: 2})
    return exif.tobytes()


def within(exif: Image.Exif, directory: int | None) -> Any:
    return exif if directory is None else exif.get_ifd(directory)


def name(directory: int | None, tag: int) -> str:
    """What a tag is called, or its number."""
    names = ExifTags.GPSTAGS if directory == ExifTags.IFD.GPSInfo else ExifTags.TAGS
    return names.get(tag, f"tag {tag}")


def kept_tiff_tags(exif: Image.Exif) -> Image.Exif:
    """Of a TIFF's tags those that hold for another file, and the directories of the camera and of the place."""
    result = Image.Exif()
    result.update({tag: value for tag, value in exif.items() if tag in KEPT_TIFF_TAGS})
    for directory in DIRECTORIES:
        if values := exif.get_ifd(directory):
            result.get_ifd(directory).update(values)
    return result
