"""Files by other programs, format x depth x channels x colour tag x orientation x alpha, as other readers see them.

tests/data/inputs/README.md says how the files were made.
"""

from __future__ import annotations

import functools
import io
import struct
import zlib
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pillow_heif
import pytest
import tifffile
from inputs import EXPECTED, FOLDER, check_pixels, is_deep, is_grey, shown
from PIL import ExifTags, Image, ImageCms

from seesr.images import convert, jpeg
from seesr.images.mask import read_mask
from seesr.images.read import decode, from_pil, open_header
from seesr.images.record import read_record

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("name", EXPECTED)
def test_pixels_are_those_of_an_independent_reader(name: str) -> None:
    checked = []
    image = decode((FOLDER / name).read_bytes(), lambda *size: checked.append(size))
    assert checked == [image.size]
    check_pixels(name, image)
    assert image.grey == image.one_channel == is_grey(name)
    assert (image.rgb.dtype == np.uint16) == is_deep(name)


def heic(pixels: np.ndarray) -> bytes:
    channels, buffer = {3: "RGB", 4: "RGBA"}[pixels.shape[2]], io.BytesIO()
    mode = channels if pixels.dtype == np.uint8 else f"{channels};16"
    image = pillow_heif.from_bytes(mode, pixels.shape[1::-1], pixels.tobytes())
    image.save(buffer, quality=-1, chroma=444, matrix_coefficients=0)
    return buffer.getvalue()


def opencv(pixels: np.ndarray, suffix: str) -> bytes:
    ordered = pixels if pixels.ndim == 2 else pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return cv2.imencode(suffix, ordered)[1].tobytes()


ENCODERS = {  # beside the programs of tests/data/inputs: function, depths, channels, largest loss in levels of 255
    "PNG by imagecodecs": (imagecodecs.png_encode, (8, 16), (1, 2, 3, 4), 0),
    "PNG by OpenCV": (functools.partial(opencv, suffix=".png"), (8, 16), (1, 3, 4), 0),
    "TIFF by OpenCV": (functools.partial(opencv, suffix=".tiff"), (8, 16), (1, 3, 4), 0),
    "WebP by imagecodecs": (functools.partial(imagecodecs.webp_encode, lossless=True), (8,), (3, 4), 0),
    "JPEG by imagecodecs": (functools.partial(imagecodecs.jpeg8_encode, level=100, subsampling="444"), (8,), (1, 3), 4),
    "AVIF by imagecodecs": (functools.partial(imagecodecs.avif_encode, level=100), (8,), (1, 3, 4), 4),
    "HEIC by pillow-heif": (heic, (8, 16), (3, 4), 1),  # 16 bits are written as 10
    "JPEG XL by imagecodecs": (functools.partial(imagecodecs.jpegxl_encode, lossless=True), (8,), (1, 2, 3, 4), 0),
}


@pytest.mark.parametrize(
    ("encoder", "depth", "channels"),
    [
        (encoder, depth, channels)
        for encoder, (_, depths, counts, _) in ENCODERS.items()
        for depth in depths
        for channels in counts
    ],
)
def test_pixels_are_those_that_another_encoder_wrote(encoder: str, depth: int, channels: int) -> None:
    encode, *_, maximum = ENCODERS[encoder]
    y, x = np.mgrid[:24, :32]
    ramps = np.stack([x / 31, y / 23, (x + y) / 54, 0.25 + y / 46], axis=2)
    layers = {1: ramps[..., 0], 2: ramps[..., [0, 3]], 3: ramps[..., :3], 4: ramps}[channels]
    pixels = np.ascontiguousarray((layers * (2**depth - 1)).round().astype(f"uint{depth}"))
    image = decode(bytes(encode(pixels)))
    assert image.rgb.dtype == pixels.dtype and image.grey == image.one_channel == (channels < 3)
    colors = pixels.reshape(24, 32, -1)[..., : 1 if channels < 3 else 3].astype(float)
    tolerance = maximum * (257 if depth == 16 else 1)
    assert np.abs(image.rgb - colors).max() <= tolerance
    assert (image.alpha is not None) == (channels in (2, 4))
    if image.alpha is not None:
        assert np.abs(image.alpha - pixels[..., -1].astype(float)).max() <= tolerance


@pytest.mark.parametrize(
    "name",
    ["exiftool-orientation-6.png", "exiftool-xmp-orientation-6.jpg", "avifenc-irot-1.avif", "cjxl-orientation-6.jxl"],
)
def test_a_mask_must_have_the_aspect_of_the_upright_image(name: str) -> None:
    data = (FOLDER / name).read_bytes()
    width, height = decode(data).size
    assert open_header(data).size == (width, height) and width < height
    assert read_mask(file(Image.new("L", (width, height), 255)), (width, height)).all()
    with pytest.raises(ValueError, match="their aspect ratios differ"):
        read_mask(file(Image.new("L", (height, width))), (width, height))


@pytest.mark.parametrize("name", ["vips-lab.tif", "vips-lab-16.tif"])
def test_a_tiff_that_is_not_read_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=r"this is a TIFF of (32-bit float\S*|16-bit signed) Lab.*use RGB or grey"):
        decode((FOLDER / name).read_bytes())


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def photo(rng: np.random.Generator) -> Image.Image:
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((50, 40), Image.Resampling.BICUBIC)


# --- Files without their end


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_without_its_end_is_read_with_a_warning(photo: Image.Image, mode: str, options: dict) -> None:
    data = file(photo.convert(mode), "JPEG", **options)
    whole = decode(data)
    for missing in (1, 2):  # half of the marker, or all of it
        decoded = decode(data[:-missing])
        np.testing.assert_array_equal(decoded.rgb, whole.rgb)
        assert decoded.warnings == ("the JPEG has no end (EOI); all of its pixels are there",)
    assert whole.warnings == ()
    for missing in (4, 8, 40, 200):
        with pytest.raises(ValueError, match="damaged"):
            decode(data[:-missing])


def test_a_progressive_jpeg_that_ends_between_two_scans_is_refused(photo: Image.Image) -> None:
    """Every row is there, in less than its quality."""
    data = file(photo, "JPEG", progressive=True)
    scans = [start - 4 for marker, start, _ in jpeg.segments(data) if marker == 0xDA]
    for scan in scans[1:]:
        with pytest.raises(ValueError, match="its end is missing, with some of its pixels"):
            decode(data[:scan])


def test_bytes_in_front_of_a_jpeg_are_passed_over(photo: Image.Image) -> None:
    data = file(photo, "JPEG")
    decoded = decode(b"\n" + data)
    np.testing.assert_array_equal(decoded.rgb, decode(data).rgb)
    assert decoded.warnings == ("1 byte(s) before the JPEG data are skipped",)
    with pytest.raises(ValueError, match="not an image that can be read"):
        decode(b"\n" * 40 + data)


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_without_its_end_is_read_while_no_row_is_missing(rng: np.random.Generator, depth: int) -> None:
    pixels = rng.integers(0, 2**depth, (20, 30, 3)).astype(f"uint{depth}")
    data = cv2.imencode(".png", pixels)[1].tobytes()
    for missing in (1, 12, 15):  # of IEND, all of it, and of the checksum before
        decoded = decode(data[:-missing])
        np.testing.assert_array_equal(decoded.rgb, pixels[..., ::-1])
        assert decoded.warnings == ("the PNG has no end (IEND); its rows are complete",)
    for missing in (30, 100, 500):
        with pytest.raises(ValueError, match="damaged"):
            decode(data[:-missing])


# --- Chunks of a PNG


def chunk(name: bytes, body: bytes, wrong: int = 0) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ wrong)


def with_chunks(data: bytes, *chunks: bytes, at_the_end: bool = False) -> bytes:
    place = len(data) - 12 if at_the_end else 33
    return data[:place] + b"".join(chunks) + data[place:]


def test_text_in_a_png_cannot_stop_its_reading(photo: Image.Image) -> None:
    data = file(photo)
    for extra, warned in (
        (chunk(b"tEXt", b"note\0" + b"x" * 2_500_000), False),
        (chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(90_000_000))), False),
        (chunk(b"tEXt", b"note\0words", wrong=1), True),
        (chunk(b"pHYs", bytes(9), wrong=1), True),
        (chunk(b"gAMA", struct.pack(">I", 100000), wrong=1), True),
        (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no zlib"), False),
    ):
        decoded = decode(with_chunks(data, extra))
        np.testing.assert_array_equal(decoded.rgb, np.asarray(photo))
        assert bool(decoded.warnings) == warned
    with pytest.raises(ValueError, match="damaged"):
        decode(with_chunks(data, chunk(b"IDAT", b"x", wrong=1)))


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("kind", ["eXIf", "raw profile", "XMP"])
def test_the_orientation_of_a_png_is_found_before_it_is_decoded(
    photo: Image.Image, kind: str, at_the_end: bool
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    text = f"\nexif\n{len(block):8d}\n{block.hex()}\n".encode()
    extra = {
        "eXIf": chunk(b"eXIf", block),
        "raw profile": chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        "XMP": chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6"/>'),
    }[kind]
    data = with_chunks(file(photo), extra, at_the_end=at_the_end)
    assert open_header(data).size == (40, 50)
    np.testing.assert_array_equal(decode(data).rgb, np.rot90(np.asarray(photo), -1))


def test_colour_tags_in_the_order_of_the_standard(photo: Image.Image) -> None:
    """ICC before sRGB before gAMA; cICP before all."""
    data, gamma = file(photo), chunk(b"gAMA", struct.pack(">I", 100000))
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = chunk(b"iCCP", b"p\0\0" + zlib.compress(icc))
    untouched = np.asarray(photo)
    assert decode(with_chunks(data, gamma)).rgb.mean() > untouched.mean() + 20
    np.testing.assert_array_equal(decode(with_chunks(data, chunk(b"sRGB", b"\0"), gamma)).rgb, untouched)
    decoded = decode(with_chunks(data, profile, gamma))
    np.testing.assert_array_equal(decoded.rgb, untouched)
    assert decoded.icc == icc
    decoded = decode(with_chunks(data, chunk(b"cICP", bytes([1, 8, 0, 1])), profile))
    assert decoded.rgb.mean() > untouched.mean() + 20 and decoded.icc is None


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        (b"gAMA", bytes(4), "gAMA value 0 is out of range"),
        (b"cHRM", bytes(32), "cHRM chromaticities are invalid"),
        (b"cHRM", struct.pack(">8I", *([31270, 32900] * 4)), "cHRM chromaticities are invalid"),
        (b"cICP", bytes([77, 99, 0, 1]), "the colour tag 77/99 is not known"),
        (b"iCCP", b"p\0\0" + zlib.compress(bytes(80_000_000)), "the colour profile cannot be read"),
    ],
)
def test_an_invalid_color_tag_is_dropped_with_a_warning(
    photo: Image.Image, name: bytes, body: bytes, message: str
) -> None:
    decoded = decode(with_chunks(file(photo), chunk(name, body)))
    np.testing.assert_array_equal(decoded.rgb, np.asarray(photo))
    assert decoded.icc is None and message in decoded.warnings[0]


@pytest.mark.parametrize("name", ["gama-1.000-8.png", "chrm-p3-8.png", "gama-linear-p3-16.png", "vips-rgb-8.png"])
def test_colour_tags_of_a_png_count_when_pillow_has_opened_it(name: str) -> None:
    expected = shown(decode((FOLDER / name).read_bytes()))
    with Image.open(FOLDER / name) as image:
        result = shown(from_pil(image))
    assert np.abs(result - expected).mean() < (4 if "-16" in name else 0.1)  # Pillow has 8 bits


def test_a_logarithmic_curve_is_refused_by_name(photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="logarithmic transfer curve"):
        decode(with_chunks(file(photo), chunk(b"cICP", bytes([9, 9, 0, 1]))))


# --- Containers


def test_the_primary_image_of_a_heic_is_used(photo: Image.Image) -> None:
    pillow_heif.register_heif_opener()
    other = Image.new("RGB", photo.size)
    data = file(other, "HEIF", save_all=True, append_images=[photo], primary_index=1)
    decoded = decode(data)
    assert decoded.rgb.mean() > 60 and decoded.warnings == ("the file has 2 images; the primary one is used",)


# --- TIFF


def tiff(*pages: tuple[np.ndarray, dict]) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for pixels, options in pages:
            writer.write(pixels, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("first", [False, True])
def test_the_full_page_of_a_tiff_with_a_thumbnail_is_used(rng: np.random.Generator, depth: int, first: bool) -> None:
    full = rng.integers(0, 2**depth, (24, 32, 3)).astype(f"uint{depth}")
    pages = [(full, {"photometric": "rgb"}), (full[::4, ::4], {"photometric": "rgb", "subfiletype": 1})]
    data = tiff(*pages[:: -1 if first else 1])
    np.testing.assert_array_equal(decode(data).rgb, full)
    with pytest.raises(ValueError, match="the image has 2 pages; send one still image"):
        decode(tiff(pages[0], pages[0]))
    with pytest.raises(ValueError, match="the image has 2 pages"):
        decode(tiff(pages[0], (full, {"photometric": "rgb", "subfiletype": 2})))  # a page of a document


@pytest.mark.parametrize(
    ("pixels", "options", "message"),
    [
        (np.full((4, 5), 300.0, np.float32), {}, "32-bit floating-point grey with values from 300 to 300: 0 to 1 is"),
        (np.full((4, 5), np.nan, np.float32), {}, "floating-point grey"),
        (np.ones((4, 5), np.int16), {}, "16-bit signed grey"),
        (np.ones((4, 5), np.complex64), {}, "complex"),
        (np.ones((4, 5), np.uint16), {"photometric": "cfa"}, "camera raw"),
    ],
)
def test_what_a_tiff_is_that_cannot_be_read(pixels: np.ndarray, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(tiff((pixels, options)))


def test_a_preview_in_raw_data_is_not_taken_for_the_image(rng: np.random.Generator) -> None:
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    dng = [(50706, 1, 4, (1, 4, 0, 0), True)]
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:  # as in NEF: a thumbnail with the raw data below it
        writer.write(small, photometric="rgb", subfiletype=1, subifds=1)
        writer.write(np.zeros((24, 32), np.uint16), photometric="cfa")
    for data in (buffer.getvalue(), tiff((small, {"photometric": "rgb", "extratags": dng}))):
        with pytest.raises(ValueError, match="this is a camera raw file.*export it"):
            decode(data)


def test_a_tiff_of_floats_a_little_outside_is_clipped_with_a_warning() -> None:
    ramp = np.linspace(-0.001, 1, 400, dtype=np.float32).reshape(20, 20)
    decoded = decode(tiff((ramp, {})))
    assert decoded.rgb.min() == 0 and decoded.rgb.max() == 65535 and decoded.grey
    assert "outside of 0 to 1 and are clipped" in decoded.warnings[0]


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
def test_a_cut_deep_tiff_is_refused(rng: np.random.Generator, compression: str | None) -> None:
    data = tiff(
        (rng.integers(0, 65536, (40, 40, 2)).astype(np.uint16), {"compression": compression, "extrasamples": [2]})
    )
    assert decode(data).alpha is not None
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ValueError, match=r"damaged|not an image"):
            decode(data[: int(len(data) * share)])


# --- Others


def test_a_jpeg_of_12_bits_keeps_them() -> None:
    ramp = np.linspace(0, 4095, 64).astype(np.uint16)[None].repeat(16, axis=0)
    data = imagecodecs.jpeg8_encode(ramp, level=100, bitspersample=12)
    decoded = decode(data)
    assert decoded.rgb.dtype == np.uint16 and decoded.one_channel
    assert np.abs(decoded.rgb[..., 0] / 65535 * 4095 - ramp).max() <= 8
    with pytest.raises(ValueError, match="damaged"):
        decode(data[:-20])


@pytest.mark.parametrize("bits", [10, 12])
def test_an_avif_of_more_than_8_bits_keeps_them(bits: int) -> None:
    top = 2**bits - 1
    ramp = np.linspace(0, top, 512).round().astype(np.uint16).reshape(16, 32, 1).repeat(3, axis=2)
    decoded = decode(imagecodecs.avif_encode(ramp, level=100, bitspersample=bits, pixelformat="444"))
    assert decoded.rgb.dtype == np.uint16 and (decoded.rgb[0, 0, 0], decoded.rgb[-1, -1, 0]) == (0, 65535)
    assert np.abs(decoded.rgb / 65535 * top - ramp).max() <= 1


def test_a_heic_of_10_bits_keeps_them() -> None:
    ramp = np.linspace(0, 1023, 512).round().astype(np.uint16).reshape(16, 32, 1).repeat(3, axis=2)
    heic = pillow_heif.from_bytes("RGB;10", (32, 16), ramp.tobytes())
    buffer = io.BytesIO()
    heic.save(buffer, quality=-1, chroma=444, matrix_coefficients=0)
    decoded = decode(buffer.getvalue())
    assert decoded.rgb.dtype == np.uint16 and (decoded.rgb[0, 0, 0], decoded.rgb[-1, -1, 0]) == (0, 65535)
    assert np.abs(decoded.rgb / 65535 * 1023 - ramp).max() <= 1


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GIF89a", "a GIF"),
        (b"BM", "a BMP"),
        (b"\0\0\1\0", "an ICO"),
        (b"P6 ", "a PPM"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        (b"\xff\x4f\xff\x51", "a JPEG 2000"),
        (b"\x76\x2f\x31\x01", "an OpenEXR"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a camera raw file (CR3)"),
    ],
)
def test_other_formats_are_named_with_what_to_do(start: bytes, message: str) -> None:
    with pytest.raises(ValueError, match="first") as caught:
        decode(start + bytes(60))
    assert message in str(caught.value) and str(caught.value).endswith("use JPEG, PNG, WebP, AVIF, TIFF, HEIC, JPEG XL")


def test_a_tga_is_named() -> None:
    with pytest.raises(ValueError, match="a TGA"):
        decode(bytes(60) + b"TRUEVISION-XFILE.\0")


@pytest.mark.parametrize("text", ["1987", "true", '"text"', "[1]", '{"settings": 3}', "{", "[" * 100_000])
def test_a_description_that_is_no_record_is_none(tmp_path: Path, photo: Image.Image, text: str) -> None:
    packet = f"<x:xmpmeta><dc:description>{text}</dc:description></x:xmpmeta>"
    if len(packet) < 60_000:
        photo.save(tmp_path / "a.jpg", xmp=packet.encode())
    photo.save(tmp_path / "a.webp", xmp=packet.encode())
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match="no settings record"):
            read_record(path)


@pytest.mark.parametrize("tinted", [False, True])
def test_grey_in_three_channels_is_known(tinted: bool) -> None:
    grey = np.repeat(np.arange(200, dtype=np.uint8).reshape(10, 20, 1), 3, axis=2)
    grey[3, 4, 2] += tinted
    assert decode(file(Image.fromarray(grey))).grey != tinted


# --- EXIF


def block(*entries: tuple[int, int, int, bytes], following: int = 0) -> bytes:
    """An EXIF block of one directory: (tag, type, count, value or offset)."""
    body = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + struct.pack("<I", following)


ASIDE = (ExifTags.Base.Orientation, 3, 1, b"\6")
FAR = struct.pack("<I", 999999)
BLOCKS = {
    "whole": block(ASIDE),
    "LONG": block((ExifTags.Base.Orientation, 4, 1, b"\6")),
    "text in ResolutionUnit": block(ASIDE, (ExifTags.Base.ResolutionUnit, 2, 2, b"x")),
    "text in XResolution": block(ASIDE, (ExifTags.Base.XResolution, 2, 4, b"abc")),
    "no text in XResolution": block(ASIDE, (ExifTags.Base.XResolution, 2, 1, b""), (0x128, 3, 1, b"\2")),
    "XResolution outside": block(ASIDE, (ExifTags.Base.XResolution, 5, 1, FAR)),
    "place outside": block(ASIDE, (ExifTags.IFD.GPSInfo, 4, 1, FAR)),
    "camera outside": block(ASIDE, (ExifTags.IFD.Exif, 4, 1, FAR)),
    "camera in itself": block(ASIDE, (ExifTags.IFD.Exif, 4, 1, b"\x08")),
    "text as a place": block(ASIDE, (ExifTags.IFD.GPSInfo, 2, 4, b"abc")),
    "unknown type": block(ASIDE, (0x9999, 99, 1, b"abcd")),
    "huge count": block(ASIDE, (ExifTags.Base.Make, 2, 2**31, b"\x08")),
    "thumbnail outside": block(ASIDE, following=999999),
    "cut": block(ASIDE, (ExifTags.Base.Make, 2, 4, b"abc"))[:24],
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", ["JPEG", "JPEG without JFIF", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of damaged EXIF
def test_no_damage_in_exif_turns_an_image(photo: Image.Image, kind: str, name: str) -> None:
    data = file(photo, kind.split()[0], quality=100)
    if kind == "PNG":
        data = with_chunks(data, chunk(b"eXIf", BLOCKS[name]))
    elif kind == "WEBP":
        data = file(photo, kind, quality=100, exif=b"Exif\0\0" + BLOCKS[name])
    else:
        segment = b"\xff\xe1" + struct.pack(">H", 8 + len(BLOCKS[name])) + b"Exif\0\0" + BLOCKS[name]
        data = data[:2] + segment + data[2 if kind == "JPEG" else 20 :]
    assert open_header(data).size == (40, 50)
    decoded = decode(data)
    assert np.abs(decoded.rgb.astype(int) - np.rot90(np.asarray(photo), -1)).mean() < 12


def test_a_tag_that_cannot_be_written_is_dropped_and_the_others_kept(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.XResolution] = "maker", 300.0
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.5
    written = bytearray(exif.tobytes())
    entry = struct.pack(">HH", ExifTags.Base.XResolution, 5)
    assert written.count(entry) == 1
    written[written.index(entry) + 3] = 2  # text
    decoded = decode(with_chunks(file(photo), chunk(b"eXIf", bytes(written).removeprefix(b"Exif\0\0"))))
    exif = Image.Exif()
    exif.load(decoded.exif)
    assert exif[ExifTags.Base.Make] == "maker" and ExifTags.Base.XResolution not in exif
    assert exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] == 0.5
    assert decoded.warnings == ("EXIF data that cannot be read are left out: XResolution",)


def test_exif_that_stops_pillow_does_not_stop_an_avif(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.XResolution] = 6, 300.0
    data = bytearray(file(photo, "AVIF", quality=100, subsampling="4:4:4", exif=exif.tobytes()))
    entry = struct.pack(">HH", ExifTags.Base.XResolution, 5)
    assert data.count(entry) == 1
    data[data.index(entry) + 3] = 2  # text
    assert open_header(bytes(data)).size == (40, 50)
    decoded = decode(bytes(data))
    assert np.abs(decoded.rgb.astype(int) - np.rot90(np.asarray(photo), -1)).mean() < 2
    assert "EXIF data that cannot be read are left out" in decoded.warnings[0]


@pytest.mark.parametrize("depth", [8, 16])
def test_xmp_turns_a_tiff_as_it_turns_a_jpeg(rng: np.random.Generator, depth: int) -> None:
    pixels = rng.integers(0, 2**depth, (6, 9, 3)).astype(f"uint{depth}")
    packet = b'<rdf tiff:Orientation="6"/>'
    data = tiff((pixels, {"photometric": "rgb", "extratags": [(700, 1, len(packet), packet, True)]}))
    checked = []
    np.testing.assert_array_equal(decode(data, lambda *size: checked.append(size)).rgb, np.rot90(pixels, -1))
    assert checked == [(6, 9)]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("layout", ["straight", "premultiplied", "planes"])
def test_grey_with_alpha_in_a_tiff(depth: int, layout: str) -> None:
    top = 2**depth - 1
    grey = np.linspace(0, top, 60).round().reshape(6, 10).astype(f"uint{depth}")
    alpha = np.full_like(grey, top // 2 + 1)
    stored = (grey.astype(np.uint32) * alpha // top).astype(grey.dtype) if layout == "premultiplied" else grey
    options = {
        "photometric": "minisblack",
        "extrasamples": ["assocalpha" if layout == "premultiplied" else "unassalpha"],
    }
    layers = np.stack([stored, alpha], axis=0 if layout == "planes" else 2)
    decoded = decode(tiff((layers, {**options, "planarconfig": "separate" if layout == "planes" else "contig"})))
    assert decoded.grey and decoded.alpha is not None
    np.testing.assert_array_equal(decoded.alpha, alpha)
    assert np.abs(decoded.rgb[..., 0].astype(int) - grey).max() <= 2 * (layout == "premultiplied")


@pytest.mark.parametrize(
    ("number", "kind"),
    [(3, "lossless"), (5, "hierarchical"), (6, "hierarchical"), (7, "hierarchical"), (11, "lossless"), (55, "JPEG-LS")],
)
def test_a_kind_of_jpeg_that_decoders_do_not_read_is_named(number: int, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue().replace(b"\xff\xc0\0\x11\x08", bytes([0xFF, 0xC0 + number, 0, 17, 12]), 1)  # of 12 bits
    with pytest.raises(ValueError, match=f"this is a {kind}"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (imagecodecs.jpegls_encode(np.zeros((4, 4), np.uint8)), "this is a JPEG-LS"),
        (imagecodecs.jpeg8_encode(np.zeros((4, 4), np.uint16), lossless=True, bitspersample=16), "a lossless JPEG"),
    ],
)
def test_a_jpeg_of_a_rare_kind_is_named(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(data)


# --- JPEG XL


def jxl_box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", 8 + len(body)) + name + body


@pytest.mark.parametrize("packed", [False, True])
def test_exif_of_a_jpeg_xl_is_kept_without_its_orientation(photo: Image.Image, packed: bool) -> None:
    """The codestream has the orientation that counts."""
    stream = imagecodecs.jpegxl_encode(np.asarray(photo), lossless=True, usecontainer=False)
    body = bytes(4) + block(ASIDE, (ExifTags.Base.Make, 2, 4, b"abc"), (ExifTags.Base.Rating, 3, 1, b"\5"))
    box = jxl_box(b"brob", b"Exif" + imagecodecs.brotli_encode(body)) if packed else jxl_box(b"Exif", body)
    data = b"\0\0\0\x0cJXL \r\n\x87\n" + jxl_box(b"ftyp", b"jxl \0\0\0\0jxl ") + box + jxl_box(b"jxlc", stream)
    assert open_header(data).size == photo.size
    decoded = decode(data)
    np.testing.assert_array_equal(decoded.rgb, np.asarray(photo))
    exif = Image.Exif()
    exif.load(decoded.exif)
    assert exif[ExifTags.Base.Make] == "abc" and ExifTags.Base.Orientation not in exif
    assert exif[ExifTags.Base.Rating] == 5


def test_a_cut_jpeg_xl_and_one_that_is_not_read(photo: Image.Image) -> None:
    data = (FOLDER / "cjxl-rgba-16.jxl").read_bytes()
    for length in (2, 12, 300, len(data) - 20):
        with pytest.raises(ValueError, match=r"damaged|not an image"):
            decode(data[:length])
    floats = imagecodecs.jpegxl_encode(np.asarray(photo).astype(np.float32) / 255, lossless=True)
    with pytest.raises(ValueError, match="floating-point JPEG XL, which is not supported: save it with 16 bits"):
        decode(floats)
    frames = imagecodecs.jpegxl_encode(np.stack([np.asarray(photo)] * 2), lossless=True, photometric="rgb")
    with pytest.raises(ValueError, match="animated JPEG XL; send one still image"):
        decode(frames)


def test_premultiplied_colours_are_divided() -> None:
    alpha = np.array([[0, 1, 128, 255]], np.uint8)
    colours = np.repeat(np.array([[0, 1, 64, 200]], np.uint8)[..., None], 3, axis=2)
    assert convert.divided(colours, alpha)[0, :, 0].tolist() == [0, 255, 128, 200]
