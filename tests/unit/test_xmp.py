"""XMP: what is kept of the input, what is added, and damaged or hostile packets."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from PIL import Image

from seesr.images import xmp
from seesr.images.image_data import ImageData
from seesr.images.png_chunks import chunks
from seesr.images.read import decode
from seesr.images.record import read_record
from seesr.images.write import encode, save

SPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": xmp.BASIC,
    "tiff": xmp.TIFF,
    "exif": xmp.EXIF,
    "Iptc4xmpExt": xmp.IPTC,
    "TC260": xmp.AIGC,
    "GPano": "http://ns.google.com/photos/1.0/panorama/",
    "hdrgm": "http://ns.adobe.com/hdr-gain-map/1.0/",
    "mwg-rs": "http://www.metadataworkinggroup.com/schemas/regions/",
    "xmpNote": "http://ns.adobe.com/xmp/note/",
}
TITLE = '<dc:title><rdf:Alt><rdf:li xml:lang="x-default">a &amp; b</rdf:li></rdf:Alt></dc:title>'
OLD_PROPERTIES = (
    '<tiff:Orientation>6</tiff:Orientation><GPano:FullPanoWidthPixels>9</GPano:FullPanoWidthPixels>'
    '<mwg-rs:Regions rdf:parseType="Resource"/>'
)  # fmt: skip
FORMATS = ["png", "webp", "jpg"]


def packet(elements: str = TITLE, attributes: str = 'xmp:Rating="3"', about: str = "") -> bytes:
    """A packet as other programs write them."""
    spaces = " ".join(f'xmlns:{prefix}="{uri}"' for prefix, uri in SPACES.items())
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="t">'
        f'<rdf:RDF xmlns:rdf="{xmp.RDF}">\n <rdf:Description rdf:about="{about}" {spaces} {attributes}>{elements}'
        f"</rdf:Description>\n</rdf:RDF></x:xmpmeta>{' ' * 200}<?xpacket end='w'?>"
    ).encode()


def seen(data: bytes) -> dict[str, Any]:
    """All properties of a file's XMP, as Pillow reads them: the values by local name."""
    with Image.open(io.BytesIO(data)) as image:
        result = image.getxmp()
    parts = result.get("xmpmeta", {}).get("RDF", {}).get("Description", [])
    return {name: value for part in (parts if isinstance(parts, list) else [parts]) for name, value in part.items()}


def in_container(kind: str, content: bytes) -> bytes:
    """A small image of a kind with this packet."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    if kind in ("TIFF of Pillow", "TIFF of 16 bits"):
        pixels = pixels if kind == "TIFF of Pillow" else pixels.astype(np.uint16) * 257
        extra = [(700, 1, len(content), content, True)]
        tifffile.imwrite(buffer, pixels, photometric="rgb", extratags=extra)
    elif kind in ("JXL", "JXL with Brotli"):
        body = b"xml " + imagecodecs.brotli_encode(content) if "Brotli" in kind else content
        stream = imagecodecs.jpegxl_encode(pixels, lossless=True, usecontainer=False)
        parts = [(b"ftyp", b"jxl \0\0\0\0jxl "), (b"brob" if "Brotli" in kind else b"xml ", body), (b"jxlc", stream)]
        boxes = b"".join(struct.pack(">I", 8 + len(body)) + name + body for name, body in parts)
        return b"\0\0\0\x0cJXL \r\n\x87\n" + boxes
    elif kind == "PNG":
        return encode(ImageData(pixels, xmp=content), "png", 95)
    else:
        Image.fromarray(pixels).save(buffer, kind, xmp=content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    ["JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF of Pillow", "TIFF of 16 bits", "JXL", "JXL with Brotli"],
)
def test_the_packet_of_every_format_is_found(kind: str) -> None:
    pillow_heif.register_heif_opener()
    read = decode(in_container(kind, packet(TITLE + OLD_PROPERTIES.replace("6", "1"))))
    assert read.warnings == () and read.size == (24, 16)
    result = seen(encode(read, "png", 95))
    assert result["title"] == {"Alt": {"li": {"lang": "x-default", "text": "a & b"}}} and result["Rating"] == "3"
    assert not {"Orientation", "FullPanoWidthPixels", "Regions"} & set(result)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_output_format_has_source_type_and_the_inputs_xmp(kind: str, tmp_path: Path) -> None:
    read = decode(in_container("JPEG", packet(TITLE + OLD_PROPERTIES, 'hdrgm:Version="1.0" xmp:Rating="3"', "uuid:1")))
    assert read.size == (16, 24)  # turned
    record = {"settings": {"user_prompt": '<a> & "ü" \ufffe \ud800'}}
    data = encode(read.with_pixels(read.rgb, record), kind, 90)
    result = seen(data)
    assert result["DigitalSourceType"] == xmp.SOURCE_TYPES + xmp.EDITED_WITH_AI
    assert result["title"] and result["Rating"] == "3" and result["about"] == "uuid:1"
    assert not {"Orientation", "FullPanoWidthPixels", "Regions", "Version"} & set(result)
    save(data, tmp_path / "a")
    assert read_record(tmp_path / "a") == record
    again = decode(data)  # a result is an input, too
    twice = encode(again.with_pixels(again.rgb, {"settings": {"seed": 2}}), kind, 90)
    save(twice, tmp_path / "b")
    assert read_record(tmp_path / "b") == {"settings": {"seed": 2}}
    assert twice.count(b"</Iptc4xmpExt:DigitalSourceType>") == 1 and twice.count(b"<seesr:record>") == (kind != "png")


def parts(data: bytes) -> list[bytes]:
    """The chunks or segments of a PNG, WebP or JPEG without XMP, the record, and flags that count them."""
    if data.startswith(b"\x89PNG"):
        return [raw for name, _, raw in chunks(data) if name != b"iTXt"]
    if data.startswith(b"RIFF"):
        place, result = 12, []
        while place < len(data):
            length = int.from_bytes(data[place + 4 : place + 8], "little")
            if data[place : place + 4] not in (b"VP8X", b"XMP "):
                result.append(data[place : place + 8 + length])
            place += 8 + length + length % 2
        return result
    start = data.find(b"\xff\xe1") if b"<?xpacket" in data else -1
    length = int.from_bytes(data[start + 2 : start + 4], "big")
    return [data if start < 0 else data[:start] + data[start + 2 + length :]]


@pytest.mark.parametrize("kind", FORMATS)
def test_xmp_is_all_that_differs(kind: str, rng: np.random.Generator) -> None:
    image = ImageData(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), dpi=(300, 300))
    marked = encode(image.with_pixels(image.rgb, {"settings": {}}), kind, 90)
    plain = encode(image, kind, 90)
    assert marked != plain and parts(marked) == parts(plain)


@pytest.mark.parametrize("generated", [True, False])
@pytest.mark.parametrize(
    ("before", "stays"),
    [
        (None, False),
        (xmp.SOURCE_TYPES + "digitalCapture", False),
        (xmp.SOURCE_TYPES + "negativeFilm", False),
        (xmp.SOURCE_TYPES + "trainedAlgorithmicMedia", True),
        ("https://cv.iptc.org/newscodes/digitalsourcetype/compositeSynthetic", True),
        ("digsrctype:compositeWithTrainedAlgorithmicMedia", True),
        (" trainedAlgorithmicMedia ", True),
    ],
)
@pytest.mark.parametrize("form", ["element", "attribute", "resource"])
def test_a_mark_of_generative_ai_survives(before: str | None, stays: bool, generated: bool, form: str) -> None:
    name = "Iptc4xmpExt:DigitalSourceType"
    elements = {"element": f"<{name}>{before}</{name}>", "resource": f'<{name} rdf:resource="{before}"/>'}
    attributes = f'{name}="{before}"' if form == "attribute" else ""
    source = b"" if before is None else packet(elements.get(form, ""), attributes)
    read = decode(in_container("JPEG", source))
    uri = None if before is None else xmp.SOURCE_TYPES + before.strip().split("/")[-1].split(":")[-1]
    assert read.source_type == uri
    edited = read.with_pixels(read.rgb, {"settings": {}}, generated=generated)
    expected = xmp.SOURCE_TYPES + (xmp.EDITED_WITH_AI if generated else xmp.ALGORITHM)
    data = encode(edited, "jpg", 90)
    assert seen(data)["DigitalSourceType"] == (uri if stays else expected)
    assert data.count(name.encode() + b">") == 2
    assert edited.record is not None and edited.record.get("source_type_before") == (None if stays else uri)


@pytest.mark.parametrize("kind", FORMATS)
def test_without_keep_exif_labels_of_ai_stay_alone(kind: str) -> None:
    label = '<TC260:AIGC>{"Label":"1"}</TC260:AIGC>'
    mark = f"{xmp.SOURCE_TYPES}trainedAlgorithmicMedia"
    read = decode(in_container("JPEG", packet(TITLE + label, f'xmp:Rating="3" Iptc4xmpExt:DigitalSourceType="{mark}"')))
    result = seen(encode(read.with_pixels(read.rgb, {"settings": {}}, keep_exif=False), kind, 90))
    assert result["DigitalSourceType"] == mark and result["AIGC"] == '{"Label":"1"}'
    assert not {"title", "Rating"} & set(result)
    read = decode(in_container("JPEG", packet()))
    result = seen(encode(read.with_pixels(read.rgb, {"settings": {}}, keep_exif=False), kind, 90))
    assert set(result) - {"record", "about", "text"} == {"DigitalSourceType"}


BROKEN = {
    "no XML": b"<x:xmpmeta",
    "no RDF": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
    "prefix without a namespace": b"<x:xmpmeta><dc:description>1987</dc:description></x:xmpmeta>",
    "entities": b'<!DOCTYPE a [<!ENTITY b "c">]>' + packet(),
    "entities in another encoding": b"<?xml version='1.0' encoding='cp037'?>" + packet(),
    "UTF-16": packet().decode().encode("utf-16"),
    "not UTF-8": packet(TITLE.replace("a", "\xe9")).decode().encode("latin-1", "replace"),
    "deep": packet("<dc:a>" * 5000 + "</dc:a>" * 5000),
    "long": packet(f"<dc:a>{'x' * 2**20}</dc:a>"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_packet_that_cannot_be_read_is_left_out_with_a_warning(name: str) -> None:
    read = decode(in_container("WEBP", BROKEN[name]))
    if name == "entities in another encoding":  # what a declaration says does not count: XMP in files is UTF-8
        assert read.xmp is not None
        return
    assert read.xmp is None and read.warnings == ("XMP data that cannot be read are left out",)
    assert set(seen(encode(read.with_pixels(read.rgb, {}), "png", 90))) == {"DigitalSourceType", "about"}


def test_the_limits_of_a_packet() -> None:
    assert (xmp.LONGEST, xmp.DEEPEST) == (256 * 1024, 100)
    own = packet("<dc:source></dc:source>")
    longest = own.replace(b"<dc:source>", b"<dc:source>" + b"x" * (xmp.LONGEST - len(own)))
    levels = xmp.DEEPEST - 2  # beside rdf:Description and what the innermost holds
    deepest = packet("<dc:a>" * levels + "</dc:a>" * levels)
    for good, bad in (
        (longest, longest.replace(b"<dc:source>", b"<dc:source>x")),
        (deepest, deepest.replace(b"<dc:a></dc:a>", b"<dc:a><dc:a></dc:a></dc:a>")),
    ):
        xmp.parse(good)
        with pytest.raises(xmp.Unreadable):
            xmp.parse(bad)


def test_only_descriptions_have_properties() -> None:
    other = packet(TITLE).replace(b"rdf:Description", b"rdf:Alt")
    assert xmp.value(packet("<dc:source>x</dc:source>"), "http://purl.org/dc/elements/1.1/", "source") == "x"
    assert not list(xmp.properties(xmp.parse(other)))


def test_a_manifest_that_states_one_source_type_says_it() -> None:
    wholly, edited = ((xmp.SOURCE_TYPES + name).encode() for name in (xmp.WHOLLY_AI, xmp.EDITED_WITH_AI))
    assert xmp.source_type_in_manifest(b"a " + wholly + b" b " + wholly) == wholly.decode()
    assert {xmp.source_type_in_manifest(data) for data in (b"", edited, wholly + b" " + edited)} == {None}


def test_xmp_that_is_too_long_for_a_jpeg_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    read = decode(in_container("WEBP", packet(f"{TITLE}<dc:source>{'x' * 65500}</dc:source>")))
    edited = read.with_pixels(read.rgb, {"settings": {"seed": 1}})
    assert "source" in seen(encode(edited, "png", 90)) and "too long" not in caplog.text
    result = seen(encode(edited, "jpg", 90))
    assert "source" not in result and result["DigitalSourceType"] and "too long for JPEG" in caplog.text


@pytest.mark.parametrize("kind", FORMATS)
def test_a_packet_that_grows_when_it_is_written_again_fits(kind: str) -> None:
    """A quotation mark in text becomes six bytes."""
    read = decode(in_container("WEBP", packet(f"<dc:source>{chr(34) * 200_000}</dc:source>")))
    assert read.xmp is not None and len(read.xmp) > xmp.LONGEST
    result = seen(encode(read.with_pixels(read.rgb, {"settings": {"seed": 1}}, keep_exif=True), kind, 90))
    assert result["DigitalSourceType"] and ("source" in result) == (kind != "jpg")
    assert read.with_pixels(read.rgb, {}, keep_exif=False).xmp is None


def test_the_longest_record_fits_into_a_jpeg(tmp_path: Path) -> None:
    settings = dict.fromkeys(("user_prompt", "positive_prompt", "negative_prompt"), '"' * 2000)
    label = f"<TC260:AIGC>{'x' * 60_000}</TC260:AIGC>"
    read = decode(in_container("WEBP", packet(label)))
    save(encode(read.with_pixels(read.rgb, {"settings": settings}), "jpg", 90), tmp_path / "a.jpg")
    assert read_record(tmp_path / "a.jpg") == {"settings": settings}


def test_the_record_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """It was the description."""
    Image.new("RGB", (8, 8)).save(
        tmp_path / "a.jpg", xmp=packet('<dc:description>{"settings": {"seed": 5}, "a": "&lt;"}</dc:description>')
    )
    assert read_record(tmp_path / "a.jpg") == {"settings": {"seed": 5}, "a": "<"}
