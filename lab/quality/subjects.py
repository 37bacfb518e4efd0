"""Images of kinds that photographs leave out: text, line art, a screenshot, a face. None was trained on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from lab.quality.degradations import Rgb
from lab.report import ROOT

SIDE = 256  # pixels
INK, PAPER = (24, 24, 24), (255, 255, 255)


def subjects() -> Iterator[tuple[str, str, Rgb]]:
    """The kind, the name and the image [256, 256, 3] of each."""
    yield "text", "page of small print", text_page((13, 15, 17), INK, PAPER)
    yield "text", "page of large print", text_page((26, 34, 48), PAPER, (20, 40, 90))
    yield "line art", "horse", square(np.repeat(skimage.data.horse()[..., None] * np.uint8(255), 3, 2), 60, 60)
    yield "line art", "logo", square(on_white(skimage.data.logo()), 120, 120)
    yield "screenshot", "mail program", screenshot()
    yield "face", "astronaut", square(skimage.data.astronaut(), 0, 96)


def square(image: Rgb, top: int, left: int) -> Rgb:
    return np.ascontiguousarray(image[top : top + SIDE, left : left + SIDE])


def on_white(image: np.ndarray) -> Rgb:
    """[H, W, 4] -> [H, W, 3]."""
    alpha = image[..., 3:] / 255
    return (image[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)


def text_page(sizes: tuple[int, ...], ink: tuple[int, int, int], paper: tuple[int, int, int]) -> Rgb:
    """The licence, in lines whose size changes."""
    image = Image.new("RGB", (SIDE, SIDE), paper)
    draw, y = ImageDraw.Draw(image), 4
    words = " ".join((ROOT / "LICENSE").read_text().split())
    for number, line in enumerate(textwrap.wrap(words, 44)):
        size = sizes[number % len(sizes)]
        draw.text((6, y), line, ink, ImageFont.load_default(size))
        y += round(1.3 * size)
    return np.asarray(image)


def screenshot() -> Rgb:
    """A window with a title bar, a list with a selected row, text, and buttons."""
    image = Image.new("RGB", (SIDE, SIDE), (246, 246, 248))
    draw, small, bold = ImageDraw.Draw(image), ImageFont.load_default(11), ImageFont.load_default(15)
    draw.rectangle((0, 0, SIDE, 22), (54, 62, 78))
    draw.text((8, 3), "Inbox (12)", PAPER, bold)
    for number, color in enumerate(((237, 106, 94), (244, 191, 79), (97, 197, 84))):
        draw.ellipse((198 + 18 * number, 6, 208 + 18 * number, 16), color)
    draw.rectangle((0, 23, 92, SIDE), (230, 233, 239))
    for row, name in enumerate(("Drafts", "Sent", "Archive", "Receipts", "Travel", "Photos", "Family", "Spam")):
        top = 30 + 20 * row
        if row == 3:
            draw.rectangle((0, top - 3, 92, top + 16), (53, 116, 240))
        draw.text((12, top), name, PAPER if row == 3 else INK, small)
        draw.text((74, top), str(7 * row + 3), (130, 136, 148), small)
    draw.line((92, 23, 92, SIDE), (200, 204, 212))
    text = "Your order 48-2093 has left our warehouse. Expect it on Tuesday between 9:00 and 12:30."
    for row, line in enumerate(textwrap.wrap(text, 24)):
        draw.text((102, 34 + 15 * row), line, INK, small)
    for number, label in enumerate(("Reply", "Forward")):
        left = 102 + 72 * number
        fill, ink = (((53, 116, 240), PAPER), ((255, 255, 255), INK))[number]
        draw.rounded_rectangle((left, 116, left + 62, 138), 5, fill, (180, 186, 198))
        draw.text((left + 12, 121), label, ink, small)
    draw.rectangle((102, 150, 246, 236), PAPER, (180, 186, 198))
    draw.line([(110, 226), (134, 198), (158, 210), (182, 172), (206, 184), (238, 160)], (214, 68, 52), 2)
    return np.asarray(image)
