"""Writes a sheet of crops at 100 %: input, bicubic, ours and the truth, one row per crop.

    python -m lab.quality.sheet --bundle weights/pocket --png docs/quality-sheet.png

Rows are clean, mild and strong damage (Real-ESRGAN's) of a face, fur, text, foliage and edges, and of each damage the
piece of all that gains least over bicubic. Images are of the built-in set and of the held-out ones.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import skimage.data
from PIL import Image

from lab.quality import degradations, metrics
from lab.quality.degradations import Rgb
from lab.quality.evaluate import held_out
from seesr import Settings, Upscaler
from seesr.images.image_data import resize
from seesr.networks import weights

SIDE = 160  # of a piece, pixels
DAMAGE = ("clean", "mild", "realesrgan")
PIECES = {  # image: (top, left) of what is looked at
    "astronaut": (40, 150),
    "chelsea": (80, 120),
    "coffee": (150, 260),
    "text": (4, 100),
}
log = logging.getLogger(__name__)


class Piece(NamedTuple):
    label: str
    shown: list[Rgb]
    gain: float


def images() -> dict[str, Rgb]:
    """The built-in set, a page of text, and the held-out images."""
    text = np.repeat(skimage.data.text()[..., None], 3, axis=2)
    return {**dict(metrics.built_in()), "text": metrics.cut(text), **dict(held_out())}


def pieces(upscaler: Upscaler, name: str, high: Rgb, damage: str, seed: int) -> list[Piece]:
    """All pieces of one image, that of PIECES first; or the middle one."""
    low = degradations.BY_NAME[damage](high, seed)
    size = high.shape[1], high.shape[0]
    upscaled = np.asarray(upscaler(Image.fromarray(low), Settings(seed=1, num_inference_steps=2)).image)
    whole = [resize(low, size, Image.Resampling.NEAREST), resize(low, size), upscaled, high]
    middle = (high.shape[0] - SIDE) // 2, (high.shape[1] - SIDE) // 2
    grid = [(y, x) for y in range(0, size[1] - SIDE + 1, SIDE) for x in range(0, size[0] - SIDE + 1, SIDE)]
    results = []
    for top, left in [PIECES.get(name, middle), *grid]:
        shown = [image[top : top + SIDE, left : left + SIDE] for image in whole]
        _, bicubic, ours, truth = map(metrics.luma, shown)
        gain = metrics.psnr(ours, truth) - metrics.psnr(bicubic, truth)
        results.append(Piece(f"{name}, {damage}", shown, gain))
    return results


def draw(rows: list[Piece]) -> Rgb:
    """One row below the other, with its words and its gain over bicubic."""
    drawn = []
    for row in rows:
        strip = np.concatenate(row.shown, axis=1)
        label = np.full((18, strip.shape[1], 3), 255, np.uint8)
        message = f"{row.label}: {row.gain:+.2f} dB"
        cv2.putText(label, message, (4, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
        drawn += [label, strip]
    return np.concatenate(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--png", type=Path, required=True)
    args = parser.parse_args()
    upscaler = Upscaler.load(args.bundle or weights.locate(), args.device)
    rows: list[Piece] = []
    for damage in DAMAGE:
        worst: Piece | None = None
        for name, high in images().items():
            first, *rest = pieces(upscaler, name, high, damage, seed=1)
            if name in PIECES or name in ("wallpapers-2", "wallpapers-9", "stamps-3"):
                rows.append(first)
            worst = min([*rest, *([worst] if worst else [])], key=lambda piece: piece.gain, default=None)
        if worst is not None:
            rows.append(worst._replace(label=f"least of all: {worst.label}"))
    Image.fromarray(draw(rows)).save(args.png)


if __name__ == "__main__":
    main()
