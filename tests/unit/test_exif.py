"""The orientation in EXIF and XMP, and the tags that are kept."""

from __future__ import annotations

import struct

import pytest
from PIL import ExifTags, Image

from seesr.images import exif

SIZES = {1: "B", 3: "H", 4: "I"}  # BYTE, SHORT, LONG


def directory(order: str, *entries: tuple[int, int, int, int]) -> bytes:
    """An EXIF block of one directory: (tag, type, count, value)."""
    body = b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + struct.pack(order + SIZES.get(kind, "I"), value).ljust(4, b"\0")
        for tag, kind, count, value in entries
    )
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 10) + b"xx"
    return start + struct.pack(f"{order}H", len(entries)) + body + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("value", [0, 1, 6, 8, 9])
@pytest.mark.parametrize("prefix", [b"", b"Exif\0\0"])
def test_an_orientation_has_1_to_8(order: str, kind: int, value: int, prefix: bytes) -> None:
    block = prefix + directory(order, (271, 4, 1, 7), (274, kind, 1, value), (274, 3, 1, 3))
    assert exif.in_exif(block) == (value if 1 <= value <= 8 else None)
    assert exif.orientation({"exif": block}) == (value if 1 <= value <= 8 else 1)


@pytest.mark.parametrize("entry", [(274, 3, 2, 6), (274, 2, 1, 6), (274, 5, 1, 6), (275, 3, 1, 6)])
def test_other_entries_are_no_orientation(entry: tuple[int, int, int, int]) -> None:
    assert exif.in_exif(directory("<", entry)) is None
    assert exif.in_exif(directory("<", entry, (274, 3, 1, 8))) == 8


def test_the_last_of_many_entries_is_found() -> None:
    entries = [(tag, 3, 1, 1) for tag in range(40)]
    block = directory(">", *entries, (274, 3, 1, 5))
    assert exif.in_exif(block) == 5 and exif.in_exif(block[:-7]) is None  # cut within its value
    beyond = directory("<", (271, 3, 1, 1)) + struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    assert exif.in_exif(beyond) is None  # behind the directory


@pytest.mark.parametrize("key", ["xmp", "XML:com.adobe.xmp"])
@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize(("form", "expected"), [('="6"', 6), ("='8'", 8), (">3<", 3), ('="9"', 1), ('=" 5"', 5)])
def test_exif_counts_before_xmp(key: str, as_text: bool, form: str, expected: int) -> None:
    packet = f"<rdf tiff:Orientation{form}/>"
    info = {key: packet if as_text else packet.encode()}
    assert exif.orientation(info) == expected
    assert exif.orientation({**info, "exif": directory("<", (274, 3, 1, 2))}) == 2
    assert exif.orientation({**info, "exif": b"Exif\0\0damaged"}) == expected


def test_tags_that_cannot_be_written_are_named() -> None:
    def getexif() -> Image.Exif:
        block = Image.Exif()
        block[ExifTags.Base.Make], block[0x9999], block[ExifTags.Base.Model] = "maker", object(), object()
        block[ExifTags.Base.Orientation] = 6
        block.get_ifd(ExifTags.IFD.GPSInfo).update({ExifTags.GPS.GPSAltitude: object(), ExifTags.GPS.GPSDateStamp: "x"})
        return block

    for of_tiff, lost in ((False, "Model, tag 39321, GPSAltitude"), (True, "Model, GPSAltitude")):
        warnings: list[str] = []
        block = exif.readable_tags(getexif, warnings, of_tiff)
        assert warnings == [f"EXIF data that cannot be read are left out: {lost}"]
        kept = Image.Exif()
        kept.load(block or b"")
        assert kept[ExifTags.Base.Make] == "maker" and ExifTags.Base.Orientation not in kept
        assert kept.get_ifd(ExifTags.IFD.GPSInfo) == {ExifTags.GPS.GPSDateStamp: "x"}


@pytest.mark.parametrize("broken", [ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo])
def test_one_broken_directory_leaves_the_others(broken: ExifTags.IFD) -> None:
    class Broken(Image.Exif):
        def get_ifd(self, tag: int) -> dict:
            if tag == broken:
                raise SyntaxError("broken")
            return super().get_ifd(tag)

    def getexif() -> Image.Exif:
        block = Broken()
        block[ExifTags.Base.Make] = "maker"
        if broken != ExifTags.IFD.Exif:
            block.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 200
        if broken != ExifTags.IFD.GPSInfo:
            block.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSDateStamp] = "x"
        return block

    warnings: list[str] = []
    kept = Image.Exif()
    kept.load(exif.readable_tags(getexif, warnings, of_tiff=False) or b"")
    assert warnings == [f"EXIF data that cannot be read are left out: {broken.name}"]
    assert kept[ExifTags.Base.Make] == "maker"
    assert kept.get_ifd(ExifTags.IFD.Exif) == ({ExifTags.Base.ISOSpeedRatings: 200} if broken.name == "GPSInfo" else {})
    assert kept.get_ifd(ExifTags.IFD.GPSInfo) == ({ExifTags.GPS.GPSDateStamp: "x"} if broken.name == "Exif" else {})
