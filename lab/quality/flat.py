"""Measures the effect of the rule for flat areas (docs/decisions/0020).

    python -m lab.quality.flat --json results/flat-areas.json

Rows: of a textured disc on white, x4, the pixels that lie at least FAR input pixels from the disc and are not white,
with and without the rule. Photographs: the share of input pixels in which the rule reduces the model's part, as they
are and after JPEG.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data
from PIL import Image

from lab import report
from lab.quality.degradations import Rgb
from seesr import Settings, Upscaler
from seesr.images.image_data import ImageData, resize
from seesr.networks import weights
from seesr.pipeline import postprocess

SIDE, RADIUS, FAR, SCALE = 64, 14, 12, 4
SETTINGS = Settings(num_inference_steps=1, seed=1, scale_factor=SCALE)
PHOTOGRAPHS = (
    "astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip
QUALITIES = (75, 30)  # of JPEG
COLUMNS = {"color_fix": "", "not white without": ".0%", "not white": ".0%"}
SHARES = {"photograph": "", "as it is": ".1%", **{f"JPEG {quality}": ".1%" for quality in QUALITIES}}


def photograph(name: str) -> Rgb:
    """A photograph of scikit-image as RGB, uint8."""
    pixels = getattr(skimage.data, name)()
    return np.dstack([pixels] * 3) if pixels.ndim == 2 else np.ascontiguousarray(pixels[..., :3])


def disc() -> Rgb:
    """A soft-edged disc of photograph on white."""
    y, x = np.mgrid[:SIDE, :SIDE]
    inside = ((y - SIDE / 2) ** 2 + (x - SIDE / 2) ** 2 < RADIUS**2).astype(np.float32)
    texture = photograph("chelsea")[60:252, 100:292]
    small = cv2.resize(texture, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return (255 + cv2.GaussianBlur(inside, (0, 0), 0.8)[..., None] * (small - 255.0)).round().astype(np.uint8)


def rows(upscaler: Upscaler) -> Iterator[dict[str, Any]]:
    """The share of far pixels that are not white, for every color fix."""
    source, rule = disc(), postprocess.textured
    near = cv2.dilate((source != 255).any(2).astype(np.uint8), np.ones((2 * FAR + 1, 2 * FAR + 1)))
    for color_fix in ("wavelet", "adain", "none"):
        row: dict[str, Any] = {"color_fix": color_fix}
        for column, applied in (("not white without", False), ("not white", True)):
            postprocess.textured = rule if applied else lambda *args: None
            settings = dataclasses.replace(SETTINGS, color_fix=color_fix)
            rgb = upscaler(ImageData(source), settings).image_data.rgb
            far = resize(255 * near, rgb.shape[1::-1], Image.Resampling.NEAREST) == 0
            row[column] = float((rgb[far] != 255).any(1).mean())
        postprocess.textured = rule
        yield row


def share(pixels: Rgb) -> float:
    """The share of input pixels in which the model's part is reduced."""
    result = postprocess.textured(pixels, SCALE)
    return 0.0 if result is None else float((result < 255).mean())


def as_jpeg(pixels: Rgb, quality: int) -> Rgb:
    """After compression."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = list(rows(Upscaler.load(weights.POCKET, "cpu")))
    shares = []
    for name in PHOTOGRAPHS:
        pixels = photograph(name)
        after = {f"JPEG {quality}": share(as_jpeg(pixels, quality)) for quality in QUALITIES}
        shares.append({"photograph": name, "as it is": share(pixels), **after})
    print(report.table(results, COLUMNS), report.table(shares, SHARES), sep="\n\n")
    if args.json:
        report.write(args.json, results, photographs=shares)


if __name__ == "__main__":
    main()
