"""Opens an image file without decoding a pixel: one function for each format that is read.

Each returns a Header: the size of the upright image, what the file says about its pixels, and how to decode them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings as python_warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seesr.images import convert, exif, isobmff, jpeg, jxl, png_chunks, tiff
from seesr.images.color_tags import Encoding
from seesr.images.deep import deep_grey, deep_png
from seesr.images.image_data import Pixels
from seesr.images.kinds import AVIF, HEIC, READABLE, brands, refusal
from seesr.images.metadata_limits import check_metadata

GREY = {"1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N"}  # modes with one colour
log = logging.getLogger(__name__)


class Colours(NamedTuple):
    """Decoded pixels.

    Attributes:
        pixels: [H, W, 3 or 4], RGB and alpha, not premultiplied, uint8 or uint16 over the full range.
        icc: their profile; None: sRGB, or what the header's `encoding` says.
        grey: the file has one channel of colour.
    """

    pixels: Pixels
    icc: bytes | None
    grey: bool


@dataclasses.dataclass
class Header:
    """An image file that is open but not decoded.

    Attributes:
        size: (width, height) of the upright image.
        decode: returns the pixels as stored; raises ValueError with one line, or an error of the decoder.
        icc: colour profile, or None.
        encoding: a colour tag that is no profile; None: there is none, or a profile counts more.
        orientation: 1 to 8, to be applied to what `decode` gives.
        transforms: of the container, to be applied likewise.
        exif: returns the EXIF block for the output, or None.
        xmp: the packet of the file, or None.
        source_type: IPTC digital source type that the file states outside of XMP, a URI, or None.
        dpi: (horizontal, vertical), or None.
        warnings: what was left out or repaired; decoding adds to them.
    """

    size: tuple[int, int]
    decode: Callable[[], Colours]
    icc: bytes | None = None
    encoding: Encoding | None = None
    orientation: int = 1
    transforms: tuple[isobmff.Transform, ...] = ()
    exif: Callable[[], bytes | None] = lambda: None
    xmp: bytes | None = None
    source_type: str | None = None
    dpi: tuple[float, float] | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)


def open_file(data: bytes) -> Header:
    """Opens an image file by its first bytes.

    Raises:
        ValueError: what it is, and what would be accepted; one line.
        DecompressionBombError: from Pillow.
    """
    if data.startswith(png_chunks.SIGNATURE):
        return open_png(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return open_webp(data)
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return open_tiff(data)
    if data.startswith((jxl.CODESTREAM, jxl.CONTAINER)):
        return open_jxl(data)
    brand_codes = brands(data)
    if brand_codes & AVIF:
        return open_avif(data)
    if brand_codes & HEIC:
        return open_heic(data)
    if jpeg.start_of(data) >= 0:
        return open_jpeg(data)
    raise refusal(data)


def open_png(data: bytes) -> Header:
    chunks = png_chunks.split(data)
    image = with_pillow(chunks.data, "PNG")
    for name, value in (("icc_profile", chunks.icc), ("exif", chunks.exif), ("xmp", chunks.xmp)):
        if value is not None:
            image.info[name] = value

    def decode() -> Colours:
        with decoding():
            with_pillow(chunks.data, "PNG").verify()  # checksums
            image.load()
        deep, bits, color_type = deep_png(image, chunks.data, header.warnings), *chunks.data[24:26]
        colours = colours_of(image, header, deep, few_bits=bits)
        return colours._replace(grey=color_type in (0, 4))  # Pillow opens 16-bit grey with alpha as RGBA

    header = of_pillow(image, decode)
    header.encoding = chunks.encoding
    header.warnings += chunks.warnings
    return header


def open_webp(data: bytes) -> Header:
    def decode() -> Colours:
        if len(data) < 8 + int.from_bytes(data[4:8], "little"):
            raise Damaged("the image file is damaged (its end is missing)")  # the decoder would not say so
        with decoding():
            image.load()
        return colours_of(image, header)

    image = with_pillow(data, "WEBP")
    header = of_pillow(image, decode)
    return header


def open_jpeg(data: bytes) -> Header:
    before = jpeg.start_of(data)
    data = data[before:]
    check_metadata(data)
    frame = jpeg.read_frame(data)
    if frame.bits == 12 and frame.number in (0, 1, 2):
        return open_deep_jpeg(data, frame)

    def decode() -> Colours:
        opened = image
        with decoding():
            if not frame.ended:
                opened = with_pillow(jpeg.closed(data), "JPEG")
                header.warnings.append("the JPEG has no end (EOI); all of its pixels are there")
            opened.load()
        return colours_of(opened, header)

    try:
        image = with_pillow(data, "JPEG")
    except Damaged:  # Pillow reads the resolution in EXIF, and stops at some that make no sense
        if frame.number in jpeg.KINDS:
            raise ValueError(f"this is a {jpeg.KINDS[frame.number]}, which is not supported: save it as PNG") from None
        data, block = jpeg.without_exif(data)
        image = with_pillow(data, "JPEG")
        image.info["exif"] = block
    header = of_pillow(image, decode)
    if before:
        header.warnings.append(f"{before} byte(s) before the JPEG data are skipped")
    return header


def open_deep_jpeg(data: bytes, frame: jpeg.Frame) -> Header:
    """A JPEG of 12 bits: Pillow reads the metadata of a copy that claims 8."""
    image = with_pillow(data[: frame.place] + b"\x08" + data[frame.place + 1 :], "JPEG")
    if image.mode not in ("L", "RGB"):
        raise ValueError("this is a JPEG of 12 bits in CMYK, which is not supported: save it with 8 bits or as PNG")

    def decode() -> Colours:
        import imagecodecs

        if not frame.ended:
            raise Damaged("the image file is damaged (its end is missing)")
        with decoding():
            values: NDArray[Any] = imagecodecs.jpeg8_decode(data)
        values = widened(values, 12)
        return Colours(np.stack([values] * 3, axis=2) if values.ndim == 2 else values, header.icc, values.ndim == 2)

    header = of_pillow(image, decode)
    return header


def open_tiff(data: bytes) -> Header:
    with opening("TIFF"):
        number = tiff.main_page(data)
        about = tiff.about(data, number)
    image = None
    with contextlib.suppress(Damaged):  # a kind that Pillow does not know
        image = with_pillow(data, "TIFF", number)
    known = image is not None and (image.mode in convert.PLAIN | convert.CONVERTED or image.mode.startswith("I;16"))
    if about.signed or not known:
        with opening("TIFF"):
            tiff.check(data, number)  # says what it is
    readable = tiff.reads(data, number)
    other = open_with_tifffile(data, number, about)
    if image is None or not known or (about.bits > 8 and readable):
        return other

    def decode() -> Colours:
        try:
            with decoding():
                image.load()  # turns it upright
        except Damaged:
            if not readable:
                raise
            header.orientation = about.orientation
            return other.decode()
        if about.bits > 8:
            header.warnings.append(f"{about.bits} bits per colour are reduced to 8")
        return colours_of(image, header)

    header = of_pillow(image, decode)
    header.size = other.size
    return header


def open_with_tifffile(data: bytes, number: int, about: tiff.About) -> Header:
    """A page that Pillow cannot read, or not in full."""

    def decode() -> Colours:
        with decoding():
            page = tiff.read(data, number)
        header.warnings += page.warnings
        if page.kind not in ("CMYK", "Lab"):
            rgb = np.repeat(page.colours, 3, axis=2) if page.kind == "grey" else page.colours
            layers = [rgb] if page.alpha is None else [rgb, page.alpha]
            return Colours(np.dstack(layers), header.icc, page.kind == "grey")
        layers = [layer for layer in (page.colours, page.alpha) if layer is not None]
        if page.colours.dtype != np.uint8:
            layers = [(layer >> 8).astype(np.uint8) for layer in layers]
            header.warnings.append("16 bits per colour are reduced to 8")
        mode, size = {"CMYK": "CMYK", "Lab": "LAB"}[page.kind], about.size
        raw = Image.frombytes(mode, size, np.ascontiguousarray(layers[0]).tobytes())
        layers[0] = np.asarray(convert.to_srgb(raw, header.icc, header.warnings))
        return Colours(np.dstack(layers), None, grey=False)

    def directory() -> Image.Exif:
        directory_exif = Image.Exif()
        directory_exif.endian = {b"II": "<", b"MM": ">"}[data[:2]]
        directory_exif.bigtiff = data[2:4] in (b"+\0", b"\0+")
        directory_exif.load_from_fp(io.BytesIO(data), about.offset)
        return directory_exif

    width, height = about.size
    header = Header((height, width) if about.orientation in exif.TRANSPOSED else about.size, decode, about.icc)
    header.orientation, header.dpi, header.xmp = about.orientation, about.dpi, about.xmp
    header.exif = lambda: exif.writable_block(directory, header.warnings, of_tiff=True)
    return header


def open_avif(data: bytes) -> Header:
    warnings: list[str] = []
    properties = isobmff.read_properties(data, warnings)
    try:
        image = with_pillow(data, "AVIF")
    except Damaged:
        if b"Exif" not in data or 0 in properties.size:
            raise
        image = None  # Pillow stops at EXIF that it cannot write again
        warnings.append("EXIF data that cannot be read are left out")

    def decode() -> Colours:
        import imagecodecs

        with decoding():
            if image is not None and not hdr and properties.bits == 8:
                image.load()
                return colours_of(image, header)
            values = imagecodecs.avif_decode(data)  # Pillow reduces it to 8 bits
        if values.dtype == np.uint16:
            values = widened(values, properties.bits)
        return Colours(np.stack([values] * 3, axis=2) if values.ndim == 2 else values, header.icc, values.ndim == 2)

    hdr = properties.encoding is not None and properties.encoding.hdr
    header = Header(properties.size, decode, icc=properties.icc) if image is None else of_pillow(image, decode)
    stored = properties.size if image is None else image.size
    header.size = isobmff.size_after(properties.transforms, *stored)
    header.orientation, header.transforms, header.encoding = 1, properties.transforms, properties.encoding
    header.warnings += warnings
    return header


def open_heic(data: bytes) -> Header:
    try:
        import pillow_heif
    except ImportError as error:
        raise ValueError("this is HEIC, which needs a package: pip install -e '.[heic]'") from error
    pillow_heif.register_heif_opener()
    warnings: list[str] = []
    properties = isobmff.read_properties(data, warnings)
    image = with_pillow(data, "HEIF")  # libheif applies the transforms

    def decode() -> Colours:
        with decoding():
            bits = image.info["bit_depth"]
            if bits == 8:
                image.load()
                return colours_of(image, header)
            values = np.asarray(pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False))
            values = widened(values >> (16 - bits), bits)
        return Colours(np.stack([values] * 3, axis=2) if values.ndim == 2 else values, header.icc, values.ndim == 2)

    header = of_pillow(image, decode)
    header.orientation, header.encoding = 1, properties.encoding
    header.warnings += warnings
    if (count := getattr(image, "n_frames", 1)) > 1:
        header.warnings.append(f"the file has {count} images; the primary one is used")
    return header


def open_jxl(data: bytes) -> Header:
    with opening("JXL"):
        about = jxl.read_header(data)

    def decode() -> Colours:
        import imagecodecs

        with decoding():
            values: NDArray[Any] = np.asarray(imagecodecs.jpegxl_decode(data))  # upright
        values = values.reshape(*values.shape[:2], -1)
        if values.shape != (about.size[1], about.size[0], about.channels):
            raise Damaged("the JPEG XL file is damaged: it does not hold what its header says")
        if values.dtype == np.uint16:
            values = widened(values, about.bits)
        elif about.bits < 8:
            values = (values.astype(np.uint16) * 255 // (2**about.bits - 1)).astype(np.uint8)
        grey, alpha = about.channels < 3, about.channels % 2 == 0
        colours = values[..., :-1] if alpha else values
        if about.premultiplied:
            colours = convert.divided(colours, values[..., -1])
        layers = [colours] * (3 if grey else 1) + ([values[..., -1:]] if alpha else [])
        return Colours(np.concatenate(layers, axis=2), None, grey)

    def directory() -> Image.Exif:
        directory_exif = Image.Exif()
        directory_exif.load(about.exif or b"")
        return directory_exif

    header = Header(about.size, decode, encoding=about.encoding, xmp=about.xmp)
    header.exif = lambda: exif.writable_block(directory, header.warnings)
    return header


def widened(values: NDArray[np.uint16], bits: int) -> NDArray[np.uint16]:
    """Values of 9 to 16 bits over the full range of 16."""
    return (values.astype(np.uint32) * 65535 // (2**bits - 1)).astype(np.uint16)


class Damaged(ValueError):
    """A file of a known kind that cannot be read."""


@contextlib.contextmanager
def opening(name: str) -> Iterator[None]:
    """Converts any exception of a header parser to a one-line `Damaged`."""
    try:
        yield
    except (Damaged, tiff.Unreadable, jxl.Unreadable):
        raise
    except Exception as error:
        raise Damaged(f"the {READABLE[name]} file is damaged: its header cannot be read") from error


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Converts any exception of a decoder (OSError, SyntaxError, struct.error, ...) to a one-line `Damaged`."""
    try:
        yield
    except (Damaged, tiff.Unreadable, jpeg.Truncated):
        raise
    except Exception as error:
        raise Damaged(f"the image file is damaged ({type(error).__name__} while decoding)") from error


def with_pillow(data: bytes, name: str, page: int | None = None) -> Image.Image:
    """Opens the header of one still image.

    Args:
        name: of the format, as Pillow calls it.
        page: of a TIFF; of other files there must be one image only.

    Raises:
        Damaged: its header cannot be read.
        ValueError: an animation.
        DecompressionBombError: from Pillow.
    """
    try:
        with python_warnings.catch_warnings():
            python_warnings.simplefilter("ignore")  # limits are checked next, and damage is said below
            image: Any = Image.open(io.BytesIO(data), formats=[name])
            count = getattr(image, "n_frames", 1)  # looked up now: a TIFF does not know it once it is decoded
            if page:
                image.seek(page)
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        raise Damaged(f"the {READABLE[name]} file is damaged: its header cannot be read") from error
    if name not in ("TIFF", "HEIF") and image.format != "MPO" and count > 1:
        raise ValueError(f"the image has {count} frames; send one still image")
    return image


def of_pillow(image: Image.Image, decode: Callable[[], Colours]) -> Header:
    """The header of an image that Pillow has opened."""
    of_tiff = image.format == "TIFF"
    turn = 1 if of_tiff else exif.orientation(image.info)  # of a TIFF Pillow applies it
    size = (image.height, image.width) if turn in exif.TRANSPOSED else image.size
    header = Header(size, decode, icc=image.info.get("icc_profile") or None, orientation=turn)
    header.exif = lambda: exif.writable_block(image.getexif, header.warnings, of_tiff)
    header.dpi = image.info.get("dpi")
    packet = image.info.get("xmp") or None
    header.xmp = packet.encode() if isinstance(packet, str) else packet
    if image.format == "MPO":
        log.info("the file has several images; the first one is used")
    return header


def colours_of(
    image: Image.Image, header: Header, deep: NDArray[np.uint16] | None = None, few_bits: int = 8
) -> Colours:
    """The colours of a Pillow image; CMYK, Lab and YCbCr become sRGB.

    Args:
        header: its profile is applied where the mode needs it; takes warnings.
        deep: the pixels with 16 bits, where Pillow has cut them to 8.
        few_bits: bits per grey value in the file, below 8 too.

    Raises:
        ValueError: a mode that has no defined colours (floating point, 32-bit integers).
    """
    icc, grey = header.icc, image.mode in GREY
    if deep is None and image.mode.startswith("I;16"):
        deep = deep_grey(image)
    if deep is not None:
        return Colours(deep, icc, grey)
    if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2**few_bits - 1)  # Pillow spreads the greys alone
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode not in convert.PLAIN:
        image, icc = convert.to_srgb(image, icc, header.warnings), None
    return Colours(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")), icc, grey)
