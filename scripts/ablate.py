"""Does every input of the denoiser do something sensible? Each is taken away in turn and the result measured.

    python scripts/ablate.py --json docs/decisions/ablation.json

Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import degradations
import evaluate
import numpy as np
import torch

from seesr import Settings, Upscaler
from seesr.image import Picture
from seesr.upscaler import Job

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
    job = Job(upscaler.networks, settings, Picture(low))
    tags, image_tokens = job.tag()
    words = job.encode_text([] if variant in ("prompt without tags", "negative prompt as prompt") else tags)
    if variant == "image tokens zeroed":
        image_tokens = torch.zeros_like(image_tokens)
    hint = job.enlarge()
    z, noise = job.start(hint)
    denoiser = job.denoiser(hint, words, image_tokens, z.shape[2:])
    if variant == "no ControlNet":
        denoiser = dataclasses.replace(denoiser, conditioning=0.0)
    z, _, _ = job.denoise(denoiser, z, noise)
    return job.finish(job.decode(z), hint).rgb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the degradation")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    upscaler = Upscaler.load(args.bundle, args.device)
    rows: list[dict[str, Any]] = []
    for degradation in DEGRADATIONS:
        for name, high in evaluate.built_in():
            for seed in args.seeds if degradation != "clean" else [0]:
                low = degradations.BY_NAME[degradation](high, seed)
                for variant in VARIANTS:
                    found = evaluate.measure(restore(upscaler, low, args.steps, variant), high)
                    rows.append({"degradation": degradation, "picture": name, "variant": variant, **found})
    print("| degradation | variant | PSNR y | change | SSIM y | NIQE |\n|" + " --- |" * 6)
    for degradation in DEGRADATIONS:
        base = 0.0
        for variant in VARIANTS:
            mine = [r for r in rows if (r["degradation"], r["variant"]) == (degradation, variant)]
            psnr, ssim, niqe = (float(np.mean([r[key] for r in mine])) for key in ("psnr_y", "ssim_y", "niqe"))
            base = psnr if variant == "all" else base
            print(f"| {degradation} | {variant} | {psnr:.2f} | {psnr - base:+.2f} | {ssim:.4f} | {niqe:.2f} |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
