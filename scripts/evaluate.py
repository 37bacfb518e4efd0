"""Degrades pictures, restores them, and measures: a table, a JSON file and a sheet to look at.

    python scripts/evaluate.py                                  the built-in set, clean x4, pocket bundle
    python scripts/evaluate.py --degradation realesrgan --seeds 1 2 3
    python scripts/evaluate.py --degradation realesrgan-noiseless        the same draws without their noise and JPEG
    python scripts/evaluate.py --hr DIV2K/HR --bundle weights/full --steps 1 2 4
    python scripts/evaluate.py --hr RealSR/HR --lr RealSR/LR    pairs, nothing is degraded

Needs the `eval` extra. PSNR and SSIM cut a border of `scale` pixels; "y" is BT.601 luma from 16 to 235. delta_e is
against the truth, shift against the input after averaging the result down to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import degradations
import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity

from seesr import Settings, Upscaler, image, tiling

Picture = NDArray[np.uint8]
BUILT_IN = ("astronaut", "chelsea", "coffee")  # held out of the pocket model's training
SCALE = degradations.SCALE
COLUMNS = ("psnr_y", "psnr_rgb", "ssim_y", "ssim_rgb", "niqe", "delta_e", "shift", "seam", "seconds")


def luma(picture: Picture) -> NDArray[np.float64]:
    return picture @ (np.array([65.481, 128.553, 24.966]) / 255) + 16


def psnr(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def seam(picture: Picture, tile: int, overlap: int, factor: int) -> float:
    """Mean gradient across tile borders over that of the lines four pixels beside them; 1 if there is one tile."""
    grey = luma(picture)
    across, beside = [], []
    for axis in (0, 1):
        gradient = np.abs(np.diff(grey, axis=axis)).mean(1 - axis)
        cells = -(-grey.shape[axis] // factor)
        starts = tiling.offsets(cells, tile, overlap)
        borders = {factor * edge - 1 for start in starts for edge in (start, start + tile)}
        for line in borders & set(range(4, len(gradient) - 4)):
            across.append(gradient[line])
            beside.append((gradient[line - 4] + gradient[line + 4]) / 2)
    return float(np.mean(across) / np.mean(beside)) if across else 1.0


def colour_shift(found: Picture, low: Picture) -> float:
    """Mean Delta E 2000 between the input and the result averaged down to it: what was done to its colours."""
    return delta_e(degradations.clean(found, 0), low)


def delta_e(a: Picture, b: Picture) -> float:
    return float(deltaE_ciede2000(rgb2lab(a), rgb2lab(b)).mean())


def measure(found: Picture, truth: Picture) -> dict[str, float]:
    from basicsr.metrics.niqe import calculate_niqe

    inner = (slice(SCALE, -SCALE), slice(SCALE, -SCALE))
    a, b = found[inner], truth[inner]
    return {
        "psnr_y": psnr(luma(a), luma(b)),
        "psnr_rgb": psnr(a, b),
        "ssim_y": float(structural_similarity(luma(a), luma(b), data_range=255)),
        "ssim_rgb": float(structural_similarity(a, b, data_range=255, channel_axis=2)),
        "niqe": float(calculate_niqe(found[..., ::-1].astype(np.float32), SCALE)),
        "delta_e": delta_e(a, b),
    }


@dataclasses.dataclass(frozen=True)
class Pair:
    name: str
    low: Picture
    high: Picture


def measure_pair(found: Picture, pair: Pair, factor: int) -> dict[str, float]:
    """Against the truth and the input; the seam at the borders of the default tiles."""
    seams = seam(found, Settings.latent_tiled_size, Settings.latent_tiled_overlap, factor)
    return {**measure(found, pair.high), "shift": colour_shift(found, pair.low), "seam": seams}


def built_in() -> Iterator[tuple[str, Picture]]:
    """Names and pictures of the built-in set."""
    for name in BUILT_IN:
        yield name, cut(getattr(skimage.data, name)())


def cut(high: Picture) -> Picture:
    """To a multiple of the scale."""
    return high[: high.shape[0] // SCALE * SCALE, : high.shape[1] // SCALE * SCALE]


def pairs(args: argparse.Namespace) -> Iterator[Pair]:
    """Low and high resolution pictures; the high one is cut to a multiple of the scale."""
    for seed in args.seeds:
        if args.hr is None:
            sources = list(built_in())
        else:
            files = sorted(
                path for path in args.hr.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")
            )
            sources = [(path.name, cut(image.to_uint8(image.read(path).rgb))) for path in files]
        for name, high in sources:
            if args.lr is None:
                low = degradations.BY_NAME[args.degradation](high, seed)
            else:
                low = image.to_uint8(image.read(args.lr / name).rgb)
            yield Pair(f"{name}/{seed}", low, high)


def interval(values: list[float]) -> tuple[float, float]:
    """The central 95 % of the mean over 2,000 resamplings."""
    rng = np.random.default_rng(0)
    means = np.array(values)[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def evaluate(upscaler: Upscaler, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[list[Picture]]]:
    """One row per picture and method, and for each picture: input, bicubic, Lanczos, ours, truth."""
    rows, sheet = [], []
    factor = upscaler.networks.factor
    for pair in pairs(args):
        size = pair.high.shape[1], pair.high.shape[0]
        filters = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
        shown = [image.enlarge(pair.low, size, Image.Resampling.NEAREST)]
        for name, resample in filters.items():
            plain = image.enlarge(pair.low, size, resample)
            rows.append({"picture": pair.name, "method": name, **measure_pair(plain, pair, factor)})
            shown.append(plain)
        for steps in args.steps:
            settings = Settings(scale_factor=SCALE, num_inference_steps=steps, seed=args.seed, cfg_scale=args.cfg_scale)
            result = upscaler(Image.fromarray(pair.low), settings)
            ours = np.asarray(result.image)
            measured = {**measure_pair(ours, pair, factor), "seconds": sum(result.metrics["seconds"].values())}
            name = f"ours, {steps} steps"
            rows.append({"picture": pair.name, "method": name, **measured, "tags": result.metrics["tags"]})
        sheet.append([*shown, ours, pair.high])
    return rows, sheet


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means per method, the luma gain over bicubic with its interval, and the smallest gain."""
    bicubic = {row["picture"]: row["psnr_y"] for row in rows if row["method"] == "bicubic"}
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        gains = [row["psnr_y"] - bicubic[row["picture"]] for row in mine]
        means = {c: float(np.mean([row[c] for row in mine])) for c in COLUMNS if all(c in row for row in mine)}
        found.append(
            {"method": method, **means, "gain": float(np.mean(gains)), "gain_95": interval(gains), "least": min(gains)}
        )
    return found


def table(found: list[dict[str, Any]]) -> str:
    heads = ("method", *COLUMNS, "gain y, dB", "95 %", "least")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in found:
        cells = [f"{row[c]:.4f}" if "ssim" in c else f"{row[c]:.2f}" if c in row else "" for c in COLUMNS]
        low, high = row["gain_95"]
        gains = [f"{row['gain']:+.2f}", f"{low:+.2f} .. {high:+.2f}", f"{row['least']:+.2f}"]
        lines.append("| " + " | ".join([row["method"], *cells, *gains]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--hr", type=Path, help="folder of high-resolution pictures (default: the built-in set)")
    parser.add_argument("--lr", type=Path, help="folder of low-resolution pictures of the same names")
    parser.add_argument("--degradation", choices=degradations.BY_NAME, default="clean")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--cfg-scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1, help="of the sampler")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the degradation")
    parser.add_argument("--json", type=Path, help="write every row and the means")
    parser.add_argument("--sheet", type=Path, help="write input, bicubic, Lanczos, ours, truth as one PNG per picture")
    args = parser.parse_args()
    rows, sheet = evaluate(Upscaler.load(args.bundle, args.device), args)
    found = summary(rows)
    print(table(found))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": given, "means": found, "rows": rows}, indent=1) + "\n")
    if args.sheet:
        args.sheet.mkdir(parents=True, exist_ok=True)
        for number, shown in enumerate(sheet):
            Image.fromarray(np.concatenate(shown, axis=1)).save(args.sheet / f"{number}.png")


if __name__ == "__main__":
    main()
