"""Compares tile sizes and overlaps of the denoiser: seams, difference from one tile, and cost, as a table.

    python -m experiments.tiles.denoiser --json results/tiling.json

The pocket bundle (or --bundle) upscales photographs by 4 at one seed. Nearness is PSNR against the same image made
from one tile. Cost is counted for the full-size networks, relative to tiles of 64 without overlap.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from lab import report, sizes
from lab.quality.metrics import BUILT_IN, psnr, seam
from seesr import Settings, Upscaler
from seesr.networks import weights
from seesr.networks.attention import Tokens
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.runtime import tiling

LAYOUTS = ((64, 6), (64, 8), (64, 16), (64, 32), (96, 16), (96, 32), (128, 16))
SIDES = (2048, 4096, 8192)  # of the outputs whose cost is counted, pixels


@functools.cache
def tile_tflop(side: int) -> float:
    """Of one step of the full-size networks on one tile."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**sizes.UNET)
        controlnet = ControlNetModel(**sizes.BLOCKS)
        z, t, features = torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 320, side, side)
        context = (Tokens(torch.empty(1, 77, 1024)), Tokens(torch.empty(1, 145, 512)))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(z, t, context)
        controlnet(z, t, context, features)
    return counter.get_total_flops() / 1e12


def plain(side: int) -> float:
    """TFLOP of a step on tiles of 64 side by side."""
    return (side / 8 / 64) ** 2 * tile_tflop(64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=weights.POCKET)
    parser.add_argument("--side", type=int, default=160, help="side of the small images, pixels")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    upscaler = Upscaler.load(args.bundle, "cpu")
    factor = upscaler.networks.factor
    base = Settings(num_inference_steps=args.steps, seed=1)
    small = [Image.fromarray(getattr(skimage.data, name)()).resize((args.side, args.side)) for name in BUILT_IN]
    whole = dataclasses.replace(base, latent_tiled_size=256, latent_tiled_overlap=0)
    expected = [np.asarray(upscaler(image, whole).image) for image in small]
    rows: list[dict[str, Any]] = []
    for tile, overlap in LAYOUTS:
        settings = dataclasses.replace(base, latent_tiled_size=tile, latent_tiled_overlap=overlap)
        tiled = [np.asarray(upscaler(image, settings).image) for image in small]
        pairs = list(zip(tiled, expected, strict=True))
        seams = [seam(a, tile, overlap, factor) / seam(b, tile, overlap, factor) for a, b in pairs]
        row = {"tile": tile, "overlap": overlap, "seam": float(np.mean(seams))}
        row["psnr_to_one_tile"] = float(np.mean([psnr(*pair) for pair in pairs]))
        for side in SIDES:
            count = len(tiling.grid(side // 8, side // 8, tile, overlap))
            row[f"cost at {side} px"] = count * tile_tflop(tile) / plain(side)
        rows.append(row)
    costs = {f"cost at {side} px": ".2f" for side in SIDES}
    print(report.table(rows, {"tile": "", "overlap": "", "seam": ".3f", "psnr_to_one_tile": ".1f", **costs}))
    if args.json:
        report.write(args.json, rows)


if __name__ == "__main__":
    main()
