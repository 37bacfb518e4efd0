"""Size limits of input and output images and files, checked before decoding."""

from __future__ import annotations

LARGEST_OUTPUT = 8192 * 8192  # pixels
LARGEST_INPUT = 8192 * 8192  # pixels
LARGEST_SIDE = 32768  # pixels, of the input and of the output
LARGEST_FILE = 100 * 2**20  # bytes


def megapixels(width: int, height: int) -> float:
    """The area in millions of pixels."""
    return width * height / 1e6


def check_input(width: int, height: int) -> None:
    """Refuses an input of more than LARGEST_INPUT pixels, or LARGEST_SIDE on a side.

    Raises:
        ValueError: with the size and the limit.
    """
    if max(width, height) > LARGEST_SIDE:
        raise ValueError(f"the image is {width}x{height}; the limit is {LARGEST_SIDE} pixels on a side")
    if width * height > LARGEST_INPUT:
        raise ValueError(
            f"the image is {width}x{height} = {megapixels(width, height):.1f} MP; "
            f"the limit is {megapixels(LARGEST_INPUT, 1):.1f} MP"
        )
