"""Edits XMP packets (ISO 16684-1): keeps the input's, and adds the digital source type and the settings record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from xml.dom import minidom
from xml.sax.saxutils import escape, quoteattr

RDF, META = "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "adobe:ns:meta/"
IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
AIGC = "http://www.tc260.org.cn/ns/AIGC/1.0/"  # the label of GB 45438-2025
SEESR = "urn:seesr:xmp:1.0/"
EXIF, TIFF = "http://ns.adobe.com/exif/1.0/", "http://ns.adobe.com/tiff/1.0/"
BASIC, PHOTOSHOP = "http://ns.adobe.com/xap/1.0/", "http://ns.adobe.com/photoshop/1.0/"
SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
EDITED_WITH_AI, ALGORITHM = "compositeWithTrainedAlgorithmicMedia", "algorithmicallyEnhanced"
WHOLLY_AI = "trainedAlgorithmicMedia"
MADE_WITH_AI = {WHOLLY_AI, "compositeSynthetic", EDITED_WITH_AI}
DROPPED_NAMESPACES = (  # namespaces that describe its pixels' places, or other images and blocks in it
    "http://ns.google.com/photos/",  # panorama, motion photo, depth, container
    "http://ns.adobe.com/hdr-gain-map/",
    "http://ns.apple.com/HDRGainMap/",
    "http://ns.apple.com/pixeldatainfo/",
    "http://www.metadataworkinggroup.com/schemas/regions/",
    "http://ns.microsoft.com/photo/1.2/",  # regions
    "http://ns.adobe.com/xmp/note/",  # the checksum of an extension that follows in a JPEG
    SEESR,
)
DROPPED_PROPERTIES = {
    *((TIFF, name) for name in ("Orientation", "ImageWidth", "ImageLength", "BitsPerSample", "Compression")),
    *((TIFF, name) for name in ("PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "NativeDigest")),
    *((EXIF, name) for name in ("PixelXDimension", "PixelYDimension", "ColorSpace", "NativeDigest")),
    *((PHOTOSHOP, name) for name in ("ColorMode", "ICCProfile")),
    (BASIC, "Thumbnails"),
    ("http://purl.org/dc/elements/1.1/", "format"),
    ("http://purl.org/dc/terms/", "provenance"),  # the address of a C2PA manifest of the old pixels
}
LONGEST, DEEPEST = 2**18, 100  # bytes; levels of elements
EMPTY = f'<x:xmpmeta xmlns:x="{META}"><rdf:RDF xmlns:rdf="{RDF}"/></x:xmpmeta>'
Property = tuple[str | None, str | None]  # namespace and local name


class Unreadable(ValueError):
    """A packet that is not well-formed XMP."""


def parse(packet: bytes, longest: int = LONGEST) -> minidom.Document:
    """Parses a packet without its wrapper. Document types, and with them entities, are refused.

    Args:
        longest: bytes; a packet that `written` returned can be longer than the one that was read.

    Raises:
        Unreadable: it is too long or too deep, or no XML with RDF in it.
    """
    try:
        text = packet.decode("utf-8-sig").strip("\0 \t\r\n")
        if len(packet) > longest or "<!DOCTYPE" in text:
            raise Unreadable
        document = minidom.parseString(re.sub(r"<\?xml\s.*?\?>", "", text, flags=re.S).encode())
        nodes, level = [rdf_of(document)], 0
    except Exception as error:  # UnicodeDecodeError, ExpatError, IndexError, ...
        raise Unreadable from error
    while nodes:
        nodes, level = [child for node in nodes for child in node.childNodes], level + 1
        if level > DEEPEST:
            raise Unreadable
    return document


def rdf_of(document: minidom.Document) -> Any:
    """The RDF element."""
    return document.getElementsByTagNameNS(RDF, "RDF")[0]


def descriptions(document: minidom.Document) -> Iterator[Any]:
    """The elements whose attributes and children are the properties."""
    for node in rdf_of(document).childNodes:
        if node.nodeType == node.ELEMENT_NODE and node.localName == "Description":
            yield node


def properties(document: minidom.Document) -> Iterator[tuple[Any, Any]]:
    """Every description with each of its properties: attributes and elements that are no part of RDF or XML."""
    for description in descriptions(document):
        attributes = list((description.attributes or {}).values())
        elements = [node for node in description.childNodes if node.nodeType == node.ELEMENT_NODE]
        for node in attributes + elements:
            if node.namespaceURI not in (None, RDF, "http://www.w3.org/2000/xmlns/"):
                yield description, node


def without(document: minidom.Document, unwanted: Callable[[Property], bool]) -> int:
    """Removes properties; returns how many are left."""
    left = 0
    for description, node in list(properties(document)):
        if not unwanted((node.namespaceURI, node.localName)):
            left += 1
        elif node.nodeType == node.ATTRIBUTE_NODE:
            description.removeAttributeNode(node)
        else:
            description.removeChild(node)
    return left


def written(document: minidom.Document) -> bytes:
    """A packet with its wrapper."""
    body: Any = document.documentElement
    return f'<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>{body.toxml()}<?xpacket end="w"?>'.encode()


def retained(packet: bytes, warnings: list[str]) -> bytes | None:
    """The packet without what describes the pixels, the orientation or other parts of the old file.

    Args:
        warnings: says that a packet cannot be read.
    """
    try:
        document = parse(packet)
    except Unreadable:
        warnings.append("XMP data that cannot be read are left out")
        return None
    left = without(document, lambda name: name in DROPPED_PROPERTIES or (name[0] or "").startswith(DROPPED_NAMESPACES))
    return written(document) if left else None


def labels(packet: bytes | None) -> bytes | None:
    """Of a packet that `retained` returned only labels of AI other than the source type, which is written anew."""
    if packet is None:
        return None
    document = parse(packet, len(packet))
    return written(document) if without(document, lambda name: name[0] != AIGC) else None


def value(packet: bytes | None, namespace: str, name: str) -> str | None:
    """The text of a simple property; None: there is none, or the packet cannot be read."""
    try:
        for _, node in properties(parse(packet or b"")):
            if (node.namespaceURI, node.localName) != (namespace, name):
                continue
            if node.nodeType == node.ATTRIBUTE_NODE:
                return node.value
            resource = node.getAttributeNS(RDF, "resource")
            return resource or "".join(part.data for part in node.childNodes if part.nodeType == part.TEXT_NODE)
    except Unreadable:
        pass
    return None


def source_type(packet: bytes | None) -> str | None:
    """The IPTC digital source type that a packet states, as its URI; a QCode or the bare code will do."""
    stated = (value(packet, IPTC, "DigitalSourceType") or "").strip()
    return SOURCE_TYPES + re.split("[/:]", stated)[-1] if stated else None


def source_type_in_manifest(data: bytes) -> str | None:
    """The digital source type of a file with a C2PA manifest if it states no other: an image that AI made as a whole.

    The manifest is not validated: a false statement would only mark an image as made by AI.
    """
    stated = set(re.findall(rb"newscodes/digitalsourcetype/([A-Za-z]+)", data))
    return SOURCE_TYPES + WHOLLY_AI if stated == {WHOLLY_AI.encode()} else None


def source_type_after(before: str | None, generated: bool) -> str:
    """The digital source type of a result.

    Args:
        before: that of the input, a URI. One that says that the image was made with generative AI stays.
        generated: whether the model changed the image; not with `fidelity` 1 or a black mask.
    """
    if before is not None and before.removeprefix(SOURCE_TYPES) in MADE_WITH_AI:
        return before
    return SOURCE_TYPES + (EDITED_WITH_AI if generated else ALGORITHM)


def packet(base: bytes | None, source_type: str | None, record: str | None) -> bytes | None:
    """The packet of an output file.

    Args:
        base: what is kept of the input's, or None.
        source_type: the digital source type, or None.
        record: the settings record as JSON, for formats that have no other place for it, or None.
    """
    new = ""
    if source_type is not None:
        new += f"<Iptc4xmpExt:DigitalSourceType>{escape(source_type)}</Iptc4xmpExt:DigitalSourceType>"
    if record is not None:
        new += f"<seesr:record>{escape(record)}</seesr:record>"
    if not new:
        return base
    base = base or EMPTY.encode()
    document = parse(base, len(base))
    without(document, lambda name: name == (IPTC, "DigitalSourceType"))
    resources = [node.getAttributeNS(RDF, "about") for node in descriptions(document)]
    spaces = f'xmlns:rdf="{RDF}" xmlns:Iptc4xmpExt="{IPTC}" xmlns:seesr="{SEESR}"'
    about = quoteattr(next(filter(None, resources), ""))
    added: Any = minidom.parseString(
        f"<rdf:Description {spaces} rdf:about={about}>{new}</rdf:Description>".encode()
    ).documentElement
    rdf_of(document).appendChild(document.importNode(added, True))
    return written(document)
