"""The corpus of bad and odd requests, built in code, with the expected response of each."""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pillow_heif
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from seesr.images.png import SIGNATURE, chunk

pillow_heif.register_heif_opener()
Pixels = NDArray[np.uint8]
NOT_JSON = "Failed to parse the request body as JSON"  # the runtime's words
SAMPLE = frozenset({  # one case of each kind, for every HTTP server; `--all` sends the others too
    "PNG cut at 50%", "JPEG with a wrong byte 0", "fake HEIC", "PNG of 60000x60000", "claims more than it holds",
    "7x5 by 2.5", "palette with a clear colour", "16-bit RGB", "orientation 6", "animated PNG", "scale_factor = 8.1",
    "color_fix = 'lab'", "user_prompt, emoji", "user_prompt with NUL", "overlap that cannot advance", "two targets",
    "scale_factor = NaN", "half fidelity", "turned mask", "path '/etc/passwd'", "data URI of text", "no image",
    "body that is no JSON", "URL that nobody serves",
})  # fmt: skip
RNG = np.random.default_rng(7)
PHOTO: Pixels = (
    np.linspace(20, 230, 24)[None, :, None] * np.linspace(0.4, 1, 18)[:, None, None] * np.array([1.0, 0.8, 0.6])
    + RNG.normal(0, 6, (18, 24, 3))
).clip(0, 255).astype(np.uint8)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        image: bytes to upload, or a string to send as it is; None leaves the field out.
        inputs: other inputs; a str is a raw JSON body, with IMAGE in the place of the upload.
        message: part of the error that must come back; None: an image must.
        same_as: the pixels, [H, W, 3 or 4], that a plain PNG would have to hold for the same result.
        refused: answered by Cog's own check (HTTP 422).
    """

    name: str
    image: bytes | str | None
    message: str | None = None
    same_as: Pixels | None = None
    inputs: dict[str, Any] | str = dataclasses.field(default_factory=dict)
    refused: bool = False


def file(pixels: Any, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(data: bytes, mode: str = "RGB") -> Pixels:
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


def small_file(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG that claims a size and holds nothing of it."""
    return SIGNATURE + header(width, height) + body + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def with_chunk(data: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return data[:33] + chunk(name, body) + data[33:]


def flipped(data: bytes, place: int, bits: int = 1) -> bytes:
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def broken() -> Iterator[Case]:
    noise = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    for kind in ("AVIF", "TIFF", "HEIF"):
        data = file(noise, kind)
        for share in (0.1, 0.5, 0.9):
            yield Case(f"{kind} cut at {share:.0%}", data[: int(share * len(data))], r"damaged|not an image")
    for kind in ("JPEG", "PNG", "WEBP"):
        data = file(noise, kind)
        for share in (0.1, 0.5, 0.9, 0.99):
            yield Case(f"{kind} cut at {share:.0%}", data[: int(share * len(data))], r"damaged|not an image")
        for number in range(6):
            place = int(RNG.integers(30, len(data)))
            wrong = flipped(data, place, 1 << number)
            if kind == "PNG":  # every chunk has a checksum
                yield Case(f"PNG with a wrong byte {number}", wrong, "damaged")
            else:  # the format cannot tell: the image is what the decoder makes of it
                yield Case(f"{kind} with a wrong byte {number}", wrong, same_as=opened(wrong))
    png, jpeg = file(noise), file(noise, "JPEG")
    palette = file(Image.fromarray(noise).quantize(16))
    for name, data in {
        "empty": b"",
        "text": b"hello",
        "HTML": b"<!doctype html><title>404</title>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "fake HEIC": b"\0\0\0\x18ftypheic" + bytes(40),
        "JPEG header only": jpeg[:20],
        "PNG signature only": SIGNATURE,
        "PNG of 0x0": small_file(0, 0),
        "wrong checksum in IHDR": flipped(png, 30),
        "wrong checksum in PLTE": flipped(palette, palette.index(b"PLTE") + 9),
        "wrong checksum in IDAT": flipped(png, len(png) // 2),
        "IDAT that ends early": small_file(16, 16),
        "PostScript named PNG": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "PDF": b"%PDF-1.7\n",
        "MP4": b"\0\0\0\x18ftypisom" + bytes(40),
        "ZIP": b"PK\x03\x04" + bytes(60),
        "one byte": b"\x89",
    }.items():
        yield Case(name, data, r"not an image|damaged|empty")
    for kind in ("GIF", "BMP", "ICO", "PPM", "TGA", "PCX"):
        yield Case(f"{kind}, not on the list", file(noise, kind), "not an image")
    for number in range(8):
        yield Case(f"random bytes {number}", RNG.bytes(200 << number), "not an image")
    for number in range(8):
        yield Case(
            f"random bytes behind a header {number}", png[: 41 + 8 * number] + RNG.bytes(300), r"damaged|not an im"
        )


def bombs() -> Iterator[Case]:
    yield Case("PNG of 60000x60000", small_file(60000, 60000), "far over the limit of 67.1 MP")
    yield Case("PNG of 30000x30000", small_file(30000, 30000), "far over the limit of 67.1 MP")
    yield Case("PNG of 2^31-1 x 1", small_file(2**31 - 1, 1), "far over the limit")
    yield Case("1-bit PNG of 144 MP", file(Image.new("1", (12000, 12000))), "limit is 67.1 MP")
    yield Case("one row over the limit", small_file(8192, 8193), "limit is 67.1 MP", inputs={"scale_factor": 1})
    yield Case("one pixel too wide", small_file(32769, 1), "limit is 32768 pixels", inputs={"scale_factor": 1})
    yield Case("one pixel too high", small_file(1, 32769), "limit is 32768 pixels", inputs={"scale_factor": 1})
    four = {"scale_factor": 4}
    yield Case(
        "scale over the output limit", small_file(2049, 2048), "largest scale for this image is 3.99", inputs=four
    )
    yield Case("side over the output limit", small_file(9000, 2), "largest scale for this image is 3.64", inputs=four)
    webp = {"output_format": "webp", "scale_factor": 4}
    yield Case("side over that of WebP", small_file(5000, 2), "webp may have 16383", inputs=webp)
    yield Case("21 bytes of PPM", b"P6 100000 100000 255\n", "not an image")
    text = with_chunk(file(PHOTO), b"zTXt", b"note\0\0" + zlib.compress(bytes(80_000_000)))
    yield Case("80 MB of text in a PNG", text, same_as=PHOTO)
    profile = with_chunk(file(PHOTO), b"iCCP", b"p\0\0" + zlib.compress(bytes(80_000_000)))
    yield Case("80 MB of profile in a PNG", profile, same_as=PHOTO)
    yield Case("claims more than it holds", small_file(4000, 4000), "damaged", inputs={"scale_factor": 2})


def shapes() -> Iterator[Case]:
    for width, height in ((1, 1), (2, 1), (1, 3), (1, 40), (40, 1), (7, 5), (65, 3)):
        pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for scale in (1, 2.5):
            yield Case(f"{width}x{height} by {scale}", file(pixels), same_as=pixels, inputs={"scale_factor": scale})
    for name, value in (("all black", 0), ("all grey", 127), ("all white", 255)):
        pixels = np.full((18, 24, 3), value, np.uint8)
        yield Case(name, file(pixels), same_as=pixels)
    dot = np.zeros((18, 24, 3), np.uint8)
    dot[9, 12] = 255
    yield Case("one bright pixel", file(dot), same_as=dot)


def modes() -> Iterator[Case]:
    grey = Image.fromarray(PHOTO).convert("L")
    greys = np.asarray(grey.convert("RGB"))
    alpha = np.linspace(0, 255, 24).astype(np.uint8)[None].repeat(18, axis=0)
    rgba = np.dstack([PHOTO, alpha])
    yield Case("RGB", file(PHOTO), same_as=PHOTO)
    yield Case("grey", file(grey), same_as=greys)
    yield Case("grey JPEG", data := file(grey, "JPEG"), same_as=opened(data))
    yield Case(
        "grey with alpha",
        file(rgba, mode="LA"),
        same_as=np.asarray(Image.fromarray(rgba).convert("LA").convert("RGBA")),
    )
    yield Case("RGBA", file(rgba), same_as=rgba)
    yield Case("RGBA, opaque", file(np.dstack([PHOTO, np.full_like(alpha, 255)])), same_as=PHOTO)
    palette = Image.fromarray(PHOTO).quantize(16)
    yield Case("palette", file(palette), same_as=np.asarray(palette.convert("RGB")))
    clear = file(palette, transparency=3)
    yield Case("palette with a clear colour", clear, same_as=opened(clear, "RGBA"))
    bits = grey.convert("1")
    yield Case("1 bit", file(bits), same_as=np.asarray(bits.convert("RGB")))
    keyed = file(PHOTO, transparency=tuple(int(v) for v in PHOTO[0, 0]))
    yield Case("RGB with a clear colour", keyed, same_as=opened(keyed, "RGBA"))
    for name, options in {
        "progressive": {"progressive": True},
        "4:4:4": {"subsampling": 0},
        "quality 5": {"quality": 5},
    }.items():
        data = file(PHOTO, "JPEG", **options)
        yield Case(f"JPEG, {name}", data, same_as=opened(data))
    cmyk = file(PHOTO, "JPEG", mode="CMYK")
    yield Case("CMYK JPEG", cmyk, same_as=opened(cmyk))
    for name, options in {"lossless": {"lossless": True}, "lossy": {"quality": 60}}.items():
        data = file(rgba, "WEBP", exact=True, **options)
        yield Case(f"WebP, {name}, with alpha", data, same_as=opened(data, "RGBA"))
    wide = np.asarray(grey).astype(np.uint16) * 257
    yield Case("16-bit grey", file(wide), same_as=greys)
    big = PHOTO.astype(">u2") * 257
    rows = np.insert(big.reshape(18, -1).view(np.uint8), 0, 0, axis=1).tobytes()
    sixteen = SIGNATURE + header(24, 18, 16) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    yield Case("16-bit RGB", sixteen, same_as=PHOTO)
    for name, kind, options in (
        ("TIFF", "TIFF", {}),
        ("LZW TIFF", "TIFF", {"compression": "tiff_lzw"}),
        ("Deflate TIFF", "TIFF", {"compression": "tiff_deflate"}),
        ("AVIF", "AVIF", {}),
        ("HEIC", "HEIF", {}),
    ):
        data = file(rgba, kind, **options)
        yield Case(f"{name} with alpha", data, same_as=opened(data, "RGBA"))
        pages = file(PHOTO, kind, save_all=True, append_images=[Image.fromarray(PHOTO)])
        if kind == "HEIF":
            yield Case("HEIC of several", pages, same_as=opened(pages))
        else:
            yield Case(f"{name} of several", pages, "2 (pages|frames); send one still image")
    yield Case("16-bit grey TIFF", file(wide, "TIFF"), same_as=greys)
    yield Case("CMYK TIFF", data := file(PHOTO, "TIFF", mode="CMYK"), same_as=opened(data))
    yield Case(
        "floating-point TIFF",
        file(Image.fromarray(greys[..., 0].astype(np.float32)), "TIFF"),
        "values from .* to .*: 0 to 1 is read",
    )
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        data = file(PHOTO, "JPEG", exif=exif, quality=95)
        yield Case(f"orientation {turn}", data, same_as=turned(opened(file(PHOTO, "JPEG", quality=95)), turn))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Case("sRGB profile", file(PHOTO, icc_profile=srgb), same_as=PHOTO)
    yield Case("profile of garbage", file(PHOTO, icc_profile=b"garbage" * 30), same_as=PHOTO)
    yield Case("EXIF of garbage", file(PHOTO, exif=b"Exif\0\0garbage"), same_as=PHOTO)
    yield Case(
        "trailing ZIP behind a JPEG", (data := file(PHOTO, "JPEG")) + b"PK\x03\x04" + bytes(99), same_as=opened(data)
    )
    yield Case("trailing data behind a PNG", file(PHOTO) + b"<script>", same_as=PHOTO)
    yield Case(
        "half a million bytes of notes", with_chunk(file(PHOTO), b"tEXt", b"note\0" + b"x" * 500_000), same_as=PHOTO
    )
    frames = [Image.fromarray(np.roll(PHOTO, n, axis=0)) for n in range(3)]
    for kind in ("PNG", "WEBP"):
        animated = file(frames[0], kind, save_all=True, append_images=frames[1:])
        yield Case(f"animated {kind}", animated, "3 frames")


def turned(pixels: Pixels, orientation: int) -> Pixels:
    """By Pillow's own table."""
    names = (
        "",
        "FLIP_LEFT_RIGHT",
        "ROTATE_180",
        "FLIP_TOP_BOTTOM",
        "TRANSPOSE",
        "ROTATE_270",
        "TRANSVERSE",
        "ROTATE_90",
    )
    if orientation == 1:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(Image.Transpose[names[orientation - 1]]))


def fields() -> Iterator[Case]:
    good = file(PHOTO)
    outside = {
        "scale_factor": (0.5, 8.1),
        "num_inference_steps": (0, 9),
        "cfg_scale": (0.9, 2.1),
        "latent_tiled_size": (15, 513),
        "latent_tiled_overlap": (-1, 129),
        "num_particles": (0, 17),
        "bandwidth": (-0.1, 10.1),
        "output_quality": (0, 101),
        "dpi": (0, 9601),
        "seed": (-1, 2**32),
        "fidelity": (-0.1, 1.1),
        "target_side": (0, 10**9),
        "target_megapixels": (0, 10**9),
    }
    for field, values in outside.items():
        for value in values:
            yield Case(f"{field} = {value}", good, field, inputs={field: value}, refused=True)
    wrong: dict[str, Any] = {
        "scale_factor": "large", "num_inference_steps": 1.5, "use_kds": "perhaps", "color_fix": "lab",
        "output_format": "gif", "output_view": "every", "user_prompt": ["a"], "seed": {}, "negative_prompt": 3,
        "fidelity": "much", "target_side": 1.5,
    }  # fmt: skip
    for field, value in wrong.items():
        yield Case(f"{field} = {value!r}", good, field, inputs={field: value}, refused=True)
    for field in ("user_prompt", "positive_prompt", "negative_prompt"):
        yield Case(f"{field} of 2001 characters", good, field, inputs={field: "x" * 2001}, refused=True)
        for name, value in {"emoji": "\U0001f600" * 40, "right to left": "שלום עולם", "long": "a b " * 500}.items():
            yield Case(f"{field}, {name}", good, same_as=PHOTO, inputs={field: value})
        yield Case(f"{field} with NUL", good, "NUL", inputs={field: "a\0b"})
    yield Case(
        "overlap that cannot advance", good, "smaller", inputs={"latent_tiled_size": 16, "latent_tiled_overlap": 16}
    )
    yield Case("map without steering", good, "cannot disagree", inputs={"output_view": "uncertainty"})
    view = {"output_view": "uncertainty", "use_kds": True, "output_format": "jpg"}
    yield Case("16-bit map as JPEG", good, "16-bit PNG", inputs=view)
    yield Case("seed = 1.0", good, same_as=PHOTO, inputs={"seed": 1.0})
    yield Case("largest seed", good, same_as=PHOTO, inputs={"seed": 2**32 - 1})
    yield Case("unknown field", good, same_as=PHOTO, inputs={"upscaler": "other"})
    for number in ("NaN", "1e400", "-Infinity"):
        body = json.dumps({"input": {"image": "IMAGE"}})[:-2] + f', "scale_factor": {number}}}}}'
        yield Case(f"scale_factor = {number}", good, NOT_JSON, inputs=body, refused=True)
    yield Case("no image", None, "image", refused=True)
    yield Case("body that is no JSON", good, NOT_JSON, inputs="{", refused=True)


def sizes_and_masks() -> Iterator[Case]:
    good, size = file(PHOTO), (24, 18)

    def mask(image: Image.Image, **options: Any) -> dict[str, str]:
        return {"mask": "data:image/png;base64," + base64.b64encode(file(image, **options)).decode()}

    yield Case("target below the input", good, "needs a scale of 0.4167", inputs={"target_side": 10})
    yield Case("target far above the input", good, "must be from 1 to 8", inputs={"target_megapixels": 1.0})
    yield Case("two targets", good, "both set", inputs={"target_side": 48, "target_megapixels": 0.001})
    yield Case("target side", good, same_as=PHOTO, inputs={"target_side": 50})
    yield Case("target megapixels", good, same_as=PHOTO, inputs={"target_megapixels": 0.002})
    yield Case("half fidelity", good, same_as=PHOTO, inputs={"fidelity": 0.5})
    white = Image.new("L", size, 255)
    for name, image in {
        "white mask": white,
        "mask of 16 bits": Image.new("I;16", size, 65535),
        "mask with alpha": Image.new("RGBA", (48, 36), (255, 255, 255, 255)),
        "mask of one bit": Image.new("1", (240, 180), 1),
    }.items():
        yield Case(name, good, same_as=PHOTO, inputs=mask(image))
    yield Case("turned mask", good, "the mask is 18x24 and the image 24x18", inputs=mask(Image.new("L", (18, 24))))
    moving = mask(white, save_all=True, append_images=[Image.new("L", size)], duration=9)
    yield Case("animated mask", good, "the mask cannot be used: the image has 2 frames", inputs=moving)


def paths() -> Iterator[Case]:
    for path in (
        "/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "ftp://127.0.0.1/x.png",
        "/dev/zero", "/proc/self/environ", "C:\\x.png", "weights/pocket/bundle.json", " ",
    ):  # fmt: skip
        yield Case(f"path {path!r}", path, "must be an uploaded file")
    yield Case("broken base64", "data:image/png;base64,@@@", "empty")
    yield Case("data URI of text", "data:text/plain,hello", "not an image")
    yield Case("URL that nobody serves", "http://127.0.0.1:9/x.png", "Input validation")


@functools.cache  # the random bytes must be the same for everybody
def cases() -> list[Case]:
    groups: list[Callable[[], Iterator[Case]]] = [broken, bombs, shapes, modes, fields, sizes_and_masks, paths]
    return [case for group in groups for case in group()]


def parameters() -> list[Any]:
    """The cases for a server: those outside the sample run with `--all` alone."""
    return [pytest.param(case, id=case.name, marks=() if case.name in SAMPLE else pytest.mark.slow) for case in cases()]
