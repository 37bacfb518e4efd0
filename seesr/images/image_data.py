"""The in-memory image (`ImageData`) and operations on its pixels: resizing, padding, filling under transparency."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seesr.images import xmp
from seesr.images.exif import with_resolution

HIDDEN = 64  # a pixel of at most 1 / HIDDEN of full opacity counts as invisible
NEAR = 64  # pixels that a hidden one looks around for a visible one, at least
STRIP = 2**22  # pixels of which the hidden ones are filled at a time
Pixels = NDArray[np.uint8 | np.uint16]


@dataclasses.dataclass(frozen=True)
class ImageData:
    """An upright image with its metadata.

    Attributes:
        rgb: [H, W, 3], uint8 or uint16 over the full range.
        alpha: [H, W] of the same dtype, not premultiplied, or None.
        icc: colour profile of `rgb`; None means sRGB.
        exif: EXIF block without an orientation, or None.
        dpi: (horizontal, vertical), or None.
        record: provenance to write into the file: version, bundle, settings.
        grey: the file has one channel of colour, or three that are equal everywhere.
        warnings: what of the file was repaired or left out.
        one_channel: the file has one channel of color; that of its result has one too.
        xmp: XMP packet without what describes other pixels, or None.
        source_type: IPTC digital source type as a URI, or None.
    """

    rgb: Pixels
    alpha: Pixels | None = None
    icc: bytes | None = None
    exif: bytes | None = None
    dpi: tuple[float, float] | None = None
    record: dict[str, Any] | None = None
    grey: bool = False
    warnings: tuple[str, ...] = ()
    one_channel: bool = False
    xmp: bytes | None = None
    source_type: str | None = None

    @property
    def written_grey(self) -> bool:
        """Whether one channel of color is written. A color profile, which describes three, needs three."""
        return self.one_channel and self.icc is None

    @functools.cached_property
    def colorless(self) -> bool:
        """Whether red, green and blue are equal in every visible pixel. A tint, such as sepia, is a color."""
        red, green, blue = (self.visible[..., channel] for channel in range(3))
        return self.grey or (np.array_equal(red, green) and np.array_equal(red, blue))

    @functools.cached_property
    def visible(self) -> Pixels:
        """The colours, those of invisible pixels replaced by their visible neighbours'."""
        return self.rgb if self.alpha is None else fill_hidden(self.rgb, self.alpha)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), pixels."""
        return self.rgb.shape[1], self.rgb.shape[0]

    def with_pixels(
        self, rgb: Pixels, record: dict[str, Any], keep_exif: bool = True, generated: bool = True
    ) -> ImageData:
        """The image with the larger pixels `rgb`; alpha is resized with Lanczos, metadata are kept or reduced to marks.

        Args:
            record: of the settings; a source type of the input that is replaced is added.
            keep_exif: False: of EXIF nothing stays, of XMP only labels of AI.
            generated: whether a model made the pixels.
        """
        size = rgb.shape[1], rgb.shape[0]
        alpha = None if self.alpha is None else resize(self.alpha, size, Image.Resampling.LANCZOS)
        source_type = xmp.source_type_after(self.source_type, generated)
        if self.source_type not in (None, source_type):
            record = {**record, "source_type_before": self.source_type}
        metadata = {"exif": self.exif, "xmp": self.xmp} if keep_exif else {"exif": None, "xmp": xmp.labels(self.xmp)}
        return dataclasses.replace(self, rgb=rgb, alpha=alpha, record=record, source_type=source_type, **metadata)

    def with_dpi(self, dpi: int) -> ImageData:
        """The same pixels with another resolution, dots per inch; also in EXIF, which is all that WebP has for it."""
        return dataclasses.replace(self, dpi=(float(dpi), float(dpi)), exif=with_resolution(self.exif, dpi))

    def cropped(self, left: int, top: int, width: int, height: int) -> ImageData:
        """A rectangle of the same image, in pixels."""
        place = slice(top, top + height), slice(left, left + width)
        alpha = None if self.alpha is None else self.alpha[place].copy()
        return dataclasses.replace(self, rgb=self.rgb[place].copy(), alpha=alpha)

    def pil(self) -> Image.Image:
        """As an 8-bit Pillow image: RGB or RGBA, or L or LA where the file has one colour channel."""
        colors = to_uint8(self.rgb[..., 0] if self.written_grey else self.rgb)
        return Image.fromarray(colors if self.alpha is None else np.dstack([colors, to_uint8(self.alpha)]))


def to_grey(rgb: Pixels) -> Pixels:
    """[H, W, 3] -> the luma (BT.601) in all three channels, the same dtype; equal channels pass unchanged."""
    return np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)  # type: ignore[return-value]


def to_uint8(pixels: Pixels) -> NDArray[np.uint8]:
    """16 bits -> 8 bits, rounded; 8 bits pass."""
    if pixels.dtype == np.uint8:
        return pixels  # type: ignore[return-value]
    return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def resize(pixels: Pixels, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.BICUBIC) -> Pixels:
    """Resizes [H, W] or [H, W, 3] to `size` = (width, height); same dtype. Pillow's filters, 16 bits without loss."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size, resample))
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    resized = np.empty((size[1], size[0], planes.shape[2]), np.uint16)
    for channel in range(planes.shape[2]):  # one at a time: a whole image in float32 would need 12 bytes a pixel
        plane = np.asarray(Image.fromarray(planes[..., channel].astype(np.float32)).resize(size, resample))
        resized[..., channel] = plane.round().clip(0, 65535)
    return resized[..., 0] if pixels.ndim == 2 else resized


def pad(pixels: Pixels, multiple: int, least: int) -> Pixels:
    """Mirrors [H, W, 3] at the right and bottom until both sides are at least `least` and multiples of `multiple`."""
    right, bottom = (max(least, -(-side // multiple) * multiple) - side for side in (pixels.shape[1], pixels.shape[0]))
    return np.pad(pixels, ((0, bottom), (0, right), (0, 0)), mode="symmetric")


def fill_hidden(rgb: Pixels, alpha: Pixels) -> Pixels:
    """Replaces the colours of transparent pixels by the nearest visible colour, so that they do not bleed into edges.

    In strips, so that a large image can be cancelled: farther than NEAR from all that is visible it may be another
    visible colour, and a strip with nothing visible near it repeats the nearest row of one that has.
    """
    hidden = alpha <= np.iinfo(alpha.dtype).max // HIDDEN
    if not hidden.any() or hidden.all():
        return rgb
    from scipy.ndimage import distance_transform_edt

    filled, rows = rgb.copy(), max(NEAR, STRIP // rgb.shape[1])
    shown, empty = [], []
    for top in range(0, len(rgb), rows):
        strip, around = slice(top, top + rows), slice(max(0, top - NEAR), top + rows + NEAR)
        if hidden[around].all():
            empty.append(top)
            continue
        shown.append(top)
        if hidden[strip].any():
            nearest: Any = distance_transform_edt(hidden[around], return_distances=False, return_indices=True)
            down, across = nearest[:, top - around.start :][:, :rows]
            filled[strip] = rgb[around][down, across]
    for top in empty:
        other = min(shown, key=lambda other: abs(other - top))
        filled[top : top + rows] = filled[other + rows - 1 if other < top else other]
    return filled
