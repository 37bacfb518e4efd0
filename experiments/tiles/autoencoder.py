"""Compares the tiled autoencoder with one pass over the whole image: difference and cost, as a table and an image.

    python -m experiments.tiles.autoencoder --json results/tiles.json --map results/tiles.png

The full-size AutoencoderKL with made-up weights (or that of --bundle) on a photograph in 2 x 2 tiles; beside it the
SeeSR reference's tiles: norms without the variance between tiles, attention within a tile.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor

from lab import report, sizes
from lab.parity import reference
from lab.quality.metrics import psnr
from seesr import Progress
from seesr.networks import models
from seesr.networks.autoencoders import AutoencoderKL
from seesr.runtime.memory import Budget
from seesr.vae import autoencoder

EVERYTHING = 2**40
FACTOR = 8


@torch.no_grad()
def measure(vae: Any, image: Tensor, tile: int) -> tuple[list[dict[str, Any]], Tensor, Tensor]:
    """Rows of the table, and the differences of ours and of the reference after decoding, [3, H, W]."""
    scaling, latent_size = vae.config["scaling_factor"], tuple(side // FACTOR for side in image.shape[2:])
    rows: list[dict[str, Any]] = []

    def add(stage: str, method: str, work: Callable[[], Tensor], expected: Tensor | None) -> Tensor:
        started = time.perf_counter()
        values = work()
        if values.is_cuda:
            torch.cuda.synchronize()
        row = {"stage": stage, "method": method, "seconds": time.perf_counter() - started}
        values = values.float()
        if expected is not None:
            row["psnr"] = psnr(values.cpu(), expected.cpu(), (expected.max() - expected.min()).item())
        rows.append(row)
        print(row, flush=True)
        return values

    def encode(budget: Budget) -> Tensor:
        pixels = lambda tile: tile.scaled(FACTOR).crop(image)  # noqa: E731
        return autoencoder.encode(vae, pixels, latent_size, budget, Progress()).mean()

    def reference_encode() -> Tensor:
        return vae.quant_conv(reference.tiled_encoder(vae.encoder, 2 * image - 1, FACTOR * tile)).chunk(2, 1)[0]

    z = add("encode", "un-tiled", lambda: vae.encode(2 * image - 1).latent_dist.mean * scaling, None)
    whole = add("decode", "un-tiled", lambda: vae.decode((z / scaling).to(vae.dtype)).sample[0] / 2 + 0.5, None)
    differences = []
    autoencoder.TILE = tile
    strips = Budget(whole=EVERYTHING)
    add("encode", "ours, strips", lambda: encode(strips), z)
    add("decode", "ours, strips", lambda: autoencoder.decode(vae, z, FACTOR, strips, Progress()), whole)
    for halo in (4, 8, 12):
        autoencoder.HALO, autoencoder.TILE = halo, tile + halo  # two a row, which overlap by two halos
        add("encode", f"ours, halo {halo}", lambda: encode(Budget(hold=EVERYTHING)), z)
        work = functools.partial(autoencoder.decode, vae, z, FACTOR, Budget(hold=EVERYTHING), Progress())
        decoded = add("decode", f"ours, halo {halo}", work, whole)
        if halo == 8:
            differences.append(decoded - whole)
            for share in (4, 16):
                hold = 2 * 4 * 128 * image.shape[2] * image.shape[3] // share
                add("encode", f"ours, halo 8, 1/{share} of the memory", lambda hold=hold: encode(Budget(hold=hold)), z)
                work = functools.partial(autoencoder.decode, vae, z, FACTOR, Budget(hold=hold), Progress())
                add("decode", f"ours, halo 8, 1/{share} of the memory", work, whole)
    add("encode", "reference's tiles", lambda: reference_encode() * scaling, z)

    def reference_decode() -> Tensor:
        return reference.tiled_decoder(vae.decoder, vae.post_quant_conv(z / scaling).to(vae.dtype), tile)[0] / 2 + 0.5

    differences.append(add("decode", "reference's tiles", reference_decode, whole) - whole)
    return rows, differences[0], differences[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--side", type=int, default=512, help="side of the image, pixels")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--map", type=Path, help="PNG: ours and the reference's difference, by their own largest value")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    if args.bundle:
        vae = models.autoencoder(args.bundle / "vae", device, dtype)
    else:
        vae = sizes.filled(lambda: AutoencoderKL(**sizes.VAE), 3, device, dtype)
    photo = Image.fromarray(skimage.data.astronaut()).resize((args.side, args.side), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(photo, np.float32) / 255).permute(2, 0, 1)[None].to(device, dtype)
    rows, *differences = measure(vae, image, args.side // FACTOR // 2)
    print(report.table(rows, {"stage": "", "method": "", "psnr": ".1f", "seconds": ".1f"}))
    if args.json:
        report.write(args.json, rows)
    if args.map:
        grey = [d.abs().mean(0).cpu().numpy() for d in differences]
        panels = [(255 * panel / max(panel.max(), 1e-12)).astype(np.uint8) for panel in grey]
        Image.fromarray(np.concatenate(panels, axis=1)).resize((1024, 512)).save(args.map)
        print("largest difference:", ", ".join(f"{panel.max():.2g}" for panel in grey))


if __name__ == "__main__":
    main()
