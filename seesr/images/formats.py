"""The files that can be written, in one table: a new format is one row here."""

from __future__ import annotations

from typing import Any, NamedTuple

from seesr.images.limits import LARGEST_SIDE


class Format(NamedTuple):
    """One kind of output file.

    Attributes:
        name: what Pillow calls it.
        media_type: for HTTP.
        longest_side: pixels; where the format itself ends earlier than LARGEST_SIDE.
        alpha: whether it has transparency; where not, the picture is laid on white.
        deep: whether it keeps 16 bits per colour.
        most_exif: bytes that an EXIF block can have.
        options: what Pillow is given besides the quality.
    """

    name: str
    media_type: str
    longest_side: int = LARGEST_SIDE
    alpha: bool = True
    deep: bool = False
    most_exif: int = 2**31 - 1
    options: dict[str, Any] = {}  # noqa: RUF012 (a NamedTuple is never changed)


FORMATS = {
    "png": Format("PNG", "image/png", deep=True),
    "webp": Format("WEBP", "image/webp", longest_side=16383, options={"method": 2}),
    "jpg": Format("JPEG", "image/jpeg", alpha=False, most_exif=65533),
}
ZIP = "zip"  # the suffix where several pictures are one file
MEDIA_TYPES = {**{name: known.media_type for name, known in FORMATS.items()}, ZIP: "application/zip"}
