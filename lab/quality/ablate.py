"""Ablation: removes each input of the denoiser in turn and measures the result.

    python -m lab.quality.ablate --bundle weights/pocket --json results/ablation.json

Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab import report
from lab.quality import degradations
from lab.quality.metrics import built_in, measure
from seesr import Progress, Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.pipeline.pipeline import UpscaleRun

DEGRADATIONS = ("clean", "realesrgan")
VARIANTS = (
    "all",
    "no ControlNet",
    "image tokens zeroed",
    "prompt without tags",
    "negative prompt as prompt",
    "guidance 1.5",
)


def restore(upscaler: Upscaler, low: np.ndarray, steps: int, variant: str) -> np.ndarray:
    """[H, W, 3] low resolution -> restored, with one input of the denoiser changed."""
    settings = Settings(num_inference_steps=steps, seed=1, cfg_scale=1.5 if variant == "guidance 1.5" else 1.0)
    if variant == "negative prompt as prompt":
        settings = dataclasses.replace(settings, positive_prompt=settings.negative_prompt)
    job = UpscaleRun(upscaler.networks, settings, ImageData(low), Progress())
    tags, image_tokens = job.tag()
    _, text_tokens = job.encode_text([] if variant in ("prompt without tags", "negative prompt as prompt") else tags)
    if variant == "image tokens zeroed":
        image_tokens = torch.zeros_like(image_tokens)
    conditioning, bicubic = job.enlarge()
    denoiser = job.denoiser(conditioning, text_tokens, image_tokens, job.z_size)
    if variant == "no ControlNet":
        denoiser = dataclasses.replace(denoiser, conditioning_scale=0.0)
    z, _, _ = job.denoise(denoiser, job.encode(conditioning, job.z_size))
    return job.finish(job.decode(z), conditioning, bicubic, None)[0].rgb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="seeds of the degradation")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    upscaler = Upscaler.load(args.bundle or weights.locate(), args.device)
    rows: list[dict[str, Any]] = []
    for degradation in DEGRADATIONS:
        for name, high in built_in():
            for seed in args.seeds if degradation != "clean" else [0]:
                low = degradations.BY_NAME[degradation](high, seed)
                for variant in VARIANTS:
                    measured = measure(restore(upscaler, low, args.steps, variant), high)
                    rows.append({"degradation": degradation, "picture": name, "variant": variant, **measured})
    means: list[dict[str, Any]] = []
    for degradation in DEGRADATIONS:
        base = 0.0
        for variant in VARIANTS:
            group = [r for r in rows if (r["degradation"], r["variant"]) == (degradation, variant)]
            mean = {key: float(np.mean([r[key] for r in group])) for key in ("psnr_y", "ssim_y", "niqe")}
            base = mean["psnr_y"] if variant == "all" else base
            means.append({"degradation": degradation, "variant": variant, **mean, "change": mean["psnr_y"] - base})
    columns = {"degradation": "", "variant": "", "psnr_y": ".2f", "change": "+.2f", "ssim_y": ".4f", "niqe": ".2f"}
    print(report.table(means, columns))
    if args.json:
        report.write(args.json, rows, means=means)


if __name__ == "__main__":
    main()
