"""Decoding and encoding of image files: formats, limits, orientation, alpha, profiles, metadata."""

from __future__ import annotations

import io
import itertools
import os
import re
import resource
import struct
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
import scipy.ndimage
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin

from seesr.images import png, png_chunks, write
from seesr.images.convert import divided, equal_channels, to_srgb
from seesr.images.formats import FORMATS
from seesr.images.image_data import STRIP, ImageData, fill_hidden, pad, resize, to_uint8
from seesr.images.kinds import brands, media_type, recognise
from seesr.images.limits import check_input
from seesr.images.mask import check_aspect, read_mask
from seesr.images.read import decode, from_pil, read_file, read_upload
from seesr.images.record import read_record
from seesr.images.write import encode, pack, save


def file(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def random_image(rng: np.random.Generator, *shape: int) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"\xff\xd8\xff\xe0" + bytes(16), "the JPEG file is damaged"),
        (b"GIF89a" + bytes(40), "not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypisom" + bytes(40), "a video (MP4"),
        (b"\0\0\0\x14ftypqt  " + bytes(40), "a video (MP4 or QuickTime)"),
        (b"RIFF\0\0\0\0AVI LIST", "a video (AVI)"),
        (b"\x1aE\xdf\xa3" + bytes(40), "a video (WebM"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"8BPS" + bytes(40), "a Photoshop document"),
    ],
)
def test_what_it_is_instead_is_said(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"this is {message}")) as caught:
        decode(data)
    assert str(caught.value).endswith("use JPEG, PNG, WebP, AVIF, TIFF, HEIC, JPEG XL")


def test_brands_are_those_of_the_first_box_and_no_more() -> None:
    box = b"ftypmif1" + bytes(4) + b"avifmiafxxxx"
    assert brands(b"\0\0\0\x1c" + box + b"heic") == {b"mif1", b"avif", b"miaf", b"xxxx"}
    long = b"\x7f\0\0\0" + box + b"a" * 4000 + b"heic"  # says that it has gigabytes
    assert brands(long) == {b"mif1", b"avif", b"miaf", b"xxxx", b"aaaa"}
    assert brands(b"\0\0\0\x1cmoov" + bytes(20)) == set()


@pytest.mark.parametrize(("comment", "known"), [(900, True), (2000, False)])
def test_a_drawing_begins_with_its_element_or_with_xml(comment: int, known: bool) -> None:
    drawing = b"\xef\xbb\xbf \n<?xml version='1.0'?><!--" + b" " * comment + b"--><svg/>"
    assert recognise(drawing)[0] == ("an SVG drawing" if known else "")
    assert recognise(b"<?xml version='1.0'?><html/>")[0] == ""


def test_sound_is_no_video() -> None:
    assert recognise(b"RIFF\0\0\0\0WAVEfmt ")[0] == recognise(b"xxxx\0\0\0\0AVI LIST")[0] == ""


PHONE = [
    ("AVIF", {"quality": 100, "subsampling": "4:4:4"}),
    ("HEIF", {"quality": -1, "chroma": 444}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "tiff_deflate"}),
]


@pytest.fixture
def ramps() -> np.ndarray:
    """[40, 60, 4]: smooth, so that lossy files can be compared."""
    y, x = np.mgrid[:40, :60]
    return np.stack([x * 4, y * 6, (x + y) * 2, x * 4], 2).astype(np.uint8)


@pytest.mark.parametrize(("kind", "options"), PHONE)
@pytest.mark.parametrize("orientation", [1, 6])
def test_files_of_phones_and_cameras(ramps: np.ndarray, kind: str, options: dict[str, Any], orientation: int) -> None:
    pillow_heif.register_heif_opener()
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    exif[ExifTags.Base.Orientation] = orientation  # AVIF and HEIC turn in the container, as phones do
    read = decode(file(Image.fromarray(ramps), kind, exif=exif.tobytes(), icc_profile=icc, **options))
    expected = np.rot90(ramps, -1) if orientation == 6 else ramps
    assert read.rgb.shape == expected[..., :3].shape and read.alpha is not None
    assert np.abs(read.rgb.astype(int) - expected[..., :3]).max() <= 3
    np.testing.assert_array_equal(read.alpha, expected[..., 3])
    assert read.icc == icc
    written = Image.open(io.BytesIO(encode(read, "png", 95))).getexif()
    assert written[ExifTags.Base.Make] == "maker"
    assert written.keys() <= {ExifTags.Base.Make, ExifTags.Base.Orientation, ExifTags.IFD.Exif}
    assert written.get(ExifTags.Base.Orientation, 1) == 1


@pytest.mark.parametrize("compression", [1, 5, 8])  # none, LZW, Deflate
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_of_a_tiff_are_kept(rng: np.random.Generator, compression: int, channels: int) -> None:
    deep = rng.integers(0, 65536, (9, 11, channels), dtype=np.uint16)
    stored = deep if channels == 1 else deep[..., [2, 1, 0, 3][:channels]]
    _, data = cv2.imencode(".tiff", stored, [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    read = decode(data.tobytes())
    np.testing.assert_array_equal(read.rgb, deep[..., :3] if channels > 1 else np.repeat(deep, 3, 2))
    assert (read.alpha is not None) == (channels == 4)


def tiff(pixels: np.ndarray, photometric: str = "rgb", **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, photometric=photometric, **options)
    return buffer.getvalue()


def test_twelve_bits_of_grey_fill_the_range() -> None:
    grey = np.linspace(0, 4095, 60).astype(np.uint16)
    first, second = grey[::2], grey[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    tags = {256: 10, 257: 6, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 6, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    read = decode(b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + directory).rgb
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read[..., 0].ravel(), grey.astype(int) * 65535 // 4095)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_miniswhite_tiffs_are_inverted(ramps: np.ndarray, depth: type) -> None:
    grey = ramps[..., 0].astype(depth) * np.iinfo(depth).max // 255
    read = decode(tiff(grey, "miniswhite")).rgb
    np.testing.assert_array_equal(read, np.repeat((np.iinfo(depth).max - grey)[..., None], 3, axis=2))


def test_premultiplied_colors_of_a_deep_tiff_are_converted(ramps: np.ndarray) -> None:
    rgb, half = ramps[..., :3].astype(np.uint16) * 257, np.full(ramps.shape[:2], 32768, np.uint16)
    read = decode(tiff(np.dstack([rgb // 2, half]), extrasamples=["assocalpha"]))
    assert read.alpha is not None and np.abs(read.rgb.astype(int) - rgb).max() <= 2 and read.rgb.dtype == np.uint16
    decoded = decode(tiff(np.dstack([rgb, half]), extrasamples=["unassalpha"]))
    np.testing.assert_array_equal(decoded.rgb, rgb)


def test_a_fourth_channel_that_is_not_alpha_is_ignored(ramps: np.ndarray) -> None:
    deep = ramps.astype(np.uint16) * 257
    read = decode(tiff(deep, extrasamples=["unspecified"]))
    assert read.alpha is None
    np.testing.assert_array_equal(read.rgb, deep[..., :3])


def test_deep_cmyk_is_read_with_eight_bits(ramps: np.ndarray) -> None:
    shallow, deep = (decode(tiff(ink, "separated")) for ink in (ramps, ramps.astype(np.uint16) * 257))
    np.testing.assert_array_equal(deep.rgb, shallow.rgb)
    assert (shallow.warnings, deep.warnings) == ((), ("16 bits per colour are reduced to 8",))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_colours_that_lie_one_after_the_other_are_read(ramps: np.ndarray, depth: type) -> None:
    colours = ramps[..., :3].astype(depth) * (np.iinfo(depth).max // 255)
    planes = np.ascontiguousarray(np.moveaxis(colours, 2, 0))
    np.testing.assert_array_equal(decode(tiff(planes, planarconfig="separate")).rgb, colours)


def test_several_pages_are_refused_by_their_name(rng: np.random.Generator) -> None:
    image = random_image(rng, 9, 9, 3)
    pillow_heif.register_heif_opener()
    for kind, message in (("TIFF", "2 pages"), ("AVIF", "2 frames"), ("WEBP", "2 frames")):
        with pytest.raises(ValueError, match=f"the image has {message}; send one still image"):
            decode(file(image, kind, save_all=True, append_images=[random_image(rng, 9, 9, 3)]))


def test_without_its_package_heic_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match=r"this is HEIC, which needs a package: pip install -e '.\[heic\]'"):
        decode(b"\0\0\0\x18ftypheic" + bytes(40))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_cut_file_is_refused(rng: np.random.Generator, kind: str, share: float) -> None:
    pillow_heif.register_heif_opener()
    data = file(random_image(rng, 80, 90, 3), kind)
    with pytest.raises(ValueError, match=r"damaged|not an image"):
        decode(data[: int(len(data) * share)])


def test_a_wrong_checksum_inside_a_png_is_refused(rng: np.random.Generator) -> None:
    data = bytearray(file(random_image(rng, 80, 90, 3)))
    data[len(data) // 2] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        decode(data)


def test_frames_and_floats_are_refused(rng: np.random.Generator) -> None:
    frames = [random_image(rng, 8, 8, 3) for _ in range(3)]
    with pytest.raises(ValueError, match="3 frames"):
        decode(file(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    with pytest.raises(ValueError, match="mode F"):
        from_pil(Image.new("F", (4, 4)))


def test_a_header_over_the_limit_is_refused_before_decoding() -> None:
    whole = file(Image.new("1", (10, 10)))
    claim = (60000).to_bytes(4, "big") * 2
    header = b"IHDR" + claim + whole[24:29]
    data = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    with pytest.raises(ValueError, match="far over the limit of 67.1 MP"):
        decode(data)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_gives_its_colours(rng: np.random.Generator, mode: str) -> None:
    image = random_image(rng, 12, 10, 3).convert(mode)
    read = decode(file(image, "JPEG" if mode == "CMYK" else "PNG", **({"quality": 100} if mode == "CMYK" else {})))
    if mode != "CMYK":
        np.testing.assert_array_equal(read.rgb, np.asarray(image.convert("RGB")))
    assert read.rgb.shape == (12, 10, 3)


def test_sixteen_bits_are_kept(rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (9, 11, 3), dtype=np.uint16)
    done, buffer = cv2.imencode(".png", deep)
    assert done
    np.testing.assert_array_equal(decode(buffer.tobytes()).rgb, deep[..., ::-1])
    grey = Image.fromarray(deep[..., 0])
    np.testing.assert_array_equal(decode(file(grey)).rgb[..., 2], deep[..., 0])
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16)
    assert len(np.unique(resize(ramp[None], (8192, 2)))) > 4096


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(rng: np.random.Generator, orientation: int, tmp_path: Path) -> None:
    pixels = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    data = file(Image.fromarray(pixels), exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    read = decode(data)
    np.testing.assert_array_equal(read.rgb, expected)
    save(encode(read, "png", 95), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as written:
        assert written.getexif().get(0x0112, 1) == 1
        assert written.getexif()[0x010F] == "maker"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_upright_size_is_checked(kind: str, orientation: int) -> None:
    pillow_heif.register_heif_opener()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    checked = []
    read = decode(file(Image.new("RGB", (40, 30)), kind, exif=exif.tobytes()), lambda *size: checked.append(size))
    assert checked == [read.size] == [(30, 40) if orientation > 4 else (40, 30)]


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_profile_resolution_and_alpha_come_back(rng: np.random.Generator, kind: str, tmp_path: Path) -> None:
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
    read = decode(file(Image.fromarray(pixels), icc_profile=icc, dpi=(300, 300)))
    save(encode(read, kind, 95), tmp_path / f"x.{kind}")
    with Image.open(tmp_path / f"x.{kind}") as written:
        assert written.info["icc_profile"] == icc
        assert written.size == (30, 20)
        if kind != "webp":  # the format has no resolution
            assert written.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        if kind == "png":
            np.testing.assert_array_equal(np.asarray(written), pixels)
        else:
            assert written.mode == {"webp": "RGBA", "jpg": "RGB"}[kind]


def test_a_sixteen_bit_png_is_written_and_read_back(rng: np.random.Generator, tmp_path: Path) -> None:
    deep = rng.integers(0, 65536, (9, 11, 3), dtype=np.uint16)
    alpha = rng.integers(0, 65536, (9, 11), dtype=np.uint16)
    save(encode(ImageData(deep, alpha), "png", 95), tmp_path / "x.png")
    read = decode(read_file(tmp_path / "x.png"))
    np.testing.assert_array_equal(read.rgb, deep)
    np.testing.assert_array_equal(read.alpha, alpha)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_quality_moves_the_size(rng: np.random.Generator) -> None:
    image = ImageData(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for kind in ("jpg", "webp"):
        assert len(encode(image, kind, 30)) < len(encode(image, kind, 95))


def test_hidden_colours_do_not_bleed() -> None:
    rgb = np.zeros((20, 20, 3), np.uint8)
    rgb[:, 10:] = (255, 0, 255)  # hidden
    rgb[:, :10] = (10, 200, 30)
    alpha = np.zeros((20, 20), np.uint8)
    alpha[:, :10] = 255
    assert (fill_hidden(rgb, alpha) == (10, 200, 30)).all()


def test_hidden_pixels_take_the_nearest_colour_a_strip_at_a_time(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    rgb, alpha = rng.integers(0, 256, (400, 90, 3), dtype=np.uint8), np.zeros((400, 90), np.uint8)
    alpha[150:170, 20:40] = alpha[160, 80] = alpha[168, 44] = 255
    at_once = fill_hidden(rgb, alpha)
    requested = []
    whole = scipy.ndimage.distance_transform_edt
    monkeypatch.setattr("seesr.images.image_data.STRIP", 16 * 90)
    monkeypatch.setattr("seesr.images.image_data.NEAR", 24)
    monkeypatch.setattr(
        scipy.ndimage, "distance_transform_edt", lambda a, **k: (requested.append(len(a)), whole(a, **k))[1]
    )
    filled = fill_hidden(rgb, alpha)
    assert len(requested) >= 2 and max(requested) <= 24 + 2 * 24
    near = whole(alpha == 0) <= 24
    np.testing.assert_array_equal(filled[near], at_once[near])
    np.testing.assert_array_equal(filled[alpha > 0], rgb[alpha > 0])
    visible = {tuple(colour) for colour in rgb[alpha > 0]}
    assert {tuple(colour) for colour in filled.reshape(-1, 3)} <= visible
    for row in (0, 60, 119):  # far away: the nearest row of a strip that has one
        np.testing.assert_array_equal(filled[row], filled[120])
    for row in (216, 300, 399):
        np.testing.assert_array_equal(filled[row], filled[215])
    assert (filled[120] != filled[143]).any() and (filled[192] != filled[215]).any()


@pytest.mark.parametrize("size", [(32768, 1024), (6000, 5600), (1024, 32768)])
def test_no_call_fills_more_than_some_megapixels(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image can be cancelled between them."""
    requested = []

    def nowhere(hidden: np.ndarray, **_: object) -> np.ndarray:
        requested.append(hidden.size)
        return np.zeros((2, *hidden.shape), np.uint16)

    monkeypatch.setattr(scipy.ndimage, "distance_transform_edt", nowhere)
    alpha = np.zeros(size[::-1], np.uint8)
    alpha[:, :5] = 255
    fill_hidden(np.zeros((*alpha.shape, 3), np.uint8), alpha)
    assert sum(requested) >= alpha.size and max(requested) <= 2 * STRIP


@pytest.mark.parametrize(("dtype", "maximum"), [(np.uint8, 3), (np.uint16, 1023)])
def test_what_is_hidden_has_a_64th_of_full_opacity_at_most(dtype: type, maximum: int) -> None:
    rgb = np.array([[[9, 9, 9], [5, 6, 7], [1, 2, 3]]], dtype)
    full = np.iinfo(dtype).max
    for alpha, hidden in ((maximum, True), (maximum + 1, False)):
        filled = ImageData(rgb, np.array([[full, full, alpha]], dtype)).visible
        assert (filled[0, 2] == (rgb[0, 1] if hidden else rgb[0, 2])).all()
    nothing = ImageData(rgb, np.zeros((1, 3), dtype))
    assert nothing.visible is rgb  # nobody sees any


def test_sixteen_bits_become_the_nearest_eight() -> None:
    deep = np.arange(65536, dtype=np.uint16)
    np.testing.assert_array_equal(to_uint8(deep), np.round(deep / 257).astype(np.uint8))
    assert to_uint8(np.zeros((2, 2), np.uint8)).dtype == np.uint8


def test_sixteen_bits_are_upscaled_without_loss_or_wrapping(rng: np.random.Generator) -> None:
    edge = np.zeros((8, 9), np.uint16)
    edge[:, 4:] = 65535  # bicubic goes beyond both ends here
    noise = rng.integers(0, 65536, (8, 9)).astype(np.uint16)
    for pixels in (edge, noise):
        floats = np.asarray(Image.fromarray(pixels.astype(np.float32)).resize((27, 16), Image.Resampling.BICUBIC))
        expected = floats.round().clip(0, 65535).astype(np.uint16)
        np.testing.assert_array_equal(resize(pixels, (27, 16)), expected)
        colours = np.dstack([pixels, 65535 - pixels, pixels])
        assert resize(colours, (27, 16)).shape == (16, 27, 3)
        np.testing.assert_array_equal(resize(colours, (27, 16))[..., 2], expected)


def test_metadata_is_copied_to_the_output(rng: np.random.Generator) -> None:
    alpha = rng.integers(0, 256, (4, 5), dtype=np.uint8)
    source = ImageData(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), alpha, b"icc", b"exif", (72.0, 72.0))
    rgb = np.zeros((8, 10, 3), np.uint8)
    edited = source.with_pixels(rgb, {"seed": 1}, keep_exif=True)
    assert (edited.icc, edited.exif, edited.dpi, edited.record) == (b"icc", b"exif", (72.0, 72.0), {"seed": 1})
    assert edited.rgb is rgb and edited.size == (10, 8)
    np.testing.assert_array_equal(edited.alpha, resize(alpha, (10, 8), Image.Resampling.LANCZOS))
    assert source.with_pixels(rgb, {}, keep_exif=False).exif is None
    assert ImageData(source.rgb).with_pixels(rgb, {}, keep_exif=True).alpha is None


def test_padding_mirrors_and_keeps_the_image() -> None:
    for height, width in ((1, 1), (1, 70), (64, 64), (65, 10)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        padded = pad(pixels, 16, 64)
        np.testing.assert_array_equal(padded[:height, :width], pixels)
        assert padded.shape[0] >= 64 and padded.shape[0] % 16 == 0
        assert set(np.unique(padded)) <= set(np.unique(pixels))


def test_a_full_or_read_only_disk_is_a_clear_error_and_leaves_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    image = ImageData(rng.integers(0, 256, (90, 90, 3), dtype=np.uint8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RuntimeError, match="cannot be written") as caught:
            save(encode(image, "png", 95), tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(tmp_path) not in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="cannot be written"):
        save(encode(image, "png", 95), Path("/proc/a.png"))


@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_the_record_is_in_the_file(kind: str, tmp_path: Path, rng: np.random.Generator) -> None:
    record = {"version": "1", "settings": {"seed": 5, "user_prompt": '<a> & \u00fc \U0001f600 "x"\n'}}
    image = ImageData(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), record=record)
    save(encode(image, kind, 90), tmp_path / "a")
    assert read_record(tmp_path / "a") == record
    save(encode(ImageData(image.rgb), kind, 90), tmp_path / "b")
    with pytest.raises(ValueError, match="no settings record"):
        read_record(tmp_path / "b")


def test_several_files_are_one_zip_with_the_record_of_the_first(tmp_path: Path, rng: np.random.Generator) -> None:
    image = ImageData(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), record={"settings": {"seed": 5}})
    files = {"b.png": encode(image, "png", 90), "a.png": b"another"}
    path = tmp_path / "x.ZIP"
    save(pack(files), path)
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == files
    assert read_record(path) == image.record and pack(files) == path.read_bytes()
    for damaged in (b"no zip", pack({})):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no settings record"):
            read_record(path)
    with pytest.raises(RuntimeError, match="Is a directory|exists"):
        save(b"", tmp_path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_strips_join(dtype: type, channels: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(png, "STRIP", 16)
    pixels = rng.integers(0, np.iinfo(dtype).max, (70, 41, 4)).astype(dtype)
    rgb = np.repeat(pixels[..., :1], 3, axis=2) if channels < 3 else pixels[..., :3]
    alpha = pixels[..., 3] if channels in (2, 4) else None
    data = png.encode_png(ImageData(np.ascontiguousarray(rgb), alpha, one_channel=channels < 3))
    assert data[25] == {1: 0, 2: 4, 3: 2, 4: 6}[channels]  # the color type in IHDR
    result = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert result.dtype == dtype
    if channels == 1:
        np.testing.assert_array_equal(result, rgb[..., 0])
    else:
        np.testing.assert_array_equal(result[..., 2::-1], rgb)
    if channels in (2, 4):
        np.testing.assert_array_equal(result[..., 3], pixels[..., 3])
    with Image.open(io.BytesIO(data)) as opened:
        opened.verify()
    packed = b"".join(body for name, body, _ in png_chunks.chunks(data) if name == b"IDAT")
    assert len(zlib.decompress(packed)) == 70 * (1 + 41 * channels * pixels.itemsize)  # with its checksum


def test_only_a_regular_file_below_the_folder_is_opened(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a").write_bytes(b"x")
    (inside / "link").symlink_to(inside / "a")
    (inside / "linked").symlink_to(outside)
    os.mkfifo(inside / "pipe")
    assert read_upload(inside / "a", inside) == b"x"
    for path in ("link", "pipe", "absent", "linked/a", "../out/a", "."):
        with pytest.raises(ValueError, match="must be an uploaded file") as caught:
            read_upload(inside / path, inside)
        assert str(tmp_path) not in str(caught.value)


def grey_profile(gamma: float) -> bytes:
    """A grey ICC profile whose curve is a power."""
    from PIL import ImageCms as cms

    head = bytearray(cms.ImageCmsProfile(cms.createProfile("sRGB")).tobytes()[:128])
    head[16:20] = b"GRAY"
    white = b"XYZ \0\0\0\0" + b"".join(round(v * 65536).to_bytes(4, "big") for v in (0.9642, 1, 0.8249))
    curve = b"curv\0\0\0\0" + (1).to_bytes(4, "big") + round(gamma * 256).to_bytes(2, "big") + b"\0\0"
    name = b"desc\0\0\0\0" + (5).to_bytes(4, "big") + b"grey\0" + bytes(78)
    entries, body, offset = b"", b"", 128 + 4 + 3 * 12
    for tag, data in ((b"desc", name), (b"wtpt", white), (b"kTRC", curve)):
        data += bytes(-len(data) % 4)
        entries += tag + (offset + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    profile = bytes(head) + (3).to_bytes(4, "big") + entries + body
    return len(profile).to_bytes(4, "big") + profile[4:]


@pytest.mark.parametrize("deep", [False, True])
def test_a_grey_profile_is_applied(deep: bool) -> None:
    """Linear grey 64 of 255 is shown as 137."""
    values = np.arange(256, dtype=np.uint16)[None].repeat(2, axis=0)
    image = Image.fromarray(values * 257) if deep else Image.fromarray(values.astype(np.uint8))
    read = decode(file(image, icc_profile=grey_profile(1.0)))
    assert read.icc is None and read.rgb.dtype == (np.uint16 if deep else np.uint8)
    linear = np.arange(256) / 255
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    seen = read.rgb[0].astype(float) / (257 if deep else 1)
    assert np.abs(seen - expected[:, None]).max() <= 1 and abs(seen[64, 0] - 137) <= 1
    assert (seen[[0, 255]] == [[0], [255]]).all()


def cmyk_profile() -> bytes:
    """A printer whose inks are all grey: the cells of its table hold L alone (ICC.1:2001, 6.5.8, lut8Type)."""
    grid = itertools.product((0, 1), repeat=4)  # cyan changes slowest
    cells = bytes(v for inks in grid for v in (round(255 * (1 - 0.2 * sum(inks[:3])) * (1 - inks[3])), 128, 128))
    unity = struct.pack(">9i", *(65536 * int(i % 4 == 0) for i in range(9)))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + unity + 4 * ramp + cells + 3 * ramp
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    offset = 128 + 4 + 2 * 12
    table += bytes(-len(table) % 4)
    tags = struct.pack(">I4sII4sII", 2, b"A2B0", offset, len(table), b"wtpt", offset + len(table), len(white))
    size = offset + len(table) + len(white)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ") + bytes(12) + b"acsp"
    head += bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + tags + table + white


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_a_cmyk_profile_is_applied(kind: str) -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    plain = decode(file(cyan, kind)).rgb[4, 4].astype(int)
    assert plain[2] > plain[0] + 100  # cyan
    read = decode(file(cyan, kind, icc_profile=cmyk_profile()))
    shown = read.rgb[4, 4].astype(int)
    assert np.ptp(shown) <= 2 and abs(shown.mean() - 198) <= 3, shown  # L = 80
    assert read.icc is None


def test_a_file_of_another_size_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    image = ImageData(np.zeros((4, 6, 3), np.uint8))
    monkeypatch.setattr(write, "encode_png", lambda values: file(Image.new("RGB", (6, 5))))
    with pytest.raises(RuntimeError, match=r"the written file has \(6, 5\) pixels instead of \(6, 4\)"):
        encode(image, "png", 95)


@pytest.mark.parametrize(
    ("icc", "reason"), [(b"garbage" * 30, "cannot be read"), ("CMYK", "is for CMYK"), ("GRAY", "is for GRAY")]
)
def test_an_unusable_profile_is_dropped_with_a_warning(
    icc: bytes | str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    if icc == "CMYK":
        profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
        profile[16:20] = b"CMYK"
        icc = bytes(profile)
    elif icc == "GRAY":  # of an image in colour
        icc = grey_profile(1.0)
    read = decode(file(Image.new("RGB", (4, 4), (90, 120, 150)), icc_profile=icc))
    assert read.icc is None and f"{reason} and is left out: the image is read as sRGB" in caplog.text
    assert (read.rgb == (90, 120, 150)).all()


def test_a_16_bit_grey_png_keeps_its_invisible_value() -> None:
    grey = np.arange(0, 60000, 1000, dtype=np.uint16).reshape(6, 10)
    data = file(Image.fromarray(grey), transparency=5000)
    decoded = decode(data)
    assert decoded.alpha is not None
    np.testing.assert_array_equal(decoded.alpha, np.where(grey == 5000, 0, 65535))
    assert decoded.rgb.dtype == np.uint16


@pytest.mark.parametrize(
    ("bits", "row"), [(1, b"\0\x60"), (2, b"\0\x1b"), (4, b"\0\x01\x2f"), (8, b"\0\x00\x01\x02\x03")]
)
@pytest.mark.parametrize("kind", ["grey", "palette"])
def test_a_png_of_few_bits_keeps_its_invisible_value(bits: int, row: bytes, kind: str) -> None:
    clear = 1 if bits == 1 else 2
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 3, bits, 0 if kind == "grey" else 3, 0, 0, 0))]
    chunks += [(b"PLTE", bytes(range(3 * min(16, 2**bits))))] if kind == "palette" else []
    chunks += [(b"tRNS", struct.pack(">H", clear) if kind == "grey" else b"\xff\xff\xff"[:clear] + b"\0")]
    chunks += [(b"IDAT", zlib.compress(row * 3)), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    decoded = decode(b"\x89PNG\r\n\x1a\n" + data)
    values = {1: [0, 1, 1, 0], 2: [0, 1, 2, 3], 4: [0, 1, 2, 15], 8: [0, 1, 2, 3]}[bits]
    if kind == "grey":
        assert decoded.rgb[0, :, 0].tolist() == [value * 255 // (2**bits - 1) for value in values]
    assert decoded.alpha is not None
    assert (decoded.alpha[2] == 0).tolist() == [value == clear for value in values]


def test_a_16_bit_colour_png_keeps_its_invisible_colour(rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (12, 10, 3), dtype=np.uint16)
    deep[2:5] = 1000, 2000, 3000
    data = cv2.imencode(".png", deep[..., ::-1])[1].tobytes()
    body = b"tRNS" + struct.pack(">HHH", 1000, 2000, 3000)
    data = data[:33] + struct.pack(">I", 6) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]
    decoded = decode(data)
    np.testing.assert_array_equal(decoded.rgb, deep)
    assert decoded.alpha is not None
    np.testing.assert_array_equal(decoded.alpha[:, 0] == 0, [2 <= row < 5 for row in range(12)])


def test_only_the_original_dimensions_are_removed_from_exif() -> None:
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    exif.get_ifd(0x8769).update({0xA002: 640, 0xA003: 480, 0x829A: 0.5})
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG", exif=exif)
    read = Image.Exif()
    read.load(decode(buffer.getvalue()).exif)
    assert read[0x0110] == "a camera" and set(read.get_ifd(0x8769)) == {0x829A}


def test_exif_that_is_too_long_for_a_jpeg_is_dropped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    block = exif.tobytes()
    for length, expected in ((65533, True), (65534, False)):
        read = ImageData(np.zeros((6, 8, 3), np.uint8), exif=block.ljust(length, b"\0"))
        assert (ExifTags.Base.Make in Image.open(io.BytesIO(encode(read, "jpg", 95))).getexif()) == expected
        assert ("too long for JPEG" in caplog.text) != expected
        assert ExifTags.Base.Make in Image.open(io.BytesIO(encode(read, "png", 95))).getexif()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("camera", [None, "a camera"])
def test_a_resolution_for_print_is_in_every_format(kind: str, camera: str | None) -> None:
    """In the field of the format itself, where it has one, and in EXIF, beside what was there."""
    exif = Image.Exif()
    if camera is not None:
        exif.update({ExifTags.Base.Model: camera, ExifTags.Base.XResolution: 72})
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ISOSpeedRatings] = 200
    image = ImageData(np.zeros((8, 6, 3), np.uint8), exif=exif.tobytes() if camera else None, dpi=(72.0, 72.0))
    with Image.open(io.BytesIO(encode(image.with_dpi(300), kind, 90))) as written:
        tags = written.getexif()
        assert tags[ExifTags.Base.XResolution] == tags[ExifTags.Base.YResolution] == 300
        assert tags[ExifTags.Base.ResolutionUnit] == 2 and tags.get(ExifTags.Base.Model) == camera
        assert tags.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.ISOSpeedRatings) == (camera and 200)
        assert written.info.get("dpi", (300, 300)) == pytest.approx((300, 300), abs=0.01)


@pytest.mark.parametrize("dpi", [(1, 1), (65535, 1)])
def test_a_resolution_is_kept(dpi: tuple[int, int]) -> None:
    assert decode(file(Image.new("RGB", (8, 6)), "TIFF", dpi=(dpi[0], 300))).dpi == (dpi[0], 300)


@pytest.mark.parametrize("dpi", [(0, 0), (1, 0), (1, 2), (2**32 - 1, 1), (65536, 1)])
def test_an_invalid_resolution_is_dropped(dpi: tuple[int, int]) -> None:
    """Writing it would fail, after all the work."""
    tags = {282: TiffImagePlugin.IFDRational(*dpi), 283: TiffImagePlugin.IFDRational(300, 1), 296: 2}
    read = decode(file(Image.new("RGB", (8, 6)), "TIFF", tiffinfo=tags))
    assert read.dpi is None
    for kind in ("png", "webp", "jpg"):
        assert decode(encode(read, kind, 95)).size == (8, 6)


def test_the_place_and_the_camera_of_a_tiff_are_kept() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[1] = "N"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.5
    read = Image.Exif()
    read.load(decode(file(Image.new("RGB", (8, 6)), "TIFF", exif=exif.tobytes())).exif)
    assert read[ExifTags.Base.Make] == "maker"
    assert read.get_ifd(ExifTags.IFD.GPSInfo) == {1: "N"}
    assert set(read.get_ifd(ExifTags.IFD.Exif)) == {ExifTags.Base.ExposureTime}


def test_unreadable_exif_does_not_rotate_the_image(caplog: pytest.LogCaptureFixture, ramps: np.ndarray) -> None:
    read = decode(file(Image.fromarray(ramps), exif=b"Exif\0\0no directory"))
    np.testing.assert_array_equal(read.rgb, ramps[..., :3])
    assert read.exif is None and "EXIF data that cannot be read are left out: all" in caplog.text


def test_what_is_left_out_is_said(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Image.new("RGB", (8, 6), (9, 90, 200)), Image.new("RGB", (8, 6))
    with caplog.at_level("INFO"):
        decode(file(first, "JPEG"))
    assert not caplog.text
    buffer = io.BytesIO()
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    with_xmp = io.BytesIO()
    first.save(with_xmp, "JPEG", xmp=b"<x:xmpmeta/>")
    with caplog.at_level("INFO"):
        assert decode(buffer.getvalue()).rgb.mean() > 50
        decode(with_xmp.getvalue())
    assert "the first one is used" in caplog.text and "XMP data that cannot be read are left out" in caplog.text


@pytest.mark.parametrize(
    ("name", "body", "expected"),
    [
        (b"tEXt", b"Key\0a\0b", b"a\0b"), (b"tEXt", b"Key", b""), (b"zTXt", b"Key\0\0" + zlib.compress(b"a"), b"a"),
        (b"iTXt", b"Key\0\0\0en\0translated\0a\0b", b"a\0b"), (b"zTXt", b"Key\0\0a", b""),
        (b"iTXt", b"Key\0\1\0\0\0" + zlib.compress(b"a"), b"a"), (b"iTXt", b"Key\0\1\0\0\0a", b""),
    ],
)  # fmt: skip
def test_the_text_of_a_png_chunk(name: bytes, body: bytes, expected: bytes) -> None:
    assert png_chunks.text(name, body) == expected


def test_a_compressed_text_of_16_mib_is_too_long() -> None:
    for length, expected in ((2**24 - 1, 2**24 - 1), (2**24 + 1, 0)):
        assert len(png_chunks.text(b"zTXt", b"Key\0\0" + zlib.compress(bytes(length), 1))) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "HEIF"])
def test_the_media_type_of_a_file(kind: str) -> None:
    pillow_heif.register_heif_opener()
    expected = {"HEIF": "image/heic"}.get(kind, f"image/{kind.lower()}")
    assert media_type(file(Image.new("RGB", (16, 16)), kind)) == expected
    assert media_type(b"RIFF\0\0\0\0WAVEfmt ") is media_type(b"xxxx\0\0\0\0WEBPVP8 ") is media_type(b"") is None


def test_the_largest_input() -> None:
    """8192 x 8192 pixels, and 32768 on a side, as the documentation says."""
    for width, height in ((8192, 8192), (32768, 2048), (1, 32768)):
        check_input(width, height)
    with pytest.raises(ValueError, match=r"the image is 8192x8193 = 67\.1 MP; the limit is 67\.1 MP"):
        check_input(8192, 8193)
    for width, height in ((32769, 1), (1, 32769)):
        with pytest.raises(ValueError, match=f"the image is {width}x{height}; the limit is 32768 pixels on a side"):
            check_input(width, height)


def test_equal_channels(rng: np.random.Generator) -> None:
    grey = np.repeat(rng.integers(0, 255, (3, 4, 1), dtype=np.uint8), 3, axis=2)
    assert equal_channels(grey)
    for channel in range(3):
        tinted = grey.copy()
        tinted[2, 3, channel] += 1
        assert not equal_channels(tinted) and not ImageData(tinted).colorless and ImageData(grey).colorless


def test_a_crop_has_the_pixels_of_its_place(rng: np.random.Generator) -> None:
    rgb, alpha = rng.integers(0, 255, (9, 8, 3), dtype=np.uint8), rng.integers(0, 255, (9, 8), dtype=np.uint8)
    crop = ImageData(rgb, alpha).cropped(2, 3, 4, 5)
    np.testing.assert_array_equal(crop.rgb, rgb[3:8, 2:6])
    np.testing.assert_array_equal(crop.alpha, alpha[3:8, 2:6])
    assert ImageData(rgb).cropped(0, 0, 1, 1).alpha is None


@pytest.mark.parametrize(
    ("size", "expected"), [((1, 1), (64, 64)), ((64, 65), (64, 80)), ((70, 128), (80, 128)), ((96, 97), (96, 112))]
)
def test_padding_ends_at_the_next_multiple(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert pad(np.zeros((*size, 3), np.uint8), 16, 64).shape == (*expected, 3)
    pixels = np.arange(3, dtype=np.uint8).reshape(1, 3, 1).repeat(3, 2)
    assert pad(pixels, 5, 1)[0, :, 0].tolist() == [0, 1, 2, 2, 1]  # the last column is repeated


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_division_by_alpha_rounds_and_stays_in_range(depth: type) -> None:
    top = np.iinfo(depth).max
    alpha = np.array([[0, 1, 3, top // 2, top]], depth)
    colours = np.array([[[5], [0], [2], [top], [9]]], depth)
    expected = [min(top, round(5 * top)), 0, round(2 * top / 3), top, 9]
    assert divided(colours, alpha)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["LAB", "CMYK", "YCbCr", "HSV"])
def test_modes_of_pillow_without_a_profile(mode: str) -> None:
    grey = Image.new("RGB", (8, 6), (90, 90, 90)).convert(mode if mode != "LAB" else "RGB")
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        converted = ImageCms.profileToProfile(grey, *profiles, outputMode="LAB")
        assert converted is not None
        grey = converted
    warnings: list[str] = []
    assert np.abs(np.asarray(to_srgb(grey, None, warnings)).astype(int) - 90).max() <= 1
    shown = to_srgb(grey, b"no profile", warnings)
    assert np.abs(np.asarray(shown).astype(int) - 90).max() <= 1
    assert warnings == ["the colour profile cannot be used and is left out"]


def test_a_webp_whose_metadata_are_cut_is_refused() -> None:
    """The decoder would read its pixels."""
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "maker"
    data = file(Image.new("RGB", (8, 6)), "WEBP", exif=exif.tobytes())
    assert decode(data).size == (8, 6)
    with pytest.raises(ValueError, match="damaged"):
        decode(data[:-3])


@pytest.mark.parametrize(("mode", "compression"), [("1", "group4"), ("1", "group3"), ("P", None)])
def test_a_tiff_that_only_pillow_reads(rng: np.random.Generator, mode: str, compression: str | None) -> None:
    image = random_image(rng, 16, 16, 3).convert(mode)
    read = decode(file(image, "TIFF", **({"compression": compression} if compression else {})))
    np.testing.assert_array_equal(read.rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("wrong", ["nothing", "other pixels"])
def test_a_deep_png_that_two_decoders_read_differently_is_read_with_8_bits(
    rng: np.random.Generator, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = rng.integers(256, 65536, (12, 10, 3), dtype=np.uint16)
    data = cv2.imencode(".png", deep)[1].tobytes()
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None if wrong == "nothing" else deep // 2)
    read = decode(data)
    np.testing.assert_array_equal(read.rgb, (deep[..., ::-1] >> 8).astype(np.uint8))
    assert read.warnings == ("the 16 bits per colour cannot be read; 8 bits are used",)


def test_the_invisible_value_of_an_opened_png() -> None:
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10)
    with Image.open(io.BytesIO(file(Image.fromarray(grey), transparency=5))) as image:
        alpha = from_pil(image).alpha
    np.testing.assert_array_equal(alpha, np.where(grey == 5, 0, 255))


def test_transparent_parts_of_a_mask_are_black() -> None:
    grey, alpha = np.full((8, 8), 200, np.uint8), np.full((8, 8), 128, np.uint8)
    alpha[:4] = 255
    mask = read_mask(file(Image.fromarray(np.dstack([grey, alpha]))), (16, 16))
    assert set(mask[:4].ravel()) == {200} and set(mask[4:].ravel()) == {200 * 128 // 255}
    colors = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    assert abs(int(read_mask(file(Image.fromarray(colors)), (8, 8))[0, 0]) - 0.299 * 255) < 1  # BT.601


@pytest.mark.parametrize(
    ("mask", "image", "same"),
    [
        ((100, 100), (400, 400), True),
        ((1009, 1000), (400, 400), True),
        ((1011, 1000), (400, 400), False),
        ((991, 1000), (400, 400), True),
        ((989, 1000), (400, 400), False),
        ((300, 200), (30, 20), True),
        ((200, 300), (30, 20), False),
    ],
)
def test_aspects_may_differ_by_one_percent(mask: tuple[int, int], image: tuple[int, int], same: bool) -> None:
    if same:
        check_aspect(mask, image)
        return
    sizes = f"the mask is {mask[0]}x{mask[1]} and the image {image[0]}x{image[1]}: their aspect ratios differ"
    with pytest.raises(ValueError, match=sizes):
        check_aspect(mask, image)
