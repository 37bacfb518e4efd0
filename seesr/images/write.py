"""Encodes an `ImageData` to the bytes of a file, and saves files atomically."""

from __future__ import annotations

import dataclasses
import io
import logging
import secrets
import zipfile
from pathlib import Path

from PIL import Image

from seesr.images import xmp
from seesr.images.formats import FORMATS
from seesr.images.image_data import ImageData
from seesr.images.png import encode_png
from seesr.images.record import as_json

log = logging.getLogger(__name__)


def encode(image_data: ImageData, file_format: str, quality: int) -> bytes:
    """The bytes of a file with profile, EXIF, XMP, resolution and record, reopened to check its size.

    Args:
        file_format: a key of FORMATS. Where it has no alpha the image is laid on white.
        quality: 1 to 100; png ignores it.

    Raises:
        RuntimeError: the file does not open at its size.
    """
    chosen = FORMATS[file_format]
    if image_data.exif is not None and len(image_data.exif) > chosen.most_exif:
        log.warning("the EXIF data are too long for %s and are left out", chosen.name)
        image_data = dataclasses.replace(image_data, exif=None)
    text = as_json(image_data.record) if chosen.record_in_xmp and image_data.record is not None else None
    packets = [xmp.packet(base, image_data.source_type, text) for base in (image_data.xmp, None)]
    if packets[0] is not None and len(packets[0]) > chosen.most_xmp:
        log.warning("the XMP data of the input are too long for %s and are left out", chosen.name)
        packets.pop(0)
    image_data = dataclasses.replace(image_data, xmp=packets[0])
    data = encode_png(image_data) if chosen.deep else encode_with_pillow(image_data, file_format, quality)
    with Image.open(io.BytesIO(data)) as check:
        if check.size != image_data.size:
            raise RuntimeError(f"the written file has {check.size} pixels instead of {image_data.size}")
    return data


def encode_with_pillow(image_data: ImageData, file_format: str, quality: int) -> bytes:
    """8 bits per colour."""
    chosen, image = FORMATS[file_format], image_data.pil()
    if not chosen.alpha and image_data.alpha is not None:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA")).convert("L" if image_data.written_grey else "RGB")
    options = {"icc_profile": image_data.icc, "exif": image_data.exif, "xmp": image_data.xmp, "dpi": image_data.dpi}
    options |= chosen.options
    buffer = io.BytesIO()
    arguments = {key: value for key, value in options.items() if value is not None}
    image.save(buffer, chosen.name, quality=quality, **arguments)
    return buffer.getvalue()


def pack(files: dict[str, bytes]) -> bytes:
    """One zip of several files; the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def save(data: bytes, path: Path) -> None:
    """Writes `data` under a temporary name beside `path`, then renames it.

    Raises:
        RuntimeError: the disk is full or read-only; one line, without the path. Nothing is left.
    """
    part = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        try:
            with part.open("xb") as file:
                file.write(data)
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RuntimeError(f"the result cannot be written: {error.strerror}") from error
