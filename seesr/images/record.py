"""Writes and reads the settings record that is embedded in every output file."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import Image

from seesr.images.formats import FORMATS, ZIP

KEY = "seesr"  # of the text chunk in a PNG
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:description>{}</dc:description>'
    "</rdf:Description></rdf:RDF></x:xmpmeta>"
)


def as_xmp(record: dict[str, Any]) -> bytes:
    """The record as an XMP packet, for JPEG and WebP."""
    return XMP.format(escape(json.dumps(record, ensure_ascii=False))).encode()


def read_record(path: Path) -> dict[str, Any]:
    """The record of a file that this package wrote: version, bundle, settings with the seed that was used.

    Raises:
        ValueError: the file has none.
    """
    file: Path | io.BytesIO = path
    if path.suffix.lower() == f".{ZIP}":
        try:
            with zipfile.ZipFile(path) as archive:  # each image in it has the record
                file = io.BytesIO(archive.read(archive.namelist()[0]))
        except (zipfile.BadZipFile, IndexError) as error:
            raise ValueError("the file has no settings record") from error
    with Image.open(file, formats=[known.name for known in FORMATS.values()]) as image:
        text = image.info.get(KEY)
        packet = image.info.get("xmp", b"").decode(errors="replace")
    description = re.search(r"<dc:description>(.*?)</dc:description>", packet)
    if text is None and description is not None:
        text = unescape(description[1])
    try:
        record = json.loads(text or "")
    except (ValueError, RecursionError) as error:
        raise ValueError("the file has no settings record") from error
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):  # another program's description
        raise ValueError("the file has no settings record")
    return record
