"""Measures the `fidelity` setting against alternative methods, and measures the presets.

    python -m lab.quality.fidelity --json results/fidelity.json --curve FILE --sheet FILE
    python -m lab.quality.fidelity --presets --json results/presets.json

Both use the built-in set, downscaled by 4 without damage, and the pocket model unless --bundle is set. The methods:

- `ours`: the setting. It removes low-frequency differences from the bicubic upscale before high-frequency ones.
- `pixels`: mixes the finished image with the bicubic upscale.
- `latents`: mixes the clean latents with the latents of the input before decoding.
- `ours, particles`: the setting with use_kds, weighted by the disagreement of the particles.
- `flat particles`: the same with equal weights.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
from torch import Tensor

from lab import report
from lab.quality import degradations
from lab.quality.degradations import SCALE, Rgb
from lab.quality.metrics import built_in, luma, measure, niqe, psnr
from seesr import Progress, Settings, Upscaler
from seesr.images.image_data import ImageData, resize
from seesr.networks import weights
from seesr.pipeline.pipeline import UpscaleRun
from seesr.pipeline.postprocess import blend_bicubic, trust
from seesr.pipeline.sampling import Update
from seesr.runtime.shared_tiles import SharedTiles
from seesr.settings.presets import PRESETS
from seesr.vae.autoencoder import Posterior

VALUES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
STEPS = 2
SHOWN = (0.0, 0.25, 0.5, 0.75, 1.0)
COLUMNS = {
    "way": "", "fidelity": ".3f", "psnr to plain": ".2f", "psnr to truth": ".2f", "sharpness": ".3f", "niqe": ".2f",
    "invented": ".4f", "faithful": ".2f",
}  # fmt: skip


class MixedLatents(UpscaleRun):
    """Mixes the clean latents with those of the input."""

    amount = 0.0

    def start(self, posterior: Posterior) -> tuple[Tensor, Update]:
        self.clean = posterior.mean()
        return super().start(posterior)

    def decode(self, z: Tensor, share: SharedTiles | None = None) -> Tensor:
        return super().decode(z + self.amount * (self.clean - z), share)


def of_latents(upscaler: Upscaler, low: ImageData, value: float) -> Rgb:
    job = MixedLatents(upscaler.networks, Settings(seed=1, num_inference_steps=STEPS), low, Progress())
    job.amount = value
    return job.run().image_data.rgb


def of_product(upscaler: Upscaler, low: ImageData, value: float, **changes: Any) -> Rgb:
    settings = Settings(seed=1, fidelity=value, num_inference_steps=STEPS, **changes)
    return upscaler(low, settings).image_data.rgb


@functools.lru_cache(maxsize=4)
def model_of(upscaler: Upscaler, data: bytes, shape: tuple[int, ...], particles: bool) -> Rgb:
    """The output of the model without `fidelity`, computed once per input."""
    low = ImageData(np.frombuffer(data, np.uint8).reshape(shape))
    return of_product(upscaler, low, 0.0, use_kds=particles)


def of_pixels(upscaler: Upscaler, low: ImageData, value: float) -> Rgb:
    model = model_of(upscaler, low.rgb.tobytes(), low.rgb.shape, False).astype(np.float32)
    bicubic = resize(low.rgb, (model.shape[1], model.shape[0])).astype(np.float32)
    return (model + value * (bicubic - model)).round().astype(np.uint8)


def flat_particles(upscaler: Upscaler, low: ImageData, value: float) -> Rgb:
    model = model_of(upscaler, low.rgb.tobytes(), low.rgb.shape, True)
    return blend_bicubic(model, resize(low.rgb, (model.shape[1], model.shape[0])), value, (), SCALE / 2)


METHODS: dict[str, Callable[[Upscaler, ImageData, float], Rgb]] = {
    "ours": of_product,
    "pixels": of_pixels,
    "latents": of_latents,
    "ours, particles": functools.partial(of_product, use_kds=True),
    "flat particles": flat_particles,
}


def sharpness(image: Rgb) -> float:
    """Mean luma step between neighbours; needs no reference."""
    return float(np.abs(np.diff(luma(image), axis=1)).mean())


def compare(upscaler: Upscaler) -> list[dict[str, Any]]:
    """One row per method and value of `fidelity`: means over the set."""
    rows = []
    for way, upscale in METHODS.items():
        for value in VALUES:
            results = []
            for _, high in built_in():
                low = ImageData(degradations.clean(high, 0))
                ours, bicubic = upscale(upscaler, low, value), resize(low.rgb, (high.shape[1], high.shape[0]))
                results.append({
                    "psnr to plain": min(99.0, psnr(luma(ours), luma(bicubic))),
                    "psnr to truth": psnr(luma(ours), luma(high)),
                    "sharpness": sharpness(ours),
                    "niqe": niqe(ours),
                    **trust(ours, bicubic, low.rgb),
                })  # fmt: skip
            means = {name: float(np.mean([row[name] for row in results])) for name in results[0]}
            rows.append({"way": way, "fidelity": value, **means})
            print(rows[-1], flush=True)
    return rows


def presets(upscaler: Upscaler) -> list[dict[str, Any]]:
    """One row per preset: means over the set."""
    rows = []
    for name, values in PRESETS.items():
        measured, seconds = [], []
        for _, high in built_in():
            result = upscaler(ImageData(degradations.clean(high, 0)), Settings(seed=1, **values))
            trusted = {key: result.metrics[key] for key in ("invented", "faithful")}
            measured.append({**measure(result.image_data.rgb, high), **trusted})
            seconds.append(sum(result.metrics["seconds"].values()))
        means = {key: float(np.mean([row[key] for row in measured])) for key in measured[0]}
        rows.append({"preset": name, **means, "seconds": float(np.mean(seconds))})
        print(rows[-1], flush=True)
    return rows


def curve(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots PSNR to the truth over sharpness, one line per method."""
    figure, axes = plt.subplots(figsize=(6.4, 4), dpi=110)
    for way in METHODS:
        points = [row for row in rows if row["way"] == way]
        axes.plot([row["sharpness"] for row in points], [row["psnr to truth"] for row in points], marker=".", label=way)
    axes.set(xlabel="sharpness (mean luma step)", ylabel="PSNR to the truth, dB")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)


def sheet(upscaler: Upscaler, path: Path) -> None:
    """Writes 100 % crops at the values SHOWN, left to right, one row per image of the set."""
    places = {"astronaut": (60, 150), "chelsea": (60, 130), "coffee": (110, 260)}
    rows = []
    for name, high in built_in():
        low, (top, left) = ImageData(degradations.clean(high, 0)), places[name]
        crops = [of_product(upscaler, low, value)[top : top + 200, left : left + 200] for value in SHOWN]
        rows.append(np.concatenate(crops, axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--presets", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--curve", type=Path)
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    upscaler = Upscaler.load(args.bundle or weights.locate(), args.device)
    rows = presets(upscaler) if args.presets else compare(upscaler)
    if args.json:
        report.write(args.json, rows)
    if args.curve:
        curve(rows, args.curve)
    if args.sheet:
        sheet(upscaler, args.sheet)


if __name__ == "__main__":
    main()
