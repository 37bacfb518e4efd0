"""Decodes untrusted image bytes to an `ImageData`: limits, orientation, alpha, colour profile, EXIF, 16 bits."""

from __future__ import annotations

import logging
import numbers
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from seesr.images import color_tags, convert, isobmff, xmp
from seesr.images.color_tags import Primaries
from seesr.images.header import Colours, Header, colours_of, of_pillow, open_file
from seesr.images.image_data import ImageData
from seesr.images.limits import LARGEST_FILE, LARGEST_INPUT, check_input
from seesr.images.metadata_limits import check_metadata

NOT_AN_UPLOAD = "image must be an uploaded file, a data URI or an http(s) URL"
log = logging.getLogger(__name__)


def read_upload(path: Path, folder: Path | None = None) -> bytes:
    """The bytes of a file that a runtime put below `folder`, and of nothing else: no link, no device, no pipe.

    Args:
        folder: None: where temporary files are.

    Raises:
        ValueError: one line, without the path.
    """
    if not isinstance(path, Path):  # a string that is neither an upload nor a URL
        raise ValueError(NOT_AN_UPLOAD)
    folder = folder or Path(tempfile.gettempdir())
    inside = path.parent.resolve().is_relative_to(folder.resolve())
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if inside else -1
    except OSError:
        handle = -1
    if handle < 0:
        raise ValueError(NOT_AN_UPLOAD)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(NOT_AN_UPLOAD)
        return file.read(LARGEST_FILE + 1)


def read_file(path: Path) -> bytes:
    """The bytes of a file that the caller may name freely; at most LARGEST_FILE + 1 of them."""
    with path.open("rb") as file:
        return file.read(LARGEST_FILE + 1)


def open_header(data: bytes, check_size: Callable[[int, int], object] = check_input) -> Header:
    """Opens an image file without decoding a pixel; see `decode`. Its `size` is that of the upright image."""
    if not data:
        raise ValueError("the image file is empty")
    if len(data) > LARGEST_FILE:
        raise ValueError(f"the image file is larger than {LARGEST_FILE / 2**20:.0f} MiB")
    check_metadata(data)
    try:
        header = open_file(bytes(data))
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is far over the limit of {LARGEST_INPUT / 1e6:.1f} MP") from error
    check_size(*header.size)
    return header


def decode(data: bytes, check_size: Callable[[int, int], object] = check_input) -> ImageData:
    """Decodes the bytes of an image file after checking its header.

    Args:
        check_size: takes width and height before any pixel is decoded, and raises ValueError to refuse.

    Raises:
        ValueError: not of a kind that is read; damaged; animated, of several pages; too large. One line, without a
            path.
    """
    header = open_header(data, check_size)
    if b"jumb" in data and b"c2pa" in data:
        header.warnings.append("only signed outputs keep the C2PA manifest of the file: set SEESR_C2PA_CERTIFICATE")
        header.source_type = xmp.source_type_in_manifest(data)
    return to_image_data(header, header.decode())


def from_pil(opened: Image.Image) -> ImageData:
    """A Pillow image -> ImageData.

    Raises:
        ValueError: a mode that has no defined colours (floating point, 32-bit integers).
    """
    opened.load()
    header = of_pillow(opened, lambda: colours_of(opened, header))
    info, places = opened.info, opened.info.get("chromaticity")
    if header.icc is None and "srgb" not in info and ("gamma" in info or places):  # of a PNG
        primaries = Primaries(*zip(places[::2], places[1::2], strict=True)) if places else None
        header.encoding = color_tags.from_gamma(info.get("gamma"), primaries, header.warnings)
    return to_image_data(header, header.decode())


def to_image_data(header: Header, colours: Colours) -> ImageData:
    """Decoded colours with all that the file says about them -> an upright ImageData."""
    warnings = header.warnings
    pixels = isobmff.apply(header.transforms, convert.upright(colours.pixels, header.orientation))
    rgb, alpha = convert.split(pixels)
    if header.encoding is not None:
        if header.encoding.hdr:
            warnings.append(f"{header.encoding.transfer} is mapped to sRGB: {color_tags.WHITE:g} nits are white")
        rgb, icc = color_tags.to_srgb(rgb, header.encoding, colours.grey)
    else:
        rgb, icc = convert.apply_profile(rgb, colours.icc, colours.grey, warnings)
    dpi = header.dpi
    if dpi is not None and not all(isinstance(side, numbers.Real) and 1 <= side <= 65535 for side in dpi):  # NaN too
        log.info("the resolution in the file is invalid and is not copied")
        dpi = None
    block = header.exif()
    packet = None if header.xmp is None else xmp.retained(header.xmp, warnings)
    source_type = xmp.source_type(packet) or header.source_type
    for warning in warnings:
        log.warning("%s", warning)
    grey = colours.grey or convert.equal_channels(rgb)
    return ImageData(
        rgb,
        alpha,
        icc,
        block,
        dpi,
        grey=grey,
        warnings=tuple(warnings),
        one_channel=colours.grey,
        xmp=packet,
        source_type=source_type,
    )
