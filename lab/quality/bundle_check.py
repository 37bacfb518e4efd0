"""Restores upstream's sample images with a bundle and checks whether the results are plausible.

    python -m lab.quality.bundle_check OUT --bundle weights/full [--image FILE]

Writes the images and bundle_check.json to OUT. Exits with 1 when a result is not plausible.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seesr import Settings, Upscaler

SIDES = (128, 256)  # of the samples, pixels: 128 is upstream's test size, restored at 4x
MIN_FAITHFUL = 18.0  # dB: a result of another scene, or one of noise, is below
CONTRAST = (0.5, 2.0)  # of the result's standard deviation to that of the bicubic upscale
SHARPER = 1.0  # of the mean gradient to that of the bicubic upscale, at least


def samples(image: Path | None) -> list[tuple[str, Image.Image]]:
    """(name, image) of every sample: the file as it is, or a photograph that scikit-image ships, made small."""
    if image is not None:
        with Image.open(image) as opened:
            return [(image.stem, opened.convert("RGB"))]
    from skimage import data

    photo = Image.fromarray(data.astronaut())
    return [(f"astronaut-{side}", photo.resize((side, side), Image.Resampling.BOX)) for side in SIDES]


def gradient(pixels: np.ndarray) -> float:
    """Mean absolute difference of neighbours, levels."""
    return float(np.abs(np.diff(pixels.astype(np.float32), axis=1)).mean())


def faults(bicubic: np.ndarray, result: np.ndarray, metrics: Any) -> list[str]:
    """Why a result is not plausible; empty when it is.

    Args:
        bicubic: [H, W, 3] uint8, the bicubic upscale.
        result: [H, W, 3] uint8.
        metrics: of the run: tags, float32_retries, faithful.
    """
    results = []
    if not metrics["tags"]:
        results.append("the tagger found no tags")
    if metrics["float32_retries"]:
        results.append(f"{metrics['float32_retries']} parts were computed again in float32")
    if metrics["faithful"] < MIN_FAITHFUL:
        results.append(f"faithful is {metrics['faithful']} dB, below {MIN_FAITHFUL}")
    contrast = float(result.std()) / max(float(bicubic.std()), 1e-6)
    if not CONTRAST[0] <= contrast <= CONTRAST[1]:
        results.append(
            f"the contrast is {contrast:.2f} of the bicubic upscale's, not from {CONTRAST[0]} to {CONTRAST[1]}"
        )
    sharper = gradient(result) / max(gradient(bicubic), 1e-6)
    if sharper < SHARPER:
        results.append(f"the gradients are {sharper:.2f} of the bicubic upscale's: nothing was added")
    return results


def restore(bundle: Path, out: Path, images: list[tuple[str, Image.Image]], device: str | None = None,
            settings: Settings | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Restores every image and saves it beside its bicubic upscale.

    Args:
        bundle: folder of a bundle.
        out: folder for the images.
        settings: four times, one seed, the bundle's own steps unless given.

    Returns:
        A row for each image: name, size, tags, float32_retries, faithful, faults, plausible.

    Raises:
        WeightsError: the bundle is missing or damaged.
    """
    upscaler = Upscaler.load(bundle, device)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, image in images:
        output = upscaler(image, settings or Settings(scale_factor=4, seed=1))
        result = output.image.convert("RGB")
        bicubic = image.resize(result.size, Image.Resampling.BICUBIC)
        result.save(out / f"{name}-x4.png")
        bicubic.save(out / f"{name}-bicubic.png")
        metrics: Any = output.metrics
        outcome = faults(np.asarray(bicubic), np.asarray(result), metrics)
        rows.append(
            {
                "name": name,
                "size": "x".join(map(str, image.size)),
                **{key: metrics[key] for key in ("tags", "float32_retries", "faithful")},
                "faults": outcome,
                "plausible": not outcome,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--device")
    args = parser.parse_args()
    rows = restore(args.bundle, args.out, samples(args.image), args.device)
    (args.out / "bundle_check.json").write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        message = "plausible" if row["plausible"] else f"NOT plausible: {'; '.join(row['faults'])}"
        print(f"{row['name']} ({row['size']}): faithful {row['faithful']} dB, {row['tags'] or 'no tags'}: {message}")
    sys.exit(not all(row["plausible"] for row in rows))


if __name__ == "__main__":
    main()
