"""Degrades images, restores them and measures the results: a table, a JSON file and a sheet of images.

    python -m lab.quality.evaluate --bundle weights/pocket             the built-in set, clean x4
    python -m lab.quality.evaluate --degradation realesrgan --seeds 1 2 3
    python -m lab.quality.evaluate --set held-out --degradation mild   Debian's images that were not trained on
    python -m lab.quality.evaluate --degradation realesrgan-noiseless  the same draws without their noise and JPEG
    python -m lab.quality.evaluate --hr DIV2K/HR --bundle weights/full --steps 1 2 4
    python -m lab.quality.evaluate --hr RealSR/HR --lr RealSR/LR       pairs, nothing is degraded

Needs the `eval` extra. See lab/quality/metrics.py for what is measured.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lab import report
from lab.quality import degradations
from lab.quality.degradations import SCALE, Rgb
from lab.quality.metrics import built_in, colour_shift, cut, interval, measure, seam
from seesr import Settings, Upscaler
from seesr.images.image_data import resize, to_uint8
from seesr.images.read import decode, read_file
from seesr.networks import weights
from seesr.settings.settings import TRAINED_SIDE

COLUMNS = {
    "method": "", "psnr_y": ".2f", "psnr_rgb": ".2f", "ssim_y": ".4f", "ssim_rgb": ".4f", "niqe": ".2f",
    "delta_e": ".2f", "shift": ".2f",
    "seam": ".2f", "seconds": ".2f", "gain y, dB": "+.2f", "95 %": "", "least": "+.2f",
}  # fmt: skip


SIDE = 512  # of the middle of a held-out image


def held_out() -> Iterator[tuple[str, Rgb]]:
    """The middle of each of Debian's images that the pocket model was not trained on."""
    from lab.quality.photographs import photographs

    for kind, result in photographs(held_out=True).items():
        for number, image in enumerate(result):
            top, left = (max(0, (side - SIDE) // 2) for side in image.shape[:2])
            yield f"{kind}-{number}", cut(image[top : top + SIDE, left : left + SIDE])


SETS = {"built-in": built_in, "held-out": held_out}


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    low: Rgb
    high: Rgb


def measure_pair(restored: Rgb, pair: Pair, factor: int, side: int = TRAINED_SIDE) -> dict[str, float]:
    """Against the truth and the input; the seam at the borders of tiles of `side` latent pixels."""
    seams = seam(restored, side, Settings.latent_tiled_overlap, factor)
    return {**measure(restored, pair.high), "shift": colour_shift(restored, pair.low), "seam": seams}


def pairs(args: argparse.Namespace) -> Iterator[Pair]:
    """Low and high resolution images; the high one is cut to a multiple of the scale."""
    for seed in args.seeds:
        if args.hr is None:
            sources = list(SETS[args.set]())
        else:
            files = sorted(
                path for path in args.hr.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
            )
            sources = [(path.name, cut(to_uint8(decode(read_file(path)).rgb))) for path in files]
        for name, high in sources:
            if args.lr is None:
                low = degradations.BY_NAME[args.degradation](high, seed)
            else:
                low = to_uint8(decode(read_file(args.lr / name)).rgb)
            yield Pair(f"{name}/{seed}", low, high)


def evaluate(upscaler: Upscaler, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[Rgb]]]:
    """One row per image and method, and for each image: input, bicubic, Lanczos, ours, truth."""
    rows, sheet = [], []
    factor = upscaler.networks.factor
    for pair in pairs(args):
        size = pair.high.shape[1], pair.high.shape[0]
        filters = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
        shown = [resize(pair.low, size, Image.Resampling.NEAREST)]
        for name, resample in filters.items():
            interpolated = resize(pair.low, size, resample)
            rows.append({"picture": pair.name, "method": name, **measure_pair(interpolated, pair, factor)})
            shown.append(interpolated)
        for steps in args.steps:
            settings = Settings(scale_factor=SCALE, num_inference_steps=steps, seed=args.seed, cfg_scale=args.cfg_scale)
            result = upscaler(Image.fromarray(pair.low), settings)
            ours = np.asarray(result.image)
            side = result.metrics["tile_size"]
            measured = {**measure_pair(ours, pair, factor, side), "seconds": sum(result.metrics["seconds"].values())}
            name = f"ours, {steps} steps"
            rows.append({"picture": pair.name, "method": name, **measured, "tags": result.metrics["tags"]})
        sheet.append([*shown, ours, pair.high])
    return rows, sheet


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means per method, the luma gain over bicubic with its interval, and the smallest gain."""
    bicubic = {row["picture"]: row["psnr_y"] for row in rows if row["method"] == "bicubic"}
    means = []
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        gains = [row["psnr_y"] - bicubic[row["picture"]] for row in group]
        numbers = [name for name, form in COLUMNS.items() if form and all(name in row for row in group)]
        low, high = interval(gains)
        means.append(
            {"method": method, **{name: float(np.mean([row[name] for row in group])) for name in numbers}}
            | {"gain y, dB": float(np.mean(gains)), "95 %": f"{low:+.2f} .. {high:+.2f}", "least": min(gains)}
        )
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--set", choices=SETS, default="built-in")
    parser.add_argument("--hr", type=Path, help="folder of high-resolution images, instead of a set")
    parser.add_argument("--lr", type=Path, help="folder of low-resolution images of the same names")
    parser.add_argument("--degradation", choices=degradations.BY_NAME, default="clean")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cfg-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1, help="seed of the sampler")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of the degradation")
    parser.add_argument("--json", type=Path, help="write every row and the means")
    parser.add_argument("--sheet", type=Path, help="write input, bicubic, Lanczos, ours, truth as one PNG per image")
    args = parser.parse_args()
    rows, sheet = evaluate(Upscaler.load(args.bundle or weights.locate(), args.device), args)
    means = summary(rows)
    print(report.table(means, COLUMNS))
    if args.json:
        report.write(args.json, rows, means=means)
    if args.sheet:
        args.sheet.mkdir(parents=True, exist_ok=True)
        for number, shown in enumerate(sheet):
            Image.fromarray(np.concatenate(shown, axis=1)).save(args.sheet / f"{number}.png")


if __name__ == "__main__":
    main()
