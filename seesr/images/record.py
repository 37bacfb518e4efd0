"""Writes and reads the settings record that is embedded in every output file."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import unescape

from PIL import Image

from seesr.images import xmp
from seesr.images.formats import FORMATS, ZIP

KEY = "seesr"  # of the text chunk in a PNG
NOT_XML = re.compile("[\ud800-\udfff\ufffe\uffff]")  # characters that XML cannot hold


def as_json(record: dict[str, Any]) -> str:
    """The record as text of XMP, for JPEG and WebP."""
    return NOT_XML.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(record, ensure_ascii=False))


def read_record(path: Path) -> dict[str, Any]:
    """The record of a file that this package wrote: version, bundle, settings with the seed that was used.

    Raises:
        ValueError: the file has none.
    """
    text, packet = texts(path)
    text = text or xmp.value(packet, xmp.SEESR, "record")
    if text is None and (description := re.search(rb"<dc:description>(.*?)</dc:description>", packet)):
        text = unescape(description[1].decode(errors="replace"))  # written before the input's XMP was kept
    try:
        record = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise ValueError("the file has no settings record") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):  # another program's description
        raise ValueError("the file has no settings record")
    return record


def record_of(path: Path) -> dict[str, Any] | None:
    """The settings record of a file, if there is one."""
    try:
        return read_record(path)
    except Exception:  # of the image libraries: OSError, ValueError, SyntaxError, DecompressionBombError, ...
        return None


def read_source_type(path: Path) -> str | None:
    """The IPTC digital source type of a file that this package wrote, or None."""
    return xmp.source_type(texts(path)[1])


def texts(path: Path) -> tuple[str | None, bytes]:
    """The record's text chunk of a PNG, or None, and the XMP packet; of a zip those of its first image."""
    file: Path | io.BytesIO = path
    if path.suffix.lower() == f".{ZIP}":
        try:
            with zipfile.ZipFile(path) as archive:  # each image in it has the record
                file = io.BytesIO(archive.read(archive.namelist()[0]))
        except (zipfile.BadZipFile, IndexError) as error:
            raise ValueError("the file has no settings record") from error
    with Image.open(file, formats=[known.name for known in FORMATS.values()]) as image:
        return image.info.get(KEY), image.info.get("xmp", b"")
