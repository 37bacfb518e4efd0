"""Measures the share of the work that a region needs, and checks that its pixels are those of the whole output.

python -m lab.quality.region --json results/region.json --png docs/region.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import skimage.data

from lab import report
from seesr import Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.pipeline.outline import outline_of
from seesr.pipeline.work import Outline, plan

SIDES = (944, 2048, 4096, 8192)  # of square outputs, pixels
SHARES = (0.004, 0.01, 0.1, 0.25)  # of their area
COLUMNS = {"output": "", "region": "", "area": ".1%", "tiles": "d", "corner": ".1%", "middle": ".1%"}
SHOWN = (232, 140, 160, 160)  # left, top, width, height in the image's output
FACTOR = 3  # of the region in the image


def tiles(outline: Outline, side: int, place: tuple[int, int, int, int] | None) -> int:
    region = "" if place is None else ",".join(map(str, place))
    return plan(outline, Settings(region=region, latent_tiled_size=64), (side // 4, side // 4)).tiles


def row(outline: Outline, side: int, share: float) -> dict[str, Any]:
    """The share of the tiles that a square region needs, in a corner and in the middle."""
    region_side, whole = round(side * share**0.5), tiles(outline, side, None)
    middle = (side - region_side) // 2
    return {
        "output": f"{side}x{side}",
        "region": f"{region_side}x{region_side}",
        "area": region_side * region_side / side**2,
        "tiles": whole,
        "corner": tiles(outline, side, (0, 0, region_side, region_side)) / whole,
        "middle": tiles(outline, side, (middle, middle, region_side, region_side)) / whole,
    }


def shown(upscaler: Upscaler) -> tuple[np.ndarray, bool]:
    """The whole output with the region framed, the region enlarged beside it, and whether their pixels are equal."""
    source, settings = ImageData(skimage.data.astronaut()[:128, 130:260]), Settings(seed=1)
    whole = upscaler(source, settings).image_data.rgb
    left, top, width, height = SHOWN
    region = upscaler(source, settings.replace(region=",".join(map(str, SHOWN)))).image_data.rgb
    equal = np.array_equal(region, whole[top : top + height, left : left + width])
    large = cv2.resize(region, None, fx=FACTOR, fy=FACTOR, interpolation=cv2.INTER_NEAREST)
    framed = cv2.rectangle(whole.copy(), (left, top), (left + width, top + height), (255, 255, 255), 2)
    canvas = np.full((max(len(framed), len(large)), framed.shape[1] + 8 + large.shape[1], 3), 255, np.uint8)
    canvas[: len(framed), : framed.shape[1]] = framed
    canvas[: len(large), framed.shape[1] + 8 :] = large
    return canvas, equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    upscaler = Upscaler.load(weights.POCKET, "cpu")
    rows = [row(outline_of(upscaler.networks), side, share) for side in SIDES for share in SHARES]
    canvas, equal = shown(upscaler)
    report.write(args.json, rows, same_pixels=equal)
    if args.png:
        cv2.imwrite(str(args.png), canvas[..., ::-1])
    print(report.table(rows, COLUMNS), f"\nthe region's pixels are those of the whole output: {equal}")


if __name__ == "__main__":
    main()
