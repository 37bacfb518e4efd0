"""Colour tags: numbers of the standards, curves, tone mapping, and the ICC profile of other primaries."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from seesr.images import color_tags
from seesr.images.color_tags import BT709, PRIMARIES, Encoding, Primaries

DEEP = np.arange(65536, dtype=np.uint16)
SHALLOW = np.arange(256, dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    """[1, n, 3], the three channels equal."""
    return np.repeat(values[None, :, None], 3, axis=2)


def srgb(light: np.ndarray) -> np.ndarray:
    """Light from 0 to 1 as 16-bit sRGB (IEC 61966-2-1), not rounded."""
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055) * 65535


@pytest.mark.parametrize("number", range(20))
def test_transfers_are_those_of_the_standard(number: int) -> None:
    """ITU-T H.273, table 3. The curves of cameras are shown as sRGB."""
    powers = {4: 2.2, 5: 2.8, 8: 1.0, 17: 2.6}  # BT.470 M and B/G, linear, SMPTE ST 428-1
    warnings: list[str] = []
    if number in (9, 10):
        with pytest.raises(ValueError, match="logarithmic transfer curve"):
            color_tags.from_numbers(1, number, True, warnings)
        return
    encoding = color_tags.from_numbers(1, number, True, warnings)
    assert encoding.transfer == {16: "PQ", 18: "HLG", **powers}.get(number, "sRGB")
    assert encoding.hdr == (number in (16, 18)) and encoding.full_range
    assert bool(warnings) == (number in (0, 3, 19))  # reserved


def test_unknown_primaries_are_read_as_srgb() -> None:
    warnings: list[str] = []
    assert color_tags.from_numbers(3, 13, False, warnings) == Encoding(BT709, "sRGB", False)
    assert warnings == ["the colour tag 3/13 is not known; unknown parts are read as sRGB"]


@pytest.mark.parametrize("transfer", ["sRGB", 2.2, 2.25, 2.1])
@pytest.mark.parametrize("values", [DEEP, SHALLOW])
def test_srgb_and_a_power_near_it_change_no_value(transfer: str | float, values: np.ndarray) -> None:
    result, icc = color_tags.to_srgb(grey(values), Encoding(BT709, transfer))
    np.testing.assert_array_equal(result, grey(values))
    assert icc is None


@pytest.mark.parametrize("gamma", [1.0, 1.8, 2.0, 2.4, 2.8])
def test_a_power_law_becomes_srgb(gamma: float) -> None:
    result, _ = color_tags.to_srgb(grey(DEEP), Encoding(BT709, gamma))
    assert np.abs(result[0, :, 0] - srgb((DEEP / 65535) ** gamma)).max() <= 0.51


@pytest.mark.parametrize("transfer", ["sRGB", "PQ", "HLG"])
def test_black_and_white_of_the_narrow_range_are_16_and_235(transfer: str) -> None:
    encoding = Encoding(BT709, transfer, full_range=False)
    light = color_tags.to_light(encoding, np.array([0, 15, 16, 235, 236, 255]) / 255)
    full = color_tags.to_light(Encoding(BT709, transfer), np.array([0.0, 1.0]))
    np.testing.assert_allclose(light, full[[0, 0, 0, 1, 1, 1]], atol=1e-9)


@pytest.mark.parametrize(("gamma", "used"), [(0.1, True), (10, True), (0.09, False), (10.1, False), (None, False)])
def test_an_exponent_far_from_all_screens_is_ignored(gamma: float | None, used: bool) -> None:
    warnings: list[str] = []
    encoding = color_tags.from_gamma(gamma, None, warnings)
    assert encoding == (Encoding(BT709, 1 / gamma) if used and gamma else None)
    assert bool(warnings) == (gamma is not None and not used)


@pytest.mark.parametrize(
    ("primaries", "possible"),
    [
        (BT709, True),
        (PRIMARIES[10], True),  # XYZ itself
        (Primaries((0.32168, 0.33767), (0.7347, 0.2653), (0.0, 1.0), (0.0001, -0.077)), False),  # ACES: negative light
        (BT709._replace(white=(0.3, 0.0)), False),
        (BT709._replace(white=(0.1, 0.6)), False),  # outside
        (PRIMARIES[10]._replace(white=(0.5, 0.5)), False),  # on the line from red to green
        (Primaries((0.4499, 0.45), (0.6, 0.3), (0.3, 0.6), (0.449, 0.45)), False),  # nearly on one line
    ],
)
def test_primaries_span_a_triangle_around_white(primaries: Primaries, possible: bool) -> None:
    warnings: list[str] = []
    assert color_tags.from_gamma(None, primaries, warnings) == (Encoding(primaries) if possible else None)
    assert bool(warnings) != possible


@pytest.mark.parametrize(
    ("shift", "icc"), [(0.0, False), (0.004, False), (-0.004, False), (0.006, True), (-0.006, True)]
)
def test_primaries_that_are_rounded_need_no_profile(shift: float, icc: bool) -> None:
    primaries = BT709._replace(green=(0.3 + shift, 0.6))
    assert (color_tags.to_srgb(grey(SHALLOW), Encoding(primaries))[1] is not None) == icc
    assert color_tags.to_srgb(grey(SHALLOW), Encoding(primaries), grey=True)[1] is None


# --- High dynamic range


def nits_of_pq(values: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084 with its constants as the standard writes them."""
    m1, m2 = 2610 / 16384, 2523 / 4096 * 128
    c1, c2, c3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = values ** (1 / m2)
    return 10000 * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)


def nits_of_hlg(values: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, grey on a display of 1000 nits."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((values - c) / a) + b) / 12)
    return 1000 * scene**1.2


NITS = {"PQ": nits_of_pq, "HLG": nits_of_hlg}


@pytest.mark.parametrize("transfer", NITS)
@pytest.mark.parametrize("rows", [1, 300])
def test_203_nits_are_white(transfer: str, rows: int) -> None:
    """An image without light above 203 nits (BT.2408) keeps every tone, in every strip of rows."""
    nits = NITS[transfer]
    values = DEEP[nits(DEEP / 65535) <= 203]
    pixels = grey(values[::64]).repeat(rows, axis=0)
    result, icc = color_tags.to_srgb(pixels, Encoding(BT709, transfer))
    expected = srgb(nits(values[::64] / 65535) / 203)
    assert np.abs(result[..., 0] - expected).max() <= 8 and icc is None
    np.testing.assert_array_equal(result, result[:1].repeat(rows, axis=0))


def test_pq_and_its_inverse() -> None:
    values = np.linspace(0, 1, 1001)
    np.testing.assert_allclose(color_tags.decode_pq(values) * 203, nits_of_pq(values), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(color_tags.encode_pq(color_tags.decode_pq(values)), values, atol=1e-6)


@pytest.mark.parametrize("transfer", NITS)
@pytest.mark.parametrize("peak", [210, 350, 900])
def test_the_brightest_value_becomes_white_and_all_below_stay_below(transfer: str, peak: float) -> None:
    nits = NITS[transfer]
    values = DEEP[nits(DEEP / 65535) <= peak][::-64][::-1]
    result, _ = color_tags.to_srgb(grey(values), Encoding(BT709, transfer))
    assert result[0, -1, 0] >= 65530 and (np.diff(result[0, :, 0].astype(int)) >= 0).all()
    assert result[0, nits(values / 65535) <= 0.8 * peak, 0].max() < 65520


def test_colors_outside_of_srgb_are_clipped() -> None:
    """BT.2020 at 203 nits; the matrix to BT.709 is that of ITU-R BT.2407."""
    white = int(np.searchsorted(nits_of_pq(DEEP / 65535), 203)) - 1
    pixels = np.array([[[white, 0, 0], [0, white, 0], [0, 0, white], [white, white, white]]], np.uint16)
    result, _ = color_tags.to_srgb(pixels, color_tags.from_numbers(9, 16, True, []))
    matrix = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
    light = np.vstack([matrix.T, np.ones(3)]).clip(0, 1)
    assert np.abs(result[0] - srgb(light)).max() <= 60


def test_hlg_darkens_a_color_by_its_luminance() -> None:
    """BT.2100, table 5: scene light times the luminance to the power of 0.2, here of red alone."""
    value = np.array(0.5 * 65535).round().astype(np.uint16)
    result, _ = color_tags.to_srgb(np.array([[[value, 0, 0]]], np.uint16), Encoding(BT709, "HLG"))
    scene = 0.25 / 3
    expected = srgb(np.array(1000 / 203 * scene * (0.2126 * scene) ** 0.2))
    assert abs(int(result[0, 0, 0]) - expected) <= 12 and result[0, 0, 1:].tolist() == [0, 0]


def test_light_above_white_bends_as_in_bt_2390() -> None:
    """Values of the report's curve from 1000 nits to 203, and what must hold for every curve."""
    peak = 1000 / color_tags.WHITE
    light = np.linspace(0, peak, 500)
    bent = color_tags.bend(light, peak)
    assert (np.diff(bent) > 0).all() and bent[-1] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(bent[light < 0.4], light[light < 0.4], atol=1e-9)  # below the knee at 93 nits
    np.testing.assert_array_equal(color_tags.bend(light, 1.0), light)


@pytest.mark.parametrize("transfer", [16, 18])
def test_hdr_highlights_keep_their_order(transfer: int) -> None:
    ramp = np.repeat(np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None], 3, axis=2)
    result, icc = color_tags.to_srgb(ramp, color_tags.from_numbers(9, transfer, True, []))
    assert icc is None and result.dtype == np.uint16
    assert (np.diff(result[0, :, 1].astype(int)) >= 0).all() and result[0, 0, 1] == 0 and result[0, -1, 1] >= 65500
    assert np.ptp(result.astype(int), axis=2).max() <= 64  # grey stays grey


def test_primaries_are_those_of_the_standard() -> None:
    """ITU-T H.273, table 2: green, blue, red and white of each number, as x1000 and y1000."""
    standard = {
        1: (300, 600, 150, 60, 640, 330, 312.7, 329), 4: (210, 710, 140, 80, 670, 330, 310, 316),
        5: (290, 600, 150, 60, 640, 330, 312.7, 329), 6: (310, 595, 155, 70, 630, 340, 312.7, 329),
        7: (310, 595, 155, 70, 630, 340, 312.7, 329), 8: (243, 692, 145, 49, 681, 319, 310, 316),
        9: (170, 797, 131, 46, 708, 292, 312.7, 329), 10: (0, 1000, 0, 0, 1000, 0, 1000 / 3, 1000 / 3),
        11: (265, 690, 150, 60, 680, 320, 314, 351), 12: (265, 690, 150, 60, 680, 320, 312.7, 329),
        22: (295, 605, 155, 77, 630, 340, 312.7, 329), 2: (300, 600, 150, 60, 640, 330, 312.7, 329),  # 2: unspecified
    }  # fmt: skip
    assert color_tags.PRIMARIES.keys() == standard.keys()
    for number in standard:
        white, red, green, blue = color_tags.from_numbers(number, 13, True, []).primaries
        assert [1000 * value for value in (*green, *blue, *red, *white)] == pytest.approx(standard[number])


@pytest.mark.parametrize("number", [number for number in color_tags.PRIMARIES if number != 10])
def test_a_profile_says_its_primaries(number: int) -> None:
    primaries = color_tags.PRIMARIES[number]
    core = ImageCms.ImageCmsProfile(io.BytesIO(color_tags.profile(primaries))).profile
    bradford = core.chromatic_adaptation[0]  # pyright: ignore[reportAttributeAccessIssue]
    for place, named in ((1, core.red_primary), (2, core.green_primary), (3, core.blue_primary)):  # pyright: ignore[reportAttributeAccessIssue]
        x, y, z = np.linalg.solve(np.array(bradford), named[0])
        assert (x / (x + y + z), y / (x + y + z)) == pytest.approx(primaries[place], abs=3e-3)


def test_the_profile_of_bt709_is_that_of_srgb() -> None:
    """As another program reads it: its names, header and curve."""
    data = color_tags.profile(BT709)
    opened = ImageCms.ImageCmsProfile(io.BytesIO(data))
    core: Any = opened.profile
    assert (core.version, core.device_class, core.xcolor_space, core.connection_space) == (4.4, "mntr", "RGB ", "XYZ ")
    assert core.profile_description == "RGB, sRGB curve, primaries 0.3127,0.329 0.64,0.33 0.3,0.6 0.15,0.06"
    assert core.copyright == "No copyright, use freely"
    assert core.creation_date is not None and core.creation_date.isoformat() == "2000-01-01T00:00:00"
    assert core.media_white_point is not None and core.media_white_point[0] == pytest.approx(
        (0.9642, 1, 0.8249), abs=1e-4
    )
    ramp = Image.fromarray(grey(SHALLOW))
    shown = ImageCms.profileToProfile(ramp, opened, ImageCms.createProfile("sRGB"), flags=ImageCms.Flags.NOOPTIMIZE)
    assert shown is not None and np.abs(np.asarray(shown).astype(int) - grey(SHALLOW)).max() <= 1


def test_the_layout_of_a_profile() -> None:
    """ICC.1:2022: a header of 128 bytes, a table of tags, and their data at multiples of four."""
    data = color_tags.profile(PRIMARIES[9])
    size, signature, illuminant = struct.unpack_from(">I32x4s28x12s", data)
    assert size == len(data) and size % 4 == 0 and signature == b"acsp"
    assert np.array(struct.unpack(">3i", illuminant)) / 65536 == pytest.approx((0.9642, 1, 0.8249), abs=1e-5)
    assert data[4:8] == bytes(4) and data[40:68] == bytes(28) and data[80:128] == bytes(48)
    entries = [struct.unpack_from(">4sII", data, 132 + 12 * n) for n in range(struct.unpack_from(">I", data, 128)[0])]
    assert {name for name, *_ in entries} == {
        b"desc", b"cprt", b"wtpt", b"chad", b"rXYZ", b"gXYZ", b"bXYZ", b"rTRC", b"gTRC", b"bTRC",
    }  # fmt: skip
    assert min(place for _, place, _ in entries) == 132 + 12 * len(entries)
    for name, place, length in entries:
        assert place % 4 == 0 and place + length <= size and data[place + 4 : place + 8] == bytes(4), name
    curves = [struct.unpack_from(">4s4xHH5i", data, place) for name, place, _ in entries if name.endswith(b"TRC")]
    assert {curve[:3] for curve in curves} == {(b"para", 3, 0)}
    assert np.array(curves[0][3:]) / 65536 == pytest.approx(
        (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045), abs=1e-5
    )
    text = next(data[place : place + length] for name, place, length in entries if name == b"cprt")
    assert struct.unpack_from(">4s4xII2s2sII", text) == (b"mluc", 1, 12, b"en", b"US", len(text) - 28, 28)
