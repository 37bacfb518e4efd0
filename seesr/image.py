"""Untrusted files -> pixels, pixels -> files: size, orientation, alpha, colour profile, EXIF, 16 bit."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import re
import stat
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import escape, unescape

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms

from seesr.settings import LARGEST_INPUT, check_input

FORMATS = ("JPEG", "PNG", "WEBP")
LARGEST_FILE = 100 * 2**20  # bytes
DIRECT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa"}  # modes that need no profile to be RGB(A)
STRIP = 256  # rows of a PNG that are compressed together
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>{}</dc:description>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)
log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8 | np.uint16]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An upright picture and what came with it.

    Attributes:
        rgb: [H, W, 3], uint8 or uint16 over the full range.
        alpha: [H, W] of the same dtype, not premultiplied, or None.
        icc: colour profile of `rgb`; None means sRGB.
        exif: EXIF block without an orientation, or None.
        dpi: (horizontal, vertical), or None.
        record: how the picture was made, for the file: version, bundle, settings.
    """

    rgb: Pixels
    alpha: Pixels | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    record: dict[str, Any] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def pil(self) -> Image.Image:
        """As an 8-bit Pillow image, RGB or RGBA."""
        rgb = to_uint8(self.rgb)
        return Image.fromarray(rgb if self.alpha is None else np.dstack([rgb, to_uint8(self.alpha)]))


def open_upload(path: Path, folder: Path) -> BinaryIO:
    """Opens a file that the runtime put below `folder`, and nothing else: no link, no device, no pipe.

    Raises:
        ValueError: one line, without the path.
    """
    inside = path.parent.resolve().is_relative_to(folder.resolve())
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK) if inside else -1
    except OSError:
        handle = -1
    if handle >= 0 and not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        handle = -1
    if handle < 0:
        raise ValueError("image must be an uploaded file, a data URI or an http(s) URL")
    return os.fdopen(handle, "rb")


def read(source: Path | BinaryIO, check_size: Callable[[int, int], object] = check_input) -> Picture:
    """Decodes an image file after checking its header.

    Args:
        check_size: takes width and height before any pixel is decoded, and raises ValueError to refuse.

    Raises:
        ValueError: not a JPEG, PNG or WebP; damaged; animated; too large. One line, without the path.
    """
    if isinstance(source, Path):
        with source.open("rb") as file:
            return read(file, check_size)
    data = source.read(LARGEST_FILE + 1)
    if not data:
        raise ValueError("the image file is empty")
    if len(data) > LARGEST_FILE:
        raise ValueError(f"the image file is larger than {LARGEST_FILE / 2**20:.0f} MiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked below
        try:
            header = Image.open(io.BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            raise ValueError(f"the image is far over the limit of {LARGEST_INPUT / 1e6:.1f} MP") from error
        except Exception as error:
            raise ValueError(f"this is not an image that can be read: use {', '.join(FORMATS)}") from error
        check_size(*header.size)
        if header.format != "MPO" and getattr(header, "n_frames", 1) > 1:
            raise ValueError(f"the image has {header.n_frames} frames; send one still picture")  # pyright: ignore
        if header.format == "WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise ValueError("the image file is damaged (its end is missing)")  # the decoder would not say so
        try:
            header.verify()
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
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
    dpi = opened.info.get("dpi")
    icc = opened.info.get("icc_profile") or None
    deep = read_deep(opened, data)
    if deep is not None:
        return Picture(*split(upright(deep, turn)), icc, block, dpi)
    image = opened
    if image.mode not in DIRECT:
        image, icc = to_srgb(image, icc), None
    if icc is not None and profile_space(icc) != "RGB":
        icc = None  # a grey profile: sRGB's curve is the usual one
    transparent = image.has_transparency_data
    pixels = np.asarray(image.convert("RGBA" if transparent else "RGB"))
    return Picture(*split(upright(pixels, turn)), icc, block, dpi)


def read_exif(opened: Image.Image) -> tuple[int, bytes | None]:
    """Orientation and the EXIF block without it; a block that cannot be read is left out."""
    try:
        exif = opened.getexif()
        turn = exif.pop(ExifTags.Base.Orientation, 1)
        return turn, exif.tobytes() if len(exif) else None
    except Exception as error:  # the parser raises SyntaxError, struct.error, ValueError, ...
        log.warning("the EXIF data cannot be read and are left out (%s)", type(error).__name__)
        return 1, None


def profile_space(icc: bytes) -> str:
    """The colour space of a profile ("RGB", "GRAY", "CMYK", ...), or "" if it cannot be read."""
    try:
        core: Any = ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile
        return core.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError):
        return ""


def split(pixels: Pixels) -> tuple[Pixels, Pixels | None]:
    """[H, W, 3 or 4] -> colours and alpha; an alpha that is opaque everywhere is none."""
    if pixels.shape[2] == 3:
        return pixels, None
    alpha = pixels[..., 3]
    return np.ascontiguousarray(pixels[..., :3]), None if (alpha == np.iinfo(alpha.dtype).max).all() else alpha


def read_deep(opened: Image.Image, data: bytes | None) -> NDArray[np.uint16] | None:
    """[H, W, 3 or 4] of a 16-bit PNG, which Pillow would cut to 8 bits; None for any other picture."""
    if opened.mode.startswith("I;16"):
        grey = np.asarray(opened).astype(np.uint16)
        return np.repeat(grey[..., None], 3, axis=2)
    if opened.format != "PNG" or data is None or data[24] != 16:  # bit depth in IHDR
        return None
    deep: Any = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if deep is None or deep.dtype != np.uint16:
        raise ValueError("the image file is damaged (16-bit PNG)")
    if deep.ndim == 2:
        return np.repeat(deep[..., None], 3, axis=2)
    return cv2.cvtColor(deep, cv2.COLOR_BGRA2RGBA if deep.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies an EXIF orientation (1-8)."""
    if orientation in (5, 6, 7, 8):
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


def to_uint8(pixels: Pixels) -> NDArray[np.uint8]:
    """16 bits -> 8 bits, rounded; 8 bits pass."""
    if pixels.dtype == np.uint8:
        return pixels  # type: ignore[return-value]
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def enlarge(pixels: Pixels, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC) -> Pixels:
    """Resizes [H, W] or [H, W, 3] to `size` = (width, height); same dtype. Pillow's filters, 16 bits without loss."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, resample))
    planes = [pixels] if pixels.ndim == 2 else [pixels[..., c] for c in range(pixels.shape[2])]
    resized = [np.asarray(Image.fromarray(p.astype(np.float32)).resize(size, resample)) for p in planes]
    whole = resized[0] if pixels.ndim == 2 else np.dstack(resized)
    return whole.clip(0, 65535).round().astype(np.uint16)


def pad(pixels: Pixels, multiple: int, least: int) -> Pixels:
    """Mirrors [H, W, 3] at the right and bottom until both sides are at least `least` and multiples of `multiple`."""
    right, bottom = (max(least, -(-side // multiple) * multiple) - side for side in (pixels.shape[1], pixels.shape[0]))
    return np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="symmetric")


def fill_hidden(rgb: Pixels, alpha: Pixels) -> Pixels:
    """Gives fully transparent pixels the nearest visible colour, so that hidden colours do not bleed into edges."""
    hidden = alpha == 0
    if not hidden.any() or hidden.all():
        return rgb
    from scipy.ndimage import distance_transform_edt

    nearest: Any = distance_transform_edt(hidden, return_distances=False, return_indices=True)
    rows, columns = nearest
    return rgb[rows, columns]


def write(picture: Picture, path: Path, file_format: str, quality: int) -> None:
    """Writes png, webp or jpg under a temporary name, checks that it opens at the right size, then renames it.

    jpg has no alpha: the picture is laid on white. webp and jpg have 8 bits.

    Raises:
        RuntimeError: the file does not open at its size, or the disk is full or read-only. One line, without the path.
    """
    data = encode(picture, file_format, quality)
    with Image.open(io.BytesIO(data)) as check:
        if check.size != picture.size:
            raise RuntimeError(f"the written file has {check.size} pixels instead of {picture.size}")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=path.suffix)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RuntimeError(f"the result cannot be written: {error.strerror}") from error


def encode(picture: Picture, file_format: str, quality: int) -> bytes:
    """The bytes of a png, webp or jpg file with profile, EXIF, resolution and record."""
    if file_format == "png":
        return encode_png(picture)
    image = picture.pil()
    if file_format == "jpg" and image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    options = {"icc_profile": picture.icc, "exif": picture.exif, "dpi": picture.dpi}
    if picture.record is not None:
        options["xmp"] = XMP.format(escape(json.dumps(picture.record, ensure_ascii=False))).encode()
    if file_format == "webp":
        options["method"] = 2
    buffer = io.BytesIO()
    given = {key: value for key, value in options.items() if value is not None}
    image.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[file_format], quality=quality, **given)
    return buffer.getvalue()


def encode_png(picture: Picture) -> bytes:
    """8 or 16 bits; strips are filtered and compressed side by side, and join to one stream (RFC 1950, RFC 1951).

    The common libraries compress with one thread: 5 to 20 seconds for 8192 x 8192 pixels.
    """
    pixels = picture.rgb if picture.alpha is None else np.dstack([picture.rgb, picture.alpha])
    if picture.alpha is None and picture.icc is None and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., :1]  # one channel is enough
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

    parts = [b"\x89PNG\r\n\x1a\n"]
    colour_type = {1: 0, 3: 2, 4: 6}[channels]
    parts.append(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)))
    if picture.icc is not None:
        parts.append(chunk(b"iCCP", b"profile\0\0" + zlib.compress(picture.icc)))
    if picture.dpi is not None:
        parts.append(chunk(b"pHYs", struct.pack(">IIB", *(max(1, round(d / 0.0254)) for d in picture.dpi), 1)))
    if picture.exif is not None:
        parts.append(chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0")))
    if picture.record is not None:
        parts.append(chunk(b"iTXt", b"seesr\0\0\0\0\0" + json.dumps(picture.record).encode()))
    checksum = 1
    with ThreadPoolExecutor() as pool:
        for number, (raw, packed) in enumerate(pool.map(compress, strips)):
            checksum = zlib.adler32(raw, checksum)
            parts.append(chunk(b"IDAT", (b"\x78\x01" if number == 0 else b"") + packed))
    parts.append(chunk(b"IDAT", struct.pack(">I", checksum)))
    parts.append(chunk(b"IEND", b""))
    return b"".join(parts)


def read_record(path: Path) -> dict[str, Any]:
    """The settings record of a file that this package wrote: version, bundle, settings with the seed that was used.

    Raises:
        ValueError: there is none.
    """
    with Image.open(path, formats=FORMATS) as image:
        words = image.info.get("seesr")
        found = re.search(
            r"<dc:description>(.*?)</dc:description>", image.info.get("xmp", b"").decode(errors="replace")
        )
    if words is None and found is not None:
        words = unescape(found[1])
    try:
        return json.loads(words or "")
    except ValueError as error:
        raise ValueError("the file has no settings record") from error


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
