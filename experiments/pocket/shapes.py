"""Counts the operations of candidate shapes of the bundled networks and times them with random weights.

    python -m experiments.pocket.shapes --json results/pocket-shapes.json

Per megapixel of output, for one step without overlap between tiles; CPU seconds of one thread, the least of three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from experiments.pocket.sizes import CONTROLNET, UNET, VAE, WIDTH
from lab import report
from seesr.networks.autoencoders import AutoencoderTiny
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel

SIDE = 384  # of the image that is timed, in pixels
LIGHT = {"num_encoder_blocks": (0, 0, 1), "num_decoder_blocks": (2, 1, 0)}
LIGHT8 = {
    "encoder_block_out_channels": (32,) * 4,
    "decoder_block_out_channels": (32,) * 4,
    "num_encoder_blocks": (0, 0, 0, 1),
    "num_decoder_blocks": (2, 2, 1, 0),
}
# Name -> channels of the levels (attention in the last of three, or of two), changes of the autoencoder.
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "bundle": ((128, 96), {}),
    "f4, attention at 1/4": ((128, 96, 96), LIGHT),
    "f4, 96 channels": ((96, 128, 128), LIGHT),
    "f4, 64 channels": ((64, 96, 96), LIGHT),
    "f8": ((128, 160), LIGHT8),
}
COLUMNS = {"shape": "", "parameters_m": ".2f", "gmac_per_mp": ".0f", "seconds_per_mp": ".2f"}


def least(call: Callable[[], Any]) -> float:
    """CPU seconds of the fastest of three calls."""
    results = []
    for _ in range(3):
        before = time.process_time()
        call()
        results.append(time.process_time() - before)
    return min(results)


@torch.inference_mode()
def measured(name: str) -> dict[str, Any]:
    channels, change = SHAPES[name]
    levels, factor = len(channels), 2 ** (len({**VAE, **change}["num_encoder_blocks"]) - 1)
    blocks = {
        "block_out_channels": channels,
        "attention_head_dim": (2,) * levels,
        "down_block_types": ("DownBlock2D",) * (levels - 1) + ("CrossAttnDownBlock2D",),
    }
    up = ("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1)
    unet = UNet2DConditionModel(**{**UNET, **blocks, "up_block_types": up})
    widths = (16, 32, 64, 64)[: factor.bit_length()]
    controlnet = ControlNetModel(**{**CONTROLNET, **blocks, "conditioning_embedding_out_channels": widths})
    vae = AutoencoderTiny(**{**VAE, **change})
    image, t = torch.rand(1, 3, SIDE, SIDE), torch.tensor([999])
    context = (torch.randn(1, 77, WIDTH), torch.randn(1, 37, WIDTH))

    def step() -> None:
        z = vae.encoder(image)
        vae.decoder(unet(z, t, context, *controlnet(z, t, context, image)))

    with FlopCounterMode(display=False) as counter:
        step()
    megapixels = SIDE**2 / 1e6
    return {
        "shape": name,
        "parameters_m": sum(p.numel() for net in (unet, controlnet, vae) for p in net.parameters()) / 1e6,
        "gmac_per_mp": counter.get_total_flops() / 2e9 / megapixels,
        "seconds_per_mp": least(step) / megapixels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measured(name) for name in SHAPES]
    print(report.table(rows, COLUMNS))
    if args.json:
        report.write(args.json, rows)


if __name__ == "__main__":
    main()
