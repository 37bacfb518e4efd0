"""Compares steering with alternatives of the same cost: one sample, averages, choices, Kernel Density Steering.

    python -m lab.quality.particles --bundle weights/pocket --json results/steering.json

All start from the same noise and step deterministically. "best" picks by PSNR against the truth, which no user can.
Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from torch import Tensor

from lab import report
from lab.quality import degradations
from lab.quality.metrics import BUILT_IN, luma, measure, psnr
from seesr import Progress, Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.pipeline import sampling, steering
from seesr.pipeline.pipeline import UpscaleRun

COUNTS = (2, 4, 10)
SIDE = 256  # pixels of the truth: the middle of every built-in image


def middle(image: np.ndarray) -> np.ndarray:
    top, left = ((side - SIDE) // 2 for side in image.shape[:2])
    return image[top : top + SIDE, left : left + SIDE]


def grid_lines(z: Tensor, patch: int) -> float:
    """Mean step of latents [1, C, H, W] across the borders of the steering patches, over the mean step inside them."""
    ratios = []
    for axis in (2, 3):
        steps = z.diff(dim=axis).abs().mean(dim=[d for d in range(4) if d != axis])
        border = torch.arange(len(steps), device=z.device) % patch == patch - 1
        ratios.append((steps[border].mean() / steps[~border].mean()).item())
    return sum(ratios) / 2


class Trial:
    """One image, ready to be denoised from any number of starts."""

    def __init__(self, upscaler: Upscaler, low: np.ndarray, steps: int, seed: int) -> None:
        settings = Settings(num_inference_steps=steps, seed=seed, use_kds=True, num_particles=max(COUNTS))
        self.job = UpscaleRun(upscaler.networks, settings, ImageData(low), Progress())
        tags, image_tokens = self.job.tag()
        self.conditioning, self.bicubic = self.job.enlarge()
        _, text_tokens = self.job.encode_text(tags)
        self.denoiser = self.job.denoiser(self.conditioning, text_tokens, image_tokens, self.job.z_size)
        self.starts, _ = self.job.start(self.job.encode(self.conditioning, self.job.z_size))
        self.steps = sampling.schedule(upscaler.networks.scheduler, steps)

    def sample(self, count: int, steer: sampling.Steer = sampling.unsteered) -> Tensor:
        return sampling.sample(self.denoiser, self.starts[:count], self.steps, sampling.ddim_step, steer)

    def image(self, z: Tensor) -> np.ndarray:
        """Latents [1, C, h, w] -> [H, W, 3]."""
        return self.job.finish(self.job.decode(z), self.conditioning, self.bicubic, None)[0].rgb


def trials(upscaler: Upscaler, low: np.ndarray, high: np.ndarray, steps: int, seed: int) -> list[dict[str, Any]]:
    trial = Trial(upscaler, low, steps, seed)
    area = trial.starts.shape[2], trial.starts.shape[3]
    rows: list[dict[str, Any]] = []

    def add(method: str, count: int, z: Tensor, seconds: float) -> None:
        row = {"steps": steps, "method": method, "particles": count, "seconds": seconds}
        rows.append({**row, **measure(trial.image(z), high)})

    started = time.perf_counter()
    samples = trial.sample(max(COUNTS))
    each = (time.perf_counter() - started) / max(COUNTS)
    add("one sample", 1, samples[:1], each)
    scores = [psnr(luma(trial.image(z[None])), luma(high)) for z in samples]
    for count in COUNTS:
        some = samples[:count]
        index, _ = steering.choose(some, *area)
        best = int(np.argmax(scores[:count]))
        add("latent average", count, some.mean(0, keepdim=True), each * count)
        add("closest to the mean", count, some[index : index + 1], each * count)
        add("best of N", count, some[best : best + 1], each * count)
        ensemble = steering.Ensemble(steering.Steering(), steps, count, area)
        started = time.perf_counter()
        chosen, metrics = ensemble.winner(trial.sample(count, ensemble))
        add("KDS", count, chosen, time.perf_counter() - started)
        rows[-1] |= {"spread_before": metrics["spread_before"], "spread_after": metrics["spread_after"]}
        rows[-1]["grid_lines"] = grid_lines(chosen, ensemble.steering.patch)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the images."""
    means = []
    for key in dict.fromkeys((r["steps"], r["particles"], r["method"]) for r in rows):
        group = [r for r in rows if (r["steps"], r["particles"], r["method"]) == key]
        mean = {name: float(np.mean([r[name] for r in group])) for name in ("psnr_y", "ssim_y", "niqe", "seconds")}
        means.append({"steps": key[0], "method": key[2], "N": key[1], **mean})
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--degradation", choices=degradations.BY_NAME, default="clean")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    upscaler = Upscaler.load(args.bundle or weights.locate(), args.device)
    rows: list[dict[str, Any]] = []
    for name in BUILT_IN:
        high = middle(getattr(skimage.data, name)())
        low = degradations.BY_NAME[args.degradation](high, args.seed)
        for steps in args.steps:
            rows += [{"picture": name, **row} for row in trials(upscaler, low, high, steps, args.seed)]
    means, numbers = summary(rows), {"psnr_y": ".3f", "ssim_y": ".4f", "niqe": ".2f", "seconds": ".2f"}
    print(report.table(means, {"steps": "", "method": "", "N": "", **numbers}))
    if args.json:
        report.write(args.json, rows, means=means, torch=torch.__version__)


if __name__ == "__main__":
    main()
