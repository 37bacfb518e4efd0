"""Reads TIFF files (Adobe TIFF 6.0): selects the main page and decodes kinds that Pillow cannot read in full depth."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seesr.images import convert
from seesr.images.exif import orientation
from seesr.images.kinds import RAW
from seesr.images.limits import LARGEST_INPUT, LARGEST_SIDE

if TYPE_CHECKING:  # loaded when a TIFF is read: it takes a quarter of a second
    import tifffile

PHOTOMETRICS = {
    0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "Lab", 9: "Lab", 10: "Lab",
    32803: "camera raw (CFA)", 32844: "LogL", 32845: "LogLuv", 34892: "camera raw (linear)",
}  # fmt: skip
COLOURS = {"grey": 1, "RGB": 3, "CMYK": 4, "Lab": 3}  # channels of what is read here
COMPRESSIONS = {1, 5, 7, 8, 32773, 32946, 34925, 50000, 50001}  # none, LZW, JPEG, Deflate, PackBits, LZMA, zstd, WebP
SUBIFDS, DNG_VERSION = 330, 50706  # tags
REDUCED, MASK = 1, 4  # bits of NewSubfileType
PREMULTIPLIED, STRAIGHT = 1, 2  # kinds of alpha
MAX_CLIPPED = 0.05  # share of floating-point values outside of 0 to 1


MAX_PAGES, MAX_CHANNELS = 1000, 16


class Unreadable(ValueError):
    """A TIFF of a kind that is not read, or floating-point values without a defined range."""


class Tiff(NamedTuple):
    """Pixels of a TIFF with their meaning.

    Attributes:
        colours: [H, W, 1, 3 or 4], uint8 or uint16 over the full range, not turned upright.
        kind: a key of COLOURS.
        alpha: [H, W], same dtype, or None.
        warnings: what was changed.
    """

    colours: NDArray[Any]
    kind: str
    alpha: NDArray[Any] | None
    warnings: tuple[str, ...]


def main_page(data: bytes) -> int:
    """The number of the page that is neither a thumbnail, a reduced version nor a mask of another.

    Raises:
        Unreadable: there are several, or the pages are previews of a camera's raw data.
    """
    with open_tiff(data) as file:
        page: Any = file.pages[0]
        previews = page.subfiletype & REDUCED and SUBIFDS in page.tags
        if data[8:10] == b"CR" or DNG_VERSION in page.tags or previews:
            raise Unreadable(f"this is a camera raw file (DNG, NEF, CR2 or the like), not an image: {RAW}")
        first: Any = itertools.islice(file.pages, MAX_PAGES + 1)
        kinds = [int(page.subfiletype) for page in first]
    pages = [number for number, kind in enumerate(kinds) if not kind & (REDUCED | MASK)]
    count = len(kinds)
    if len(pages) > 1 or (not pages and count > 1):
        number = f"more than {MAX_PAGES}" if count > MAX_PAGES else len(pages) or count
        raise Unreadable(f"the image has {number} pages; send one still image")
    return pages[0] if pages else 0


def open_tiff(data: bytes) -> tifffile.TiffFile:
    import tifffile

    return tifffile.TiffFile(io.BytesIO(data), _multifile=False)


def describe(page: tifffile.TiffPage) -> str:
    """Describes a page for error messages: bits, kind of numbers, colours, compression."""
    numbers = {2: "signed ", 3: "floating-point ", 5: "complex ", 6: "complex "}.get(page.sampleformat, "")
    colours = PHOTOMETRICS.get(page.photometric, f"photometric {int(page.photometric)}")
    extra = " with alpha" if PREMULTIPLIED in page.extrasamples or STRAIGHT in page.extrasamples else ""
    packed = "" if page.compression == 1 else f", {getattr(page.compression, 'name', page.compression)} compression"
    return f"a TIFF of {page.bitspersample}-bit {numbers}{colours}{extra}{packed}"


class About(NamedTuple):
    """What is known of a page before it is decoded.

    Attributes:
        size: (width, height) as stored.
        bits: per colour.
        kind: grey, RGB, CMYK, ...
        orientation: 1 to 8, of the tag or else of XMP; not applied.
        signed: the numbers can be negative.
        icc: profile, or None.
        dpi: (horizontal, vertical), or None.
        offset: of its directory.
        xmp: packet, or None.
    """

    size: tuple[int, int]
    bits: int
    kind: str
    orientation: int
    signed: bool
    icc: bytes | None
    dpi: tuple[float, float] | None
    offset: int
    xmp: bytes | None


def about(data: bytes, number: int) -> About:
    """Reads the directory of a page."""
    with open_tiff(data) as file:
        page: Any = file.pages[number]
        tags = page.tags
        turn = tags.valueof(274) if 274 in tags else orientation({"xmp": tags.valueof(700)})
        per_inch = {2: 1.0, 3: 2.54}.get(tags.valueof(296, 2), 0)
        sides = [tags.valueof(place) for place in (282, 283)]
        whole = all(isinstance(side, tuple) and len(side) == 2 and side[0] and side[1] for side in sides)
        dpi = tuple(per_inch * a / b for a, b in sides) if per_inch and whole else None
        return About(
            (int(page.imagewidth), int(page.imagelength)),  # damage can give several
            max(np.ravel(page.bitspersample)),
            PHOTOMETRICS.get(page.photometric, ""),
            turn if turn in range(1, 9) else 1,
            page.sampleformat == 2,
            tags.valueof(34675) or None,
            dpi,
            page.offset,
            packet if isinstance(packet := tags.valueof(700), bytes) else None,
        )


def check(data: bytes, number: int) -> None:
    """Refuses a page that `read` cannot read.

    Raises:
        ValueError: what it is, and what can be read.
    """
    with open_tiff(data) as file:
        check_kind(file.pages[number])


def reads(data: bytes, number: int) -> bool:
    """Whether `read` can read a page."""
    try:
        check(data, number)
    except Exception:  # Unreadable, or whatever its parser raises
        return False
    return True


def check_kind(page: Any) -> None:
    """Refuses what `read` cannot read.

    Raises:
        ValueError: what it is, and what can be read.
    """
    kind = PHOTOMETRICS.get(page.photometric, "")
    if isinstance(page.bitspersample, tuple):
        raise Unreadable(
            f"this is {describe(page)} with channels of different depths, which is not supported: use 8 or 16 bits"
        )
    fits = kind in COLOURS and page.samplesperpixel >= COLOURS[kind] and page.imagedepth == 1
    numbers = (page.sampleformat == 1 and page.bitspersample <= 32) or (
        page.sampleformat == 3 and kind in ("grey", "RGB")
    )
    if not fits or not numbers or page.dtype is None or page.compression not in COMPRESSIONS:
        raise Unreadable(f"this is {describe(page)}, which is not supported: use RGB or grey of 8 or 16 bits")
    tile = (page.tilewidth, page.tilelength) if page.is_tiled else (page.imagewidth, page.rowsperstrip)
    if not page.is_tiled:
        tile = tile[0], min(tile[1], page.imagelength)
    if max(tile) > LARGEST_SIDE or tile[0] * tile[1] > LARGEST_INPUT:
        raise Unreadable(f"the tiles of the TIFF are {tile[0]}x{tile[1]}; the limit is {LARGEST_INPUT} pixels")
    if page.samplesperpixel > MAX_CHANNELS:
        raise Unreadable(f"the TIFF has {page.samplesperpixel} channels; the limit is {MAX_CHANNELS}: save it as RGB")


def read(data: bytes, number: int) -> Tiff:
    """The pixels of a page.

    Raises:
        Unreadable: floating-point values that reach far outside of 0 to 1.
        Exception: of one kind or another: it is damaged.
    """
    with open_tiff(data) as file:
        page: Any = file.pages[number]
        check_kind(page)
        kind = PHOTOMETRICS[page.photometric]
        lying = zip(page.dataoffsets, page.databytecounts, strict=True)
        if not all(start and length and start + length <= len(data) for start, length in lying):
            raise OSError("a strip or tile is missing")
        pixels = page.asarray(maxworkers=1)
    planes = page.planarconfig == 2 and page.samplesperpixel > 1
    pixels = np.moveaxis(pixels, 0, -1) if planes else pixels
    pixels, warnings = to_integers(pixels.reshape(page.imagelength, page.imagewidth, -1), page)
    if page.photometric == 0:
        pixels = np.iinfo(pixels.dtype).max - pixels
    colours, alpha = pixels[..., : COLOURS[kind]], None
    for place, extra in enumerate(page.extrasamples or (STRAIGHT,) * (page.samplesperpixel - COLOURS[kind])):
        if extra in (PREMULTIPLIED, STRAIGHT):
            alpha = pixels[..., COLOURS[kind] + place]
            if extra == PREMULTIPLIED:
                colours = convert.divided(colours, alpha)
            break
    if kind == "Lab":
        colours = signed_lab(colours, page.photometric)
    return Tiff(colours, kind, alpha, warnings)


def to_integers(pixels: NDArray[Any], page: Any) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Values of any kind -> uint8 or uint16 over the full range."""
    bits = page.bitspersample
    if page.sampleformat == 3:
        outside = float(np.mean((pixels < 0) | (pixels > 1) | np.isnan(pixels)))
        if outside > MAX_CLIPPED:
            finite = pixels[np.isfinite(pixels)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (np.nan, np.nan)
            raise Unreadable(
                f"this is {describe(page)} with values from {low:g} to {high:g}: 0 to 1 is read; scale them, or save "
                "16 bits"
            )
        scaled = (np.nan_to_num(pixels.astype(np.float32), nan=0.0).clip(0, 1) * 65535 + 0.5).astype(np.uint16)
        warning = f"{outside:.2%} of the floating-point values are outside of 0 to 1 and are clipped"
        return scaled, (warning,) if outside else ()
    if page.dtype == bool:
        return pixels.astype(np.uint8) * np.uint8(255), ()
    if bits in (8, 16):
        return pixels, ()
    if bits > 16:
        return (pixels >> (bits - 16)).astype(np.uint16), (f"{bits} bits per colour are reduced to 16",)
    top, target = 2**bits - 1, np.uint8 if bits < 8 else np.uint16
    return (pixels.astype(np.uint32) * np.iinfo(target).max // top).astype(target), ()


def signed_lab(colours: NDArray[Any], photometric: int) -> NDArray[np.uint8]:
    """L, a, b of 8 or 16 bits -> 8 bits with a and b signed, as the raw mode LAB takes them."""
    if colours.dtype == np.uint16:
        colours = (colours >> 8).astype(np.uint8)
    if photometric != 8:  # ICCLAB and ITULAB: a and b are offset by 128
        colours = colours ^ np.array([0, 128, 128], np.uint8)
    return colours
