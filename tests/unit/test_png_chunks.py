"""Chunks of a PNG that the decoder does not see."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import ImageCms

from seesr.images import color_tags, png_chunks
from seesr.images.image_data import ImageData
from seesr.images.png import encode_png
from seesr.images.png_chunks import chunk, split

PNG = encode_png(ImageData(np.zeros((4, 5, 3), np.uint8)))
HEAD, TAIL = PNG[:33], PNG[33:]


def test_nothing_behind_the_end_is_read() -> None:
    found = split(PNG + chunk(b"eXIf", b"II*\0") + chunk(b"gAMA", struct.pack(">I", 100000)))
    assert found == png_chunks.Chunks(PNG, None, None, None, None, ())


def test_the_decoder_gets_what_it_needs() -> None:
    needed = chunk(b"pHYs", bytes(9)) + chunk(b"tRNS", bytes(6))
    extra = chunk(b"tIME", bytes(7)) + chunk(b"tEXt", b"a\0b") + chunk(b"pHYs", bytes(9))[:-1] + b"\xff"
    found = split(HEAD + needed + extra + TAIL)
    assert found.data == HEAD + needed + TAIL
    assert found.warnings == ("the PNG chunk pHYs has a wrong checksum and is left out",)


@pytest.mark.parametrize("at", [0, 4, 11])
def test_image_data_that_end_early_are_closed(at: int) -> None:
    """A chunk of another kind that is cut is dropped."""
    body = PNG[41 : 41 + int.from_bytes(PNG[33:37], "big")]
    cut = HEAD + chunk(b"IDAT", body)[: 8 + at]
    assert [each[:2] for each in png_chunks.chunks(cut)][1:] == [(b"IDAT", body[:at])]
    assert len(list(png_chunks.chunks(HEAD + chunk(b"tEXt", body)[: 8 + at]))) == 1
    assert split(cut).warnings == ("the PNG has no end (IEND); its rows are complete",)


def test_at_most_so_many_chunks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png_chunks, "MAX_CHUNKS", 5)
    assert len(list(png_chunks.chunks(HEAD + chunk(b"tEXt", b"") * 9))) == 5


@pytest.mark.parametrize("name", [b"Raw profile type exif", b"Raw profile type APP1"])
@pytest.mark.parametrize("prefix", [b"", b"457869660000"])
def test_exif_of_image_magick(name: bytes, prefix: bytes) -> None:
    content = b"\nexif\n      12\n" + prefix + b"4949\n2a00ff\n"
    assert split(HEAD + chunk(b"tEXt", name + b"\0" + content) + TAIL).exif == b"II*\0\xff"
    block = chunk(b"eXIf", b"MM\0*")
    assert split(HEAD + chunk(b"tEXt", name + b"\0" + content) + block + TAIL).exif == b"MM\0*"
    for damaged in (b"", b"\nexif\n 3\nxyz", b"\nexif\n 0\n"):
        assert png_chunks.raw_profile(damaged) is None


@pytest.mark.parametrize("order", [1, -1])
def test_the_first_chunk_of_a_kind_counts(order: int) -> None:
    gammas = [chunk(b"gAMA", struct.pack(">I", value)) for value in (100000, 50000)][::order]
    found = split(HEAD + b"".join(gammas) + TAIL)
    assert found.encoding == color_tags.Encoding(transfer=1.0 if order == 1 else 2.0)


def test_chromaticities_and_gamma() -> None:
    numbers = [31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000]
    tags = chunk(b"cHRM", struct.pack(">8i", *numbers)) + chunk(b"gAMA", struct.pack(">I", 40000))
    found = split(HEAD + tags + TAIL)
    assert found.encoding == color_tags.Encoding(color_tags.PRIMARIES[12], 2.5)
    for cut in (chunk(b"cHRM", bytes(31)), chunk(b"gAMA", bytes(3)), chunk(b"cICP", b"\x09\x10\0")):
        assert split(HEAD + cut + TAIL) == (PNG, None, None, None, None, ())


@pytest.mark.parametrize(("last", "full"), [(1, True), (0, False)])
def test_numbers_of_h_273(last: int, full: bool) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = chunk(b"iCCP", b"a name\0\0" + zlib.compress(icc))
    assert split(HEAD + profile + TAIL).icc == icc
    tags = chunk(b"cICP", bytes([9, 16, 0, last])) + chunk(b"sRGB", b"\0")
    found = split(HEAD + profile + tags + TAIL)
    assert found.icc is None and found.encoding == color_tags.from_numbers(9, 16, full, [])


@pytest.mark.parametrize("skip", [0, 1])
def test_compressed_data_that_end_early_are_none(skip: int) -> None:
    packed = b"name\0" * skip + b"\0" + zlib.compress(b"text" * 9)
    assert png_chunks.inflated(packed, 1, skip) == b"text" * 9
    assert png_chunks.inflated(packed[:-1], 1, skip) is None and png_chunks.inflated(b"", 1, skip) is None
