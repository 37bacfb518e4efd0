"""Untrusted bytes -> a Picture: limits before decoding, orientation, alpha, colour profile, EXIF, 16 bits."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

from seesr.images.deep import depth, read_deep
from seesr.images.kinds import open_still
from seesr.images.limits import LARGEST_FILE, LARGEST_INPUT, check_input
from seesr.images.picture import Picture, Pixels

PLAIN = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa"}  # modes that need no profile to be RGB(A)
ABOUT_THE_PICTURE = {  # tags of a TIFF that still hold for another file
    ExifTags.Base.ImageDescription, ExifTags.Base.Make, ExifTags.Base.Model, ExifTags.Base.Orientation,
    ExifTags.Base.Software, ExifTags.Base.DateTime, ExifTags.Base.Artist, ExifTags.Base.Copyright,
}  # fmt: skip
TURNED = (5, 6, 7, 8)  # orientations in EXIF whose rows are columns
NO_UPLOAD = "image must be an uploaded file, a data URI or an http(s) URL"
log = logging.getLogger(__name__)


def read_upload(path: Path, folder: Path | None = None) -> bytes:
    """The bytes of a file that a runtime put below `folder`, and of nothing else: no link, no device, no pipe.

    Args:
        folder: None: where temporary files are.

    Raises:
        ValueError: one line, without the path.
    """
    if not isinstance(path, Path):  # a string that is neither an upload nor a URL
        raise ValueError(NO_UPLOAD)
    folder = folder or Path(tempfile.gettempdir())
    inside = path.parent.resolve().is_relative_to(folder.resolve())
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if inside else -1
    except OSError:
        handle = -1
    if handle < 0:
        raise ValueError(NO_UPLOAD)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise ValueError(NO_UPLOAD)
        return file.read(LARGEST_FILE + 1)


def read_file(path: Path) -> bytes:
    """The bytes of a file that the caller may name freely; of one over the limit just enough to be refused."""
    with path.open("rb") as file:
        return file.read(LARGEST_FILE + 1)


def open_header(data: bytes, check_size: Callable[[int, int], object] = check_input) -> Image.Image:
    """Opens an image file without decoding a pixel; see `decode`."""
    if not data:
        raise ValueError("the image file is empty")
    if len(data) > LARGEST_FILE:
        raise ValueError(f"the image file is larger than {LARGEST_FILE / 2**20:.0f} MiB")
    try:
        header = open_still(data)
    except Image.DecompressionBombError as error:
        raise ValueError(f"the image is far over the limit of {LARGEST_INPUT / 1e6:.1f} MP") from error
    check_size(*upright_size(header))
    return header


def upright_size(header: Image.Image) -> tuple[int, int]:
    """(width, height) as the picture will stand, by what is known before any pixel is decoded."""
    exif = Image.Exif()
    with contextlib.suppress(Exception):  # read_exif says so
        exif.load(header.info.get("exif", b""))
    turned = exif.get(ExifTags.Base.Orientation, 1) in TURNED and header.format not in ("TIFF", "HEIF")  # these turn it
    return (header.height, header.width) if turned else header.size


def decode(data: bytes, check_size: Callable[[int, int], object] = check_input) -> Picture:
    """Decodes the bytes of an image file after checking its header.

    Args:
        check_size: takes width and height before any pixel is decoded, and raises ValueError to refuse.

    Raises:
        ValueError: not one of READABLE; damaged; animated, of several pages; too large. One line, without a path.
    """
    header = open_header(data, check_size)
    if header.format == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise ValueError("the image file is damaged (its end is missing)")  # the decoder would not say so
    try:
        header.verify()
        opened = open_still(data)
        opened.load()
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, EOFError, struct.error, ...
        raise ValueError(f"the image file is damaged ({type(error).__name__} while decoding)") from error
    return from_pil(opened, data)


def from_pil(opened: Image.Image, data: bytes | None = None) -> Picture:
    """A Pillow image -> Picture. `data`, the file's bytes, is needed for 16 bits per colour.

    Raises:
        ValueError: a mode that has no defined colours (floating point, 32-bit integers).
    """
    turn, block = read_exif(opened)
    if {"xmp", "XML:com.adobe.xmp"} & set(opened.info):
        log.info("the XMP data are left out")
    if opened.format == "MPO":
        log.info("of the pictures in the file the first is taken")
    dpi = opened.info.get("dpi")
    if dpi is not None and not all(1 <= side <= 65535 for side in dpi):  # NaN too
        log.info("the resolution makes no sense and is left out")
        dpi = None
    icc = opened.info.get("icc_profile") or None
    pixels: Pixels | None = read_deep(opened, data)
    if pixels is None:
        image = opened
        if data is not None and image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
            image.info["transparency"] *= 255 // (2 ** depth(image, data) - 1)  # Pillow spreads the greys alone
        if image.mode not in PLAIN:
            image, icc = to_srgb(image, icc), None
        pixels = np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))
    rgb, alpha = split(upright(pixels, turn))
    space = profile_space(icc)
    if icc is not None and space == "GRAY" and opened.mode[0] in "1LI":
        rgb, icc = grey_to_srgb(rgb, icc), None
    elif icc is not None and space != "RGB":
        log.warning(
            "the colour profile %s and is left out: the picture is taken as sRGB",
            f"is for {space}" if space else "cannot be read",
        )
        icc = None
    return Picture(rgb, alpha, icc, block, dpi)


def read_exif(opened: Image.Image) -> tuple[int, bytes | None]:
    """Orientation and the EXIF block without it; a block that cannot be read is left out."""
    try:
        exif = opened.getexif()
        if opened.format == "TIFF":  # its own directory, most of which describes how the file is laid out
            exif = only(exif, ABOUT_THE_PICTURE)
        turn = exif.pop(ExifTags.Base.Orientation, 1)
        for size in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):  # of the picture before
            exif.get_ifd(ExifTags.IFD.Exif).pop(size, None)
        return turn, exif.tobytes() if len(exif) else None
    except Exception as error:  # the parser raises SyntaxError, struct.error, ValueError, ...
        log.warning("the EXIF data cannot be read and are left out (%s)", type(error).__name__)
        return 1, None


def only(exif: Image.Exif, tags: Container[int]) -> Image.Exif:
    """Some of the tags, and the directories of the camera and of the place."""
    found = Image.Exif()
    found.update({tag: value for tag, value in exif.items() if tag in tags})
    for directory in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if values := exif.get_ifd(directory):
            found.get_ifd(directory).update(values)
    return found


def profile_space(icc: bytes | None) -> str:
    """The colour space of a profile ("RGB", "GRAY", "CMYK", ...); "" if there is none, or it cannot be read."""
    try:
        core: Any = ImageCms.ImageCmsProfile(io.BytesIO(icc or b"")).profile
        return core.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError):
        return ""


def grey_to_srgb(rgb: Pixels, icc: bytes) -> Pixels:
    """Grey values [H, W, 3] under a grey profile -> the sRGB values that look the same, of the same depth.

    The colour library has 8 bits; between its 256 values a 16-bit picture is interpolated.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        srgb, exact = ImageCms.createProfile("sRGB"), ImageCms.Flags.NOOPTIMIZE
        shown: Any = ImageCms.profileToProfile(ramp, profile, srgb, outputMode="RGB", flags=exact)
    except (ImageCms.PyCMSError, OSError):
        log.warning("the grey profile cannot be used and is left out: the picture is taken as sRGB")
        return rgb
    curve = np.asarray(shown)[0, :, 1]
    if rgb.dtype == np.uint8:
        return curve[rgb]
    wide = np.interp(np.arange(65536), np.arange(256) * 257, curve * 257.0).round().astype(np.uint16)
    return wide[rgb]


def split(pixels: Pixels) -> tuple[Pixels, Pixels | None]:
    """[H, W, 3 or 4] -> colours and alpha; an alpha that is opaque everywhere is none."""
    if pixels.shape[2] == 3:
        return pixels, None
    alpha = pixels[..., 3]
    return np.ascontiguousarray(pixels[..., :3]), None if (alpha == np.iinfo(alpha.dtype).max).all() else alpha


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies an EXIF orientation (1-8)."""
    if orientation in TURNED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """CMYK, YCbCr and Lab to sRGB, by the profile if it can be used."""
    if image.mode not in ("CMYK", "YCbCr", "LAB", "HSV"):
        raise ValueError(f"images of mode {image.mode} have no defined colours; use 8 or 16 bits per channel")
    if icc is not None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            log.warning("the colour profile cannot be used; converting without it")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")  # type: ignore[return-value]
    return image.convert("RGB")
