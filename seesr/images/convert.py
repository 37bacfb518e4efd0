"""Converts decoded pixels of any colour space to upright RGB: CMYK, Lab and grey ICC profiles, orientation, alpha."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from seesr.images.exif import TRANSPOSED
from seesr.images.image_data import Pixels

PLAIN = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "La", "RGBa"}  # modes that need no profile to be RGB(A)
CONVERTED = {"CMYK", "YCbCr", "LAB", "HSV"}  # modes that `to_srgb` converts


def profile_space(icc: bytes | None) -> str:
    """The colour space of a profile ("RGB", "GRAY", "CMYK", ...); "" if there is none, or it cannot be read."""
    try:
        core: Any = ImageCms.ImageCmsProfile(io.BytesIO(icc or b"")).profile
        return core.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError):
        return ""


def grey_to_srgb(rgb: Pixels, icc: bytes, warnings: list[str]) -> Pixels:
    """Grey values [H, W, 3] under a grey profile -> the sRGB values that look the same, of the same depth.

    The colour library has 8 bits; between its 256 values a 16-bit image is interpolated.
    """
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        srgb, exact = ImageCms.createProfile("sRGB"), ImageCms.Flags.NOOPTIMIZE
        shown: Any = ImageCms.profileToProfile(ramp, profile, srgb, outputMode="RGB", flags=exact)
    except (ImageCms.PyCMSError, OSError):
        warnings.append("the grey profile cannot be used and is left out: the image is read as sRGB")
        return rgb
    curve = np.asarray(shown)[0, :, 1]
    if rgb.dtype == np.uint8:
        return curve[rgb]
    wide = np.interp(np.arange(65536), np.arange(256) * 257, curve * 257.0).round().astype(np.uint16)
    return wide[rgb]


def apply_profile(rgb: Pixels, icc: bytes | None, grey: bool, warnings: list[str]) -> tuple[Pixels, bytes | None]:
    """Colours and a profile of any kind -> colours with a profile of RGB, or without one: sRGB.

    Args:
        grey: the file has one channel: a profile of grey is applied.
    """
    if icc is None:
        return rgb, None
    space = profile_space(icc)
    if space == "GRAY" and grey:
        return grey_to_srgb(rgb, icc, warnings), None
    if space != "RGB":
        what = f"is for {space}" if space else "cannot be read"
        warnings.append(f"the colour profile {what} and is left out: the image is read as sRGB")
        return rgb, None
    return rgb, icc


def split(pixels: Pixels) -> tuple[Pixels, Pixels | None]:
    """[H, W, 3 or 4] -> colours and alpha; an alpha that is opaque everywhere is none."""
    if pixels.shape[2] == 3:
        return pixels, None
    alpha = pixels[..., 3]
    return np.ascontiguousarray(pixels[..., :3]), None if (alpha == np.iinfo(alpha.dtype).max).all() else alpha


def divided(colours: Pixels, alpha: Pixels) -> Pixels:
    """Premultiplied colours -> straight ones, rounded; those of invisible pixels are 0."""
    top, result = np.iinfo(colours.dtype).max, np.empty_like(colours)
    for row in range(len(colours)):  # a whole image in floats would need 8 times the memory
        by = np.maximum(alpha[row], 1)[:, None].astype(np.uint64)
        result[row] = np.minimum((colours[row].astype(np.uint64) * top + by // 2) // by, top)
    return result


def equal_channels(rgb: Pixels) -> bool:
    """Whether red, green and blue are equal everywhere."""
    return all((row == row[:, :1]).all() for row in rgb)


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Applies an EXIF orientation (1-8)."""
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def to_srgb(image: Image.Image, icc: bytes | None, warnings: list[str]) -> Image.Image:
    """CMYK, YCbCr and Lab to sRGB, by the profile if it can be used.

    Raises:
        ValueError: a mode that has no defined colours (floating point, 32-bit integers).
    """
    if image.mode not in CONVERTED:
        raise ValueError(f"images of mode {image.mode} have no defined colours; use 8 or 16 bits per channel")
    if icc is not None:
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
            assert converted is not None
            return converted
        except (ImageCms.PyCMSError, OSError):
            warnings.append("the colour profile cannot be used and is left out")
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image, lab, ImageCms.createProfile("sRGB"), outputMode="RGB")  # type: ignore[return-value]
    return image.convert("RGB")
