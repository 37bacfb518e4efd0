"""Converts paths, bytes, file objects, PIL images and NumPy arrays to an `ImageData`, and results back to arrays."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seesr.images.convert import equal_channels
from seesr.images.image_data import ImageData
from seesr.images.limits import LARGEST_FILE, check_input
from seesr.images.read import decode, from_pil, read_file

Array = NDArray[np.uint8 | np.uint16 | np.floating[Any]]
Source = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | Array | ImageData
ACCEPTED = (
    "a path, the bytes of an image file, a binary file object, a PIL image, a NumPy array or an iterable of these"
)
SHAPES = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
ROUNDING = 1e-6  # how far a float array may be outside 0 to 1
CheckSize = Callable[[int, int], object]  # takes width and height, raises ValueError to refuse


class Layout(NamedTuple):
    """How an array of the caller was laid out.

    Attributes:
        channels: 1, 3 or 4; None for an array of two dimensions.
        floating: whether its values were floats from 0 to 1.
    """

    channels: int | None
    floating: bool


class LoadedImage(NamedTuple):
    """A source that has been read.

    Attributes:
        image: its pixels and metadata.
        sha256: of the file's bytes; None for images in memory.
        layout: of an array; None for everything else.
    """

    image_data: ImageData
    sha256: str | None = None
    layout: Layout | None = None


def load_source(source: Source | LoadedImage, check_size: CheckSize = check_input) -> LoadedImage:
    """Reads an image of any accepted kind.

    Args:
        source: path, bytes of an image file, binary file object, PIL image, NumPy array, or ImageData. Arrays are
            (H, W), (H, W, 1), (H, W, 3) or (H, W, 4): uint8, uint16, or floats from 0 to 1, as sRGB without
            premultiplied alpha.
        check_size: takes width and height before pixels are decoded, and raises ValueError to refuse.

    Raises:
        TypeError: the type is not accepted; the message lists those that are.
        ValueError: the image cannot be used; one line.
        OSError: the file cannot be read.
    """
    if isinstance(source, LoadedImage):
        return source
    if isinstance(source, (ImageData, Image.Image)):
        if isinstance(source, Image.Image):
            check_size(*source.size)
            source = from_pil(source)
        return LoadedImage(source)
    if isinstance(source, np.ndarray):
        return from_array(source, check_size)
    data = read_bytes(source)
    return LoadedImage(decode(data, check_size), hashlib.sha256(data).hexdigest())


def is_file(source: object) -> bool:
    """Whether this is a path, the bytes of a file or a file object, rather than pixels."""
    return isinstance(source, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(source, "read")


def is_many(source: object) -> bool:
    """Whether this is an iterable of sources, rather than a source."""
    single = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image, np.ndarray, ImageData, LoadedImage, dict)
    return isinstance(source, Iterable) and not isinstance(source, single) and not hasattr(source, "read")


def read_bytes(source: Any) -> bytes:
    """The bytes of an image file from a path, from bytes or from a binary file object.

    Raises:
        TypeError: it is something else.
        ValueError: a URL.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise ValueError(f"{source} is a URL: download it first and give its path or its bytes")
    if isinstance(source, (str, os.PathLike)):
        return read_file(Path(source))
    if hasattr(source, "read"):
        data = source.read(LARGEST_FILE + 1)
        if isinstance(data, bytes):
            return data
        raise TypeError("the file object returns text: open the file in binary mode, open(path, 'rb')")
    raise TypeError(f"source is of type {type(source).__name__}: use {ACCEPTED}")


def from_array(array: NDArray[Any], check_size: CheckSize = check_input) -> LoadedImage:
    """A NumPy array -> pixels. See `load_source`.

    Raises:
        ValueError: its shape, its type or its values; the message says what is accepted.
    """
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        advice = ": move the channels last with array.transpose(1, 2, 0)" if first else ""
        raise ValueError(f"the array has the shape {array.shape}; it must be {SHAPES}{advice}")
    check_size(array.shape[1], array.shape[0])
    layout = Layout(None if array.ndim == 2 else array.shape[2], array.dtype.kind == "f")
    if layout.floating:
        lowest, highest = float(array.min()), float(array.max())
        if not -ROUNDING <= lowest <= highest <= 1 + ROUNDING:  # NaN too
            raise ValueError(f"the array has values from {lowest:g} to {highest:g}; floats must be from 0 to 1")
        array = (array.astype(np.float64).clip(0, 1) * 65535).round().astype(np.uint16)
    elif array.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"the array is of type {array.dtype}; it must be uint8, uint16, or floats from 0 to 1")
    pixels = array if array.ndim == 3 else array[..., None]
    alpha = np.ascontiguousarray(pixels[..., 3]) if pixels.shape[2] == 4 else None
    if alpha is not None and (alpha == np.iinfo(alpha.dtype).max).all():
        alpha = None
    rgb = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels[..., :3])
    return LoadedImage(ImageData(rgb, alpha, grey=equal_channels(rgb)), None, layout)


def to_array(image: ImageData, layout: Layout | None) -> Array:
    """The pixels as the caller's array was laid out; without a layout (H, W, 3), or (H, W, 4) with alpha."""
    channels = (3 if image.alpha is None else 4) if layout is None else layout.channels
    pixels = image.rgb
    if channels is None:
        pixels = pixels[..., 0]
    elif channels == 4:
        opaque = np.full(pixels.shape[:2], np.iinfo(pixels.dtype).max, pixels.dtype)
        pixels = np.dstack([pixels, opaque if image.alpha is None else image.alpha])
    else:
        pixels = pixels[..., :channels]
    if layout is not None and layout.floating:
        return (pixels / np.float32(np.iinfo(pixels.dtype).max)).astype(np.float32)
    return np.ascontiguousarray(pixels)
