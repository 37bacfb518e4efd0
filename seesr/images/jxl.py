"""Parses JPEG XL headers (ISO/IEC 18181-1 and -2): size, bit depth, colour encoding, EXIF and XMP."""

from __future__ import annotations

from typing import NamedTuple

from seesr.images.color_tags import BT709, D65, PRIMARIES, Encoding, Primaries, from_numbers
from seesr.images.isobmff import boxes

CODESTREAM, CONTAINER = b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"
RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))  # width : height
WHITES = {10: PRIMARIES[10].white, 11: PRIMARIES[11].white}  # E and that of DCI; others: D65
ENUM = ((0, 0), (1, 0), (2, 4), (18, 6))
MAX_METADATA = 2**20  # bytes of EXIF or XMP once decompressed
Choices = tuple[tuple[int, int], tuple[int, int], tuple[int, int], tuple[int, int]]


class Unreadable(ValueError):
    """A JPEG XL of a kind that is not read."""


class JpegXl(NamedTuple):
    """What the headers say.

    Attributes:
        size: (width, height), upright: the decoder applies the orientation.
        bits: per colour.
        channels: colours and alpha.
        premultiplied: the colours are multiplied with alpha.
        encoding: of the colours.
        exif: a TIFF structure, or None.
        xmp: a packet, or None.
    """

    size: tuple[int, int]
    bits: int
    channels: int
    premultiplied: bool
    encoding: Encoding
    exif: bytes | None
    xmp: bytes | None


class Bits:
    """Reads bits, the lowest of a byte first."""

    def __init__(self, data: bytes) -> None:
        self.value, self.place, self.end = int.from_bytes(data, "little"), 0, 8 * len(data)

    def u(self, count: int) -> int:
        """The next `count` bits as a number."""
        if self.place + count > self.end:
            raise IndexError("the header ends early")
        value = self.value >> self.place & ((1 << count) - 1)
        self.place += count
        return value

    def u32(self, choices: Choices) -> int:
        """A number of one of four ranges: (least, bits)."""
        least, count = choices[self.u(2)]
        return least + self.u(count)

    def signed(self) -> int:
        """A number whose lowest bit is its sign."""
        value = self.u32(((0, 19), (524288, 19), (1048576, 20), (2097152, 21)))
        return value >> 1 if value % 2 == 0 else -(value >> 1) - 1


def read_header(data: bytes) -> JpegXl:
    """Reads the boxes and the header of a JPEG XL.

    Raises:
        Unreadable: an animation, or a kind that is not read; what it is.
        IndexError: damaged.
    """
    exif, xmp, stream = None, None, data
    if data.startswith(CONTAINER):
        stream = b""
        for name, body in boxes(data):
            if name in (b"jxlc", b"jxlp"):
                stream = stream or (body[4:] if name == b"jxlp" else body)
            elif name == b"Exif" or name + body[:4] == b"brobExif":
                body = inflated(body[4:]) if name == b"brob" else body
                exif = body[4 + int.from_bytes(body[:4], "big") :]
            elif name == b"xml " or name + body[:4] == b"brobxml ":
                xmp = inflated(body[4:]) if name == b"brob" else body
    if not stream.startswith(CODESTREAM):
        raise IndexError("there is no codestream")
    bits = Bits(stream[2:4096])
    size = read_size(bits)
    if bits.u(1):  # all is as usual
        return JpegXl(size, 8, 3, False, Encoding(), exif, xmp)
    turn = 1
    if bits.u(1):
        turn = 1 + bits.u(3)
        if bits.u(1):  # intrinsic size
            read_size(bits)
        if bits.u(1):
            raise Unreadable("this is a JPEG XL with a preview, which is not supported: save it without, or as PNG")
        if bits.u(1):
            raise Unreadable("this is an animated JPEG XL; send one still image")
    depth = read_depth(bits)
    bits.u(1)  # whether 16 bits are enough to decode
    alpha = premultiplied = False
    for _ in range(bits.u32(((0, 0), (1, 0), (2, 4), (1, 12)))):
        if alpha:
            raise Unreadable("this is a JPEG XL with extra channels, which is not supported: save it as PNG")
        alpha, premultiplied = True, read_alpha(bits)
    bits.u(1)  # XYB
    encoding, colours = read_encoding(bits)
    upright = size[::-1] if turn > 4 else size
    return JpegXl((upright[0], upright[1]), depth, colours + alpha, premultiplied, encoding, exif, xmp)


def inflated(body: bytes) -> bytes:
    """A Brotli stream decompressed; empty where it cannot be, or is over MAX_METADATA."""
    import imagecodecs

    try:
        return bytes(imagecodecs.brotli_decode(body, out=MAX_METADATA))
    except imagecodecs.BrotliError:
        return b""


def read_size(bits: Bits) -> tuple[int, int]:
    """(width, height)."""
    sides: Choices = ((1, 9), (1, 13), (1, 18), (1, 30))
    small = bits.u(1)
    height = 8 * (1 + bits.u(5)) if small else bits.u32(sides)
    ratio = bits.u(3)
    if ratio:
        wide, high = RATIOS[ratio - 1]
        return height * wide // high, height
    return 8 * (1 + bits.u(5)) if small else bits.u32(sides), height


def read_depth(bits: Bits) -> int:
    """Bits of a channel."""
    if bits.u(1):
        raise Unreadable("this is a floating-point JPEG XL, which is not supported: save it with 16 bits")
    depth = bits.u32(((8, 0), (10, 0), (12, 0), (1, 6)))
    if depth > 16:
        raise Unreadable(f"this is a JPEG XL of {depth} bits, which is not supported: save it with 16 bits")
    return depth


def read_alpha(bits: Bits) -> bool:
    """An extra channel, which must be alpha; whether the colours are premultiplied."""
    if bits.u(1):  # alpha of 8 bits
        return False
    kind = bits.u32(ENUM)
    if kind != 0:
        raise Unreadable("this is a JPEG XL with extra channels, which is not supported: save it as PNG")
    read_depth(bits)
    bits.u32(((0, 0), (3, 0), (4, 0), (1, 3)))  # resolution
    bits.u(8 * bits.u32(((0, 0), (0, 4), (16, 5), (48, 10))))  # name
    return bool(bits.u(1))


def read_encoding(bits: Bits) -> tuple[Encoding, int]:
    """The colour encoding, and the number of colours."""
    if bits.u(1):
        return Encoding(), 3
    profile, space = bits.u(1), bits.u32(ENUM)
    if profile or space > 1:
        raise Unreadable(
            "this is a JPEG XL with an ICC profile, which is not supported: convert it (djxl in.jxl out.png)"
        )
    white, primaries = bits.u32(ENUM), BT709
    point = (bits.signed() / 1e6, bits.signed() / 1e6) if white == 2 else WHITES.get(white, D65)
    if space == 0:
        number = bits.u32(ENUM)
        if number == 2:
            places = [(bits.signed() / 1e6, bits.signed() / 1e6) for _ in range(3)]
            primaries = Primaries(point, *places)
        else:
            primaries = {9: PRIMARIES[9], 11: PRIMARIES[12]}.get(number, BT709)
    primaries = primaries._replace(white=point)
    if bits.u(1):
        gamma = bits.u(24) / 1e7
        return Encoding(primaries, 1 / gamma if gamma else 1.0), 3 if space == 0 else 1
    encoding = from_numbers(1, bits.u32(ENUM), True, [])
    return encoding._replace(primaries=primaries), 3 if space == 0 else 1
