"""Converts colour tags other than ICC profiles (gAMA, cHRM and cICP in PNG; nclx in AVIF and HEIC) to sRGB.

The transfer curve is converted to that of sRGB with one table lookup. Primaries are kept: they become an ICC profile
with the curve of sRGB, so no colour is clipped. PQ and HLG are mapped to the range and the primaries of sRGB.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8 | np.uint16]
Floats = NDArray[np.float64]

WHITE = 203.0  # nits of diffuse white in PQ and HLG (ITU-R BT.2408-7, table 1); becomes 255
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2  # nominal display of HLG (ITU-R BT.2100-2, table 5)
SAME_GAMMA = 0.05  # relative difference to 1/2.2 that counts as sRGB, as in libpng
SAME_PLACE = 0.005  # difference of chromaticities that counts as rounding
STRIP = 256  # rows of an HDR image that are converted together


class Primaries(NamedTuple):
    """CIE 1931 chromaticities (x, y)."""

    white: tuple[float, float]
    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]


D65, C = (0.3127, 0.329), (0.31, 0.316)
BT709 = Primaries(D65, (0.64, 0.33), (0.3, 0.6), (0.15, 0.06))
BT601_525 = Primaries(D65, (0.63, 0.34), (0.31, 0.595), (0.155, 0.07))
PRIMARIES = {  # by their number in ITU-T H.273, table 2
    1: BT709,
    2: BT709,  # unspecified
    4: Primaries(C, (0.67, 0.33), (0.21, 0.71), (0.14, 0.08)),
    5: Primaries(D65, (0.64, 0.33), (0.29, 0.6), (0.15, 0.06)),
    6: BT601_525,
    7: BT601_525,
    8: Primaries(C, (0.681, 0.319), (0.243, 0.692), (0.145, 0.049)),
    9: Primaries(D65, (0.708, 0.292), (0.17, 0.797), (0.131, 0.046)),
    10: Primaries((1 / 3, 1 / 3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)),
    11: Primaries((0.314, 0.351), (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    12: Primaries(D65, (0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    22: Primaries(D65, (0.63, 0.34), (0.295, 0.605), (0.155, 0.077)),
}
PQ, HLG, SRGB = "PQ", "HLG", "sRGB"
TRANSFERS: dict[int, str | float] = {  # by number in H.273, table 3: a name, or the exponent of a power law
    1: SRGB, 6: SRGB, 7: SRGB, 11: SRGB, 12: SRGB, 14: SRGB, 15: SRGB,  # cameras' curves, shown as if sRGB
    2: SRGB, 13: SRGB, 4: 2.2, 5: 2.8, 8: 1.0, 16: PQ, 17: 2.6, 18: HLG,
}  # fmt: skip


class Encoding(NamedTuple):
    """How colour values are to be understood.

    Attributes:
        primaries: chromaticities.
        transfer: SRGB, PQ, HLG, or the exponent g of light = value ** g.
        full_range: False: black and white are 16 and 235 of 255 ("narrow" or "video" range).
    """

    primaries: Primaries = BT709
    transfer: str | float = SRGB
    full_range: bool = True

    @property
    def hdr(self) -> bool:
        """Whether it is PQ or HLG."""
        return self.transfer in (PQ, HLG)


def from_numbers(primaries: int, transfer: int, full_range: bool, warnings: list[str]) -> Encoding:
    """The encoding that numbers of ITU-T H.273 mean (PNG's cICP, nclx of AVIF and HEIC).

    Args:
        warnings: takes what is not understood.

    Raises:
        ValueError: a logarithmic curve (9, 10), of which no converter is agreed on.
    """
    if transfer in (9, 10):
        raise ValueError(
            "the image has a logarithmic transfer curve (H.273 number 9 or 10), which is not supported: "
            "convert it to sRGB, PQ or HLG"
        )
    if primaries not in PRIMARIES or transfer not in TRANSFERS:
        warnings.append(f"the colour tag {primaries}/{transfer} is not known; unknown parts are read as sRGB")
    return Encoding(PRIMARIES.get(primaries, BT709), TRANSFERS.get(transfer, SRGB), full_range)


def from_gamma(gamma: float | None, primaries: Primaries | None, warnings: list[str]) -> Encoding | None:
    """The encoding of PNG's gAMA (the exponent of encoding, 1/2.2 for sRGB) and cHRM; None if neither makes sense."""
    if gamma is not None and not 0.1 <= gamma <= 10:
        warnings.append(f"the gAMA value {gamma:g} is out of range and is ignored")
        gamma = None
    if primaries is not None and not plausible(primaries):
        warnings.append("the cHRM chromaticities are invalid and are ignored")
        primaries = None
    if gamma is None and primaries is None:
        return None
    return Encoding(primaries or BT709, 1 / gamma if gamma else SRGB)


def plausible(primaries: Primaries) -> bool:
    """Whether the primaries span a triangle with the white point inside."""
    if min(y for _, y in primaries) < 0 or not primaries.white[1]:
        return False
    columns = xyz(primaries)
    if abs(np.linalg.det(columns)) < 1e-3:
        return False
    return bool((np.linalg.solve(columns, white_xyz(primaries.white)) > 0).all())


def to_srgb(pixels: Pixels, encoding: Encoding, grey: bool = False) -> tuple[Pixels, bytes | None]:
    """Converts [H, W, 3] of any encoding to the curve of sRGB.

    Args:
        grey: the three channels are equal: the primaries do not matter.

    Returns:
        The values, same dtype, and an ICC profile of their primaries; None: those of sRGB.
    """
    if encoding.hdr:
        return tone_map(pixels, encoding), None
    top = np.iinfo(pixels.dtype).max
    values = np.arange(top + 1) / top
    table = levels(encode_srgb(to_light(encoding, values)), pixels.dtype)
    pixels = table[pixels]
    same = np.abs(np.subtract(encoding.primaries, BT709)).max() <= SAME_PLACE
    return pixels, None if grey or same else profile(encoding.primaries)


def to_light(encoding: Encoding, values: Floats) -> Floats:
    """Values from 0 to 1 -> light, 1 is white; of HLG the light of the scene."""
    if not encoding.full_range:
        values = ((values * 255 - 16) / 219).clip(0, 1)
    if isinstance(encoding.transfer, float | int):
        if abs(encoding.transfer / 2.2 - 1) > SAME_GAMMA:
            return values**encoding.transfer
        return decode_srgb(values)
    return CURVES[encoding.transfer](values)


def decode_srgb(values: Floats) -> Floats:
    """IEC 61966-2-1: values -> light."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encode_srgb(light: Any) -> Any:
    """IEC 61966-2-1: light -> values; light outside of 0 to 1 is clipped."""
    light = light.clip(0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def decode_pq(values: Floats) -> Floats:
    """SMPTE ST 2084: values -> light in units of WHITE."""
    power = values ** (32 / 2523)
    return 10000 / WHITE * ((power - 0.8359375).clip(0) / (18.8515625 - 18.6875 * power)) ** (8192 / 1305)


def encode_pq(light: Floats) -> Floats:
    """SMPTE ST 2084: light in units of WHITE -> values."""
    power = (light.clip(0) * WHITE / 10000) ** (1305 / 8192)
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)


def decode_hlg(values: Floats) -> Floats:
    """ITU-R BT.2100-2, table 5: values -> light of the scene, 1 at the top."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)


CURVES: dict[str, Callable[[Floats], Floats]] = {SRGB: decode_srgb, PQ: decode_pq, HLG: decode_hlg}


def tone_map(pixels: Pixels, encoding: Encoding) -> Pixels:
    """PQ or HLG, [H, W, 3] -> sRGB of the same dtype: WHITE nits become white.

    An image without light above WHITE keeps every tone. Otherwise the brightest value becomes white, and tones bend
    towards it as in ITU-R BT.2390-11, 5.4.1, for each colour. Colours outside of sRGB are clipped.
    """
    maximum = np.iinfo(pixels.dtype).max
    table = to_light(encoding, np.arange(maximum + 1) / maximum)
    matrix = (np.linalg.inv(to_xyz(BT709)) @ to_xyz(encoding.primaries)).astype(np.float32)
    strips = [slice(top, top + STRIP) for top in range(0, len(pixels), STRIP)]
    if encoding.transfer == PQ:  # one table does it all
        bent = bend(table, float(table[pixels.max()])).astype(np.float32)
        lights = (bent[pixels[strip]] for strip in strips)
    else:
        luma = to_xyz(encoding.primaries)[1].astype(np.float32)
        scene = table.astype(np.float32)

        def displayed(strip: slice) -> NDArray[np.float32]:
            light = scene[pixels[strip]]
            return light * (np.float32(HLG_PEAK / WHITE) * (light @ luma) ** np.float32(HLG_GAMMA - 1))[..., None]

        peak = max(float(displayed(strip).max()) for strip in strips)
        nodes = np.linspace(0, max(1, peak) ** 0.25, 4096) ** 4  # fine near black
        bent = bend(nodes, peak)
        lights = (np.interp(displayed(strip), nodes, bent).astype(np.float32) for strip in strips)
    mapped = np.empty_like(pixels)
    for strip, light in zip(strips, lights, strict=True):
        mapped[strip] = levels(encode_srgb(light @ matrix.T), pixels.dtype)
    return mapped


def bend(light: Floats, peak: float) -> Floats:
    """The curve of BT.2390-11, 5.4.1, from a largest light of `peak` to 1, both in units of WHITE."""
    if peak <= 1:
        return light
    source, target = encode_pq(np.array([peak, 1.0]))
    values, maximum = encode_pq(np.minimum(light, peak)) / source, target / source
    knee = 1.5 * maximum - 0.5
    t = ((values - knee) / (1 - knee)).clip(0)
    curve = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * maximum
    return decode_pq(np.where(values < knee, values, curve) * source)


def levels(values: Any, dtype: np.dtype) -> Pixels:
    """0 to 1 -> integers over the full range of `dtype`, rounded."""
    return (values * np.iinfo(dtype).max + 0.5).astype(dtype)


def xyz(primaries: Primaries) -> Floats:
    """Chromaticities of red, green and blue as columns (x, y, z)."""
    return np.array([(x, y, 1 - x - y) for x, y in primaries[1:]]).T


def white_xyz(white: tuple[float, float]) -> Floats:
    """XYZ of a white point, Y = 1."""
    x, y = white
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(primaries: Primaries) -> Floats:
    """The matrix from linear RGB to XYZ (SMPTE RP 177)."""
    columns = xyz(primaries)
    return columns * np.linalg.solve(columns, white_xyz(primaries.white))


def profile(primaries: Primaries) -> bytes:
    """An ICC profile of RGB with these primaries and the curve of sRGB (ICC.1:2022, version 4.4)."""
    d50 = np.array([0.9642, 1, 0.8249])
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = (bradford @ d50) / (bradford @ white_xyz(primaries.white))
    adapt = np.linalg.inv(bradford) @ np.diag(gains) @ bradford
    red, green, blue = (adapt @ to_xyz(primaries)).T

    def numbers(kind: bytes, *values: float) -> bytes:
        return kind + bytes(4) + struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def multi_localized(text: str) -> bytes:
        encoded = text.encode("utf-16-be")
        return b"mluc" + bytes(4) + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += struct.pack(
        ">5i", *(round(value * 65536) for value in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    )
    places = " ".join(f"{x:.4g},{y:.4g}" for x, y in primaries)
    tags = {
        b"desc": multi_localized(f"RGB, sRGB curve, primaries {places}"),
        b"cprt": multi_localized("No copyright, use freely"),
        b"wtpt": numbers(b"XYZ ", *d50),
        b"chad": numbers(b"sf32", *adapt.ravel()),
        b"rXYZ": numbers(b"XYZ ", *red),
        b"gXYZ": numbers(b"XYZ ", *green),
        b"bXYZ": numbers(b"XYZ ", *blue),
        b"rTRC": curve,
    }
    tags |= {b"gTRC": tags[b"rTRC"], b"bTRC": tags[b"rTRC"]}
    body, entries, places_of, start = b"", b"", {}, 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        if data not in places_of:
            places_of[data] = start + len(body)
            body += data + bytes(-len(data) % 4)
        entries += struct.pack(">4sII", name, places_of[data], len(data))
    head = struct.pack(">I4xBB2x4s4s4s", start + len(body), 4, 0x40, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H4s", 2000, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + numbers(b"", *d50)[4:]
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + entries + body
