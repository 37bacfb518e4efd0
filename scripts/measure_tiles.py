"""How near the tiled autoencoder comes to one pass over the whole picture, and what it costs: a table and a picture.

    python scripts/measure_tiles.py --json docs/decisions/tiles.json --map docs/decisions/tiles.png

The full-size AutoencoderKL with made-up weights (or that of --bundle) on a photograph in 2 x 2 tiles; beside it the
SeeSR reference's tiles: norms without the variance between tiles, attention within a tile.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import full_size
import numpy as np
import reference
import skimage.data
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from seesr import autoencoder, models
from seesr.budget import Budget

EVERYTHING = 2**40
FACTOR = 8


def psnr(a: Tensor, b: Tensor) -> float:
    """Against the range of b, dB."""
    return -10 * math.log10(max(1e-30, (a - b).square().mean().item()) / (b.max() - b.min()).item() ** 2)


@torch.no_grad()
def measure(vae: Any, picture: Tensor, tile: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Rows of the table, and the differences of ours and of the reference after decoding, [3, H, W]."""
    scaling, cells = vae.config["scaling_factor"], tuple(side // FACTOR for side in picture.shape[2:])
    rows: list[dict[str, Any]] = []

    def add(stage: str, method: str, work: Callable[[], Tensor], expected: Tensor | None) -> Tensor:
        started = time.perf_counter()
        found = work()
        row = {"stage": stage, "method": method, "seconds": time.perf_counter() - started}
        rows.append(row | ({} if expected is None else {"psnr": psnr(found, expected)}))
        print(rows[-1], flush=True)
        return found

    def encode(hold: int) -> Tensor:
        return autoencoder.encode(vae, lambda t: t.times(FACTOR).of(picture), cells, None, Budget(hold=hold))

    def reference_encode() -> Tensor:
        return vae.quant_conv(reference.tiled_encoder(vae.encoder, 2 * picture - 1, FACTOR * tile)).chunk(2, 1)[0]

    z = add("encode", "un-tiled", lambda: vae.encode(2 * picture - 1).latent_dist.mean * scaling, None)
    whole = add("decode", "un-tiled", lambda: vae.decode(z / scaling).sample[0] / 2 + 0.5, None)
    differences = []
    for halo in (4, 8, 12):
        autoencoder.HALO, autoencoder.TILE = halo, tile + halo  # two a row, which overlap by two halos
        add("encode", f"ours, halo {halo}", lambda: encode(EVERYTHING), z)
        work = functools.partial(autoencoder.decode, vae, z, FACTOR, Budget(hold=EVERYTHING))
        found = add("decode", f"ours, halo {halo}", work, whole)
        if halo == 8:
            differences.append(found - whole)
            for share in (4, 16):
                hold = 2 * 4 * 128 * picture.shape[2] * picture.shape[3] // share
                add("encode", f"ours, halo 8, 1/{share} of the memory", lambda hold=hold: encode(hold), z)
                work = functools.partial(autoencoder.decode, vae, z, FACTOR, Budget(hold=hold))
                add("decode", f"ours, halo 8, 1/{share} of the memory", work, whole)
    add("encode", "reference's tiles", lambda: reference_encode() * scaling, z)

    def reference_decode() -> Tensor:
        return reference.tiled_decoder(vae.decoder, vae.post_quant_conv(z / scaling), tile)[0] / 2 + 0.5

    differences.append(add("decode", "reference's tiles", reference_decode, whole) - whole)
    return rows, differences[0], differences[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--side", type=int, default=512, help="of the picture, pixels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--map", type=Path, help="PNG: ours and the reference's difference, by their own largest value")
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.bundle:
        vae = models.autoencoder(args.bundle / "vae", device, torch.float32)
    else:
        vae = full_size.filled(lambda: AutoencoderKL(**full_size.VAE), 3, device, torch.float32)
    photo = Image.fromarray(skimage.data.astronaut()).resize((args.side, args.side), Image.Resampling.BICUBIC)
    picture = torch.from_numpy(np.asarray(photo, np.float32) / 255).permute(2, 0, 1)[None].to(device)
    rows, *differences = measure(vae, picture, args.side // FACTOR // 2)
    print("| stage | tiles | PSNR to un-tiled, dB | seconds |\n| --- | --- | --- | --- |")
    for row in rows:
        near = f"{row['psnr']:.1f}" if "psnr" in row else ""
        print(f"| {row['stage']} | {row['method']} | {near} | {row['seconds']:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    if args.map:
        grey = [d.abs().mean(0).cpu().numpy() for d in differences]
        panels = [(255 * panel / max(panel.max(), 1e-12)).astype(np.uint8) for panel in grey]
        Image.fromarray(np.concatenate(panels, axis=1)).resize((1024, 512)).save(args.map)
        print("largest difference:", ", ".join(f"{panel.max():.2g}" for panel in grey))


if __name__ == "__main__":
    main()
