"""Splits PNG chunks (ISO/IEC 15948, PNG 3) into what the decoder needs, colour tags, and metadata.

The decoder gets a file without text, so that long or damaged text cannot stop it; EXIF and XMP are found wherever
they are, and a missing end is added.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from seesr.images.color_tags import Encoding, Primaries, from_gamma, from_numbers

SIGNATURE = b"\x89PNG\r\n\x1a\n"
DECODER_CHUNKS = {b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"acTL", b"fcTL", b"fdAT"}
MAX_CHUNKS = 2**20
MAX_METADATA = 16 * 2**20  # bytes of a chunk once decompressed
RAW_EXIF = (b"Raw profile type exif", b"Raw profile type APP1")  # ImageMagick 6 and others before eXIf


class Chunks(NamedTuple):
    """What a PNG holds.

    Attributes:
        data: a PNG with what a decoder needs and nothing else.
        icc: the profile, or None.
        encoding: colour tags other than a profile; None: there are none that count.
        exif: a TIFF structure, or None.
        xmp: a packet, or None.
        warnings: faults of the file that did not prevent reading it.
    """

    data: bytes
    icc: bytes | None
    encoding: Encoding | None
    exif: bytes | None
    xmp: bytes | None
    warnings: tuple[str, ...]


def split(data: bytes) -> Chunks:
    """Separates the chunks of a PNG file.

    Raises:
        ValueError: a colour tag that cannot be converted.
    """
    needed, warnings, ended = [SIGNATURE], [], False
    first: dict[bytes, tuple[bytes, bytes]] = {}  # chunks other than pixel data, by name or keyword
    for name, body, raw in chunks(data):
        if name == b"IEND":
            ended = True
            break
        whole = raw[-4:] == struct.pack(">I", zlib.crc32(name + body))
        if name in DECODER_CHUNKS or (name == b"pHYs" and whole):
            needed.append(raw)
        elif not whole:
            warnings.append(f"the PNG chunk {name.decode('latin-1')} has a wrong checksum and is left out")
        elif name in (b"tEXt", b"zTXt", b"iTXt"):
            first.setdefault(body.partition(b"\0")[0], (name, body))
        else:
            first.setdefault(name, (name, body))
    if not ended:
        warnings.append("the PNG has no end (IEND); its rows are complete")
    needed.append(chunk(b"IEND", b""))

    def body_of(name: bytes) -> bytes | None:
        return first[name][1] if name in first else None

    exif = body_of(b"eXIf")
    for name in RAW_EXIF:
        exif = exif or raw_profile(text(*first[name]) if name in first else b"")
    packet = first.get(b"XML:com.adobe.xmp")
    icc = inflated(body_of(b"iCCP") or b"", 1)
    if b"iCCP" in first and icc is None:
        warnings.append("the colour profile cannot be read and is left out: the image is read as sRGB")
    encoding = tag(first, warnings)
    return Chunks(
        b"".join(needed),
        None if b"cICP" in first else icc,
        encoding if b"cICP" in first or icc is None else None,
        exif,
        text(*packet) if packet else None,
        tuple(warnings),
    )


def chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Name, body, and the whole chunk; image data that end early are closed, so that the decoder counts the rows."""
    place, count = len(SIGNATURE), 0
    while place + 8 <= len(data) and count < MAX_CHUNKS:
        count += 1
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        end = place + 12 + length
        if end <= len(data):
            yield name, data[place + 8 : end - 4], data[place:end]
        elif name == b"IDAT":
            body = data[place + 8 : place + 8 + length]
            yield name, body, chunk(name, body)
        place = end


def chunk(name: bytes, body: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tag(first: dict[bytes, tuple[bytes, bytes]], warnings: list[str]) -> Encoding | None:
    """The colour tag that counts: cICP before sRGB before gAMA and cHRM."""
    bodies = {name: body for name, (_, body) in first.items()}
    if len(numbers := bodies.get(b"cICP", b"")) == 4:
        return from_numbers(numbers[0], numbers[1], bool(numbers[3]), warnings)
    if b"sRGB" in bodies:
        return None
    gamma = primaries = None
    if len(body := bodies.get(b"gAMA", b"")) == 4:
        gamma = int.from_bytes(body, "big") / 100000
    if len(body := bodies.get(b"cHRM", b"")) == 32:
        x = [value / 100000 for value in struct.unpack(">8i", body)]
        primaries = Primaries((x[0], x[1]), (x[2], x[3]), (x[4], x[5]), (x[6], x[7]))
    return from_gamma(gamma, primaries, warnings)


def text(name: bytes, body: bytes) -> bytes:
    """The text of a tEXt, zTXt or iTXt chunk; empty where it cannot be read."""
    rest = body.partition(b"\0")[2]
    if name == b"tEXt":
        return rest
    if name == b"zTXt":
        return inflated(rest, 1, skip=0) or b""
    packed, content = rest[:1] == b"\1", rest[2:].split(b"\0", 2)[-1]  # behind a language and a translated keyword
    return (inflated(content, 0, skip=0) or b"") if packed else content


def inflated(body: bytes, method: int, skip: int = 1) -> bytes | None:
    """Decompresses behind `skip` strings and `method` bytes; None if it cannot be, or is over MAX_METADATA."""
    packed = body.split(b"\0", skip)[-1][method:]
    stream = zlib.decompressobj()
    try:
        decompressed = stream.decompress(packed, MAX_METADATA)
    except zlib.error:
        return None
    return None if stream.unconsumed_tail or not stream.eof else decompressed


def raw_profile(content: bytes) -> bytes | None:
    """The bytes of ImageMagick's "Raw profile" (a name, a length, hexadecimal digits); None if they are none."""
    try:
        block = bytes.fromhex("".join(content.decode("latin-1").split("\n")[3:]))
    except ValueError:
        return None
    return block.removeprefix(b"Exif\0\0") or None
