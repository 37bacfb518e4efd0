"""The kinds of files that can be read, and words for others that people send."""

from __future__ import annotations

import io
import warnings
from typing import Any

from PIL import Image

READABLE = {  # Pillow's names and everybody's
    "JPEG": "JPEG",
    "PNG": "PNG",
    "WEBP": "WebP",
    "AVIF": "AVIF",
    "TIFF": "TIFF",
    "HEIF": "HEIC",
}
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".tiff", ".heic", ".heif"}
PARTS = {"TIFF": "pages", "HEIF": "pictures"}  # what a file of several holds; others hold frames
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF = {b"avif", b"avis"}
OTHERS = {  # the first bytes
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"<svg": "an SVG drawing",
    b"PK\x03\x04": "a ZIP archive",
    b"8BPS": "a Photoshop document",
    b"\x1aE\xdf\xa3": "a video (WebM or Matroska)",
    b"\x00\x00\x01\xba": "a video (MPEG)",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
    b"\x00\x00\x00\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
}


def brands(data: bytes) -> set[bytes]:
    """The brands of an ISO media file (ISO/IEC 14496-12, 4.3); empty for any other."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4], "big"), 256)
    return {data[8:12]} | {data[at : at + 4] for at in range(16, end, 4)}


def in_words(data: bytes) -> str:
    """What a file is that cannot be read, by its first bytes; "" where they say nothing."""
    found = brands(data)
    if found and not found & (HEIC | AVIF):
        return "a video (MP4 or QuickTime)"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return "a video (AVI)"
    return next((words for start, words in OTHERS.items() if data.startswith(start)), "")


def open_still(data: bytes) -> Image.Image:
    """Opens the header of one still picture.

    Raises:
        ValueError: what it is instead, in one line.
        DecompressionBombError: from Pillow.
    """
    formats = [name for name in READABLE if name != "HEIF"]
    if brands(data) & HEIC and not brands(data) & AVIF:
        try:
            import pillow_heif
        except ImportError as error:
            raise ValueError("this is HEIC, which needs a package: pip install 'seesr[heic]'") from error
        pillow_heif.register_heif_opener()
        formats = ["HEIF"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours, and checked next
            header: Any = Image.open(io.BytesIO(data), formats=formats)
    except Image.DecompressionBombError:
        raise
    except Exception as error:
        kind = in_words(data)
        instead = f"this is {kind}, not an image" if kind else "this is not an image"
        raise ValueError(f"{instead} that can be read: use {', '.join(READABLE.values())}") from error
    count = getattr(header, "n_frames", 1)
    if header.format != "MPO" and count > 1:
        raise ValueError(f"the image has {count} {PARTS.get(header.format, 'frames')}; send one still picture")
    return header
