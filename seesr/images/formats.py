"""The table of output formats (PNG, WebP, JPEG). Add a row to add a format."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from seesr.images.limits import LARGEST_SIDE


class Format(NamedTuple):
    """One kind of output file.

    Attributes:
        name: what Pillow calls it.
        media_type: for HTTP.
        longest_side: pixels; where the format itself ends earlier than LARGEST_SIDE.
        alpha: whether it has transparency; where not, the image is laid on white.
        deep: whether it keeps 16 bits per colour.
        most_exif, most_xmp: maximum size of an EXIF block and of an XMP packet, bytes.
        record_in_xmp: whether the settings record is a part of XMP; where not, the format has text of its own.
        options: further arguments of Pillow's `save`.
    """

    name: str
    media_type: str
    longest_side: int = LARGEST_SIDE
    alpha: bool = True
    deep: bool = False
    most_exif: float = math.inf
    most_xmp: float = math.inf
    record_in_xmp: bool = True
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple is never changed)


FORMATS = {
    "png": Format("PNG", "image/png", deep=True, record_in_xmp=False),
    "webp": Format("WEBP", "image/webp", longest_side=16383, options={"method": 2}),
    "jpg": Format("JPEG", "image/jpeg", alpha=False, most_exif=65533, most_xmp=65504),
}
ZIP = "zip"  # the suffix where several images are one file
MEDIA_TYPES = {**{name: known.media_type for name, known in FORMATS.items()}, ZIP: "application/zip"}
