"""Profiles one denoising step or one image: kernels by their share of the time, and the idle time of the device.

    python -m lab.speed.profile --device cuda --batch 8 --json FILE        one step on eight tiles
    python -m lab.speed.profile --device cuda --image 2048 --json FILE   a whole image of that side, 2 steps

Without --bundle the networks have the full sizes and made-up weights.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from lab import report, sizes
from lab.speed.bench import photograph
from lab.speed.timing import least_seconds
from seesr import Progress, Settings
from seesr.networks import hardware, models
from seesr.networks.attention import Tokens
from seesr.networks.graphs import Graphs
from seesr.pipeline import sampling
from seesr.pipeline.denoiser import Denoiser
from seesr.pipeline.pipeline import UpscaleRun
from seesr.runtime import precision, tiling

TOP = 25


def build_step(networks: models.Models, batch: int, side: int, graphs: Graphs | None = None) -> Any:
    """A function that runs one step on `batch` tiles of `side` latent pixels."""
    device, dtype = networks.device, networks.dtype
    config = networks.unet.config
    channels, text, image = (
        config["in_channels"],
        config["cross_attention_dim"],
        networks.tagger.image_proj.out_features,
    )
    denoiser = Denoiser(
        unet=networks.unet,
        controlnet=networks.controlnet,
        text=Tokens(torch.randn(1, 77, text, device=device, dtype=dtype)),
        image=Tokens(torch.randn(1, 145, image, device=device, dtype=dtype)),
        conditioning=lambda tile: torch.rand(1, 3, side * networks.factor, side * networks.factor, device=device),
        tiles=[],
        weight=torch.ones(side, side),
        graphs=graphs,
    )
    z = torch.randn(batch, channels, side, side, device=device)
    t = torch.full((batch,), sampling.START, device=device)
    conditioning = denoiser.conditioning_features(tiling.Tile(0, 0, side, side)).repeat(batch, 1, 1, 1)
    return lambda: denoiser.predict(z, t, conditioning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--image", type=int, help="side of the result, pixels")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = precision.working_dtype(device)
    networks = models.load(args.bundle, device, dtype) if args.bundle else sizes.build(device, dtype)
    attention = hardware.tune(networks)
    if args.image:
        image, settings = photograph(args.image // 4), Settings(num_inference_steps=2, seed=1)
        step = lambda: UpscaleRun(networks, settings, image, Progress()).run()  # noqa: E731
        args.batch = 1
    else:
        step = build_step(networks, args.batch, args.tile)
    least = least_seconds(step, device, times=5)
    with profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA] if device.type == "cuda" else None
    ) as profiled:
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        wall = time.perf_counter() - started
    on_gpu = device.type == "cuda"
    rows = []
    for event in profiled.key_averages():
        if on_gpu == (event.device_type == DeviceType.CUDA):
            micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            rows.append({"name": event.key[:120], "calls": event.count, "seconds": micro / 1e6})
    rows.sort(key=lambda row: -row["seconds"])
    busy = sum(row["seconds"] for row in rows)
    summary = {
        "device": hardware.name(device),
        "attention": attention,
        "image": args.image,
        "batch": args.batch,
        "tile": args.tile,
        "seconds_per_step": least,
        "seconds_per_tile": least / args.batch,
        "profiled_wall_seconds": wall,
        "busy_seconds": busy,
        "launches": sum(row["calls"] for row in rows),
        "idle_share_of_an_unprofiled_step": max(0.0, 1 - busy / least),
    }
    kernels = [{**row, "share": row["seconds"] / busy} for row in rows[:TOP]]
    report.write(args.json, kernels, **summary)
    print(summary)
    print(report.table(kernels[:10], {"share": ".1%", "calls": "", "name": ""}))


if __name__ == "__main__":
    main()
