"""Calibrates the view `confidence`: the disagreement of particles below which the error stays within a bound.

    OMP_NUM_THREADS=1 python -m lab.quality.trust --json results/trust.json --png docs/confidence.png

Windows of the held-out and the built-in photographs are made small, upscaled with particles and compared with the
original, square by square. Finished windows are kept in build/trust, so that a run that was stopped goes on (--seconds
stops it). The photographs are split: CALIBRATION of them give the thresholds, the others test them. The coverage over
random splits is measured, too. The calibration of the chosen bound goes to seesr/pipeline/confidence.json. Needs the
`eval` extra.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lab import report
from lab.quality import degradations
from lab.quality.degradations import Rgb
from lab.quality.metrics import built_in
from lab.quality.photographs import photographs
from seesr import Progress, Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.pipeline import confidence
from seesr.pipeline.confidence import Calibration
from seesr.pipeline.pipeline import UpscaleRun

WORK = Path("build/trust")
SIDE = 256  # of a window, output pixels
SQUARE = 64  # side of a draw, output pixels
CROPS = 3  # windows of a photograph
DAMAGE = ("clean", "mild")
CALIBRATION = 24  # photographs; a level of 95 % needs at least 19
LEVEL = 0.95
ERRORS = (12.0, 16.0, 20.0, 24.0, 32.0)  # bounds that are measured, levels of 255
CHOSEN = 20.0  # the bound of the view
SPLITS = 200
COLUMNS = {
    "error": ".0f", "threshold": ".3f", "tested": "", "within": ".1%", "within_over_splits": ".1%", "trusted": ".0%",
    "trusted_clean": ".0%", "trusted_mild": ".0%", "without_a_mask": ".0%",
}  # fmt: skip


class Square(NamedTuple):
    """One draw: a square of a photograph after one damage.

    Attributes:
        disagreement, error: [SQUARE, SQUARE], see seesr.pipeline.confidence.
    """

    photograph: str
    damage: str
    disagreement: NDArray[np.float32]
    error: NDArray[np.float32]

    def limit(self, error: float) -> float:
        """The least disagreement where the error is larger; infinite: it is nowhere."""
        wrong = self.disagreement[self.error > error]
        return float(wrong.min()) if wrong.size else np.inf

    def trusted(self, threshold: float) -> float:
        """Share of the pixels."""
        return float((self.disagreement < threshold).mean())


def threshold_of(limits: Sequence[Sequence[float]], level: float) -> float:
    """The largest threshold that a square of a new photograph keeps with a probability of at least `level`.

    The photographs are exchangeable, their squares are not. Each of n photographs counts 1 / (n + 1), shared by its
    squares, and the new one as failed: the weight of all limits below the threshold and 1 / (n + 1) are at most
    1 - level together. A pixel is trusted below the threshold, so that a limit equal to it holds.

    Args:
        limits: of the squares of each photograph.
        level: from 0 to 1.

    Returns:
        The threshold; 0 where there are too few photographs.
    """
    share = 1 / (len(limits) + 1)
    weighted = sorted((limit, share / len(squares)) for squares in limits for limit in squares)
    spare = 1 - level - share + 1e-12
    if spare < 0:
        return 0.0
    for limit, weight in weighted:
        spare -= weight
        if spare < 0:
            return limit
    return np.inf


def sources() -> list[tuple[str, Rgb]]:
    """Names and pixels of all photographs."""
    kinds = photographs(held_out=True).items()
    return [*((f"{kind}-{n}", image) for kind, images in kinds for n, image in enumerate(images)), *built_in()]


def window_of(image: Rgb, number: int, crop: int) -> Rgb:
    """A window of SIDE x SIDE pixels, or less of a small photograph, at a place of its own."""
    rng = np.random.default_rng([number, crop])
    height, width = (min(SIDE, side // degradations.SCALE * degradations.SCALE) for side in image.shape[:2])
    top, left = (int(rng.integers(0, a - b + 1)) for a, b in zip(image.shape, (height, width), strict=False))
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def compare(upscaler: Upscaler, low: Rgb, high: Rgb, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Disagreement and error of one window."""
    run = UpscaleRun(upscaler.networks, Settings(use_kds=True, seed=seed), ImageData(low), Progress())
    run.calibration = Calibration(0, LEVEL, 0, SQUARE, run.steps, 0, 0)  # so that the particles are compared
    output = run.run()
    assert output.disagreement is not None
    return output.disagreement, confidence.local_error(output.image_data.rgb, high)


def squares(upscaler: Upscaler, end: float) -> Iterator[Square]:
    """The squares of all windows; windows that an earlier run made are read."""
    folder = WORK / upscaler.networks.bundle.digest[:12]
    folder.mkdir(parents=True, exist_ok=True)
    for crop in range(CROPS):
        for number, (name, image) in enumerate(sources()):
            high = window_of(image, number, crop)
            for damage in DAMAGE:
                path = folder / f"{name}-{crop}-{damage}.npz"
                if not path.exists():
                    if time.monotonic() > end:
                        sys.exit(f"{len(list(folder.iterdir()))} windows are made; run again to go on")
                    low = degradations.BY_NAME[damage](high, crop)
                    disagreement, error = compare(upscaler, low, high, crop)
                    np.savez(path.with_suffix(".part.npz"), disagreement=disagreement, error=error)
                    path.with_suffix(".part.npz").replace(path)
                with np.load(path) as file:
                    disagreement, error = file["disagreement"], file["error"]
                rows, columns = (range(0, side - SQUARE + 1, SQUARE) for side in error.shape)
                for top, left in itertools.product(rows, columns):
                    place = slice(top, top + SQUARE), slice(left, left + SQUARE)
                    yield Square(name, damage, disagreement[place], error[place])


def split(names: Sequence[str], seed: int) -> set[str]:
    """The photographs of the calibration."""
    return set(np.random.default_rng(seed).permutation(sorted(names))[:CALIBRATION].tolist())


def mean(values: dict[str, Sequence[float]]) -> float:
    """Of the means of the photographs, each of which counts once."""
    return float(np.mean([np.mean(squares) for squares in values.values()]))


def measured(draws: dict[str, list[Square]], error: float) -> dict[str, Any]:
    """The row of one bound.

    Args:
        draws: the squares of each photograph.
    """
    limits = {name: [square.limit(error) for square in squares] for name, squares in draws.items()}

    def tested_below(seed: int) -> tuple[float, dict[str, Sequence[float]]]:
        """The threshold of a split, and of each other photograph which squares keep the bound below it."""
        chosen = split(list(draws), seed)
        threshold = threshold_of([limits[name] for name in chosen], LEVEL)
        others = {name: squares for name, squares in limits.items() if name not in chosen}
        return threshold, {name: [limit >= threshold for limit in squares] for name, squares in others.items()}

    threshold, tested = tested_below(0)

    def trusted(*damage: str) -> float:
        some = {name: [square for square in draws[name] if square.damage in damage] for name in tested}
        return mean({name: [square.trusted(threshold) for square in squares] for name, squares in some.items()})

    return {
        "error": error,
        "threshold": threshold,
        "tested": sum(map(len, tested.values())),
        "within": mean(tested),
        "within_over_splits": float(np.mean([mean(tested_below(seed)[1]) for seed in range(1, SPLITS + 1)])),
        "trusted": trusted(*DAMAGE),
        **{f"trusted_{damage}": trusted(damage) for damage in DAMAGE},
        "without_a_mask": mean({name: [limit == np.inf for limit in limits[name]] for name in tested}),
    }


def sheet(upscaler: Upscaler, error: float) -> Rgb:
    """A row for each built-in image, clean: result, mask, and the local error, white from twice the bound."""
    rows = []
    for number, (_, image) in enumerate(built_in()):
        high = window_of(image, number, 0)
        settings = Settings(use_kds=True, seed=0, output_view="confidence")
        output = upscaler(ImageData(degradations.clean(high, 0)), settings)
        wrong = confidence.local_error(output.image_data.rgb, high) * (255 / (2 * error))
        grey = np.repeat(wrong.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        rows.append(np.concatenate([output.image_data.rgb, output.view("confidence").rgb, grey], axis=1))
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after this time; run again to continue"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path, help="write result, mask and error of the built-in images")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    upscaler = Upscaler.load(args.bundle or weights.locate(), args.device)
    bundle = upscaler.networks.bundle
    draws: dict[str, list[Square]] = {name: [] for name, _ in sources()}
    for square in squares(upscaler, end):
        draws[square.photograph].append(square)
    rows = [measured(draws, error) for error in ERRORS]
    print(report.table(rows, COLUMNS))
    threshold = next(row["threshold"] for row in rows if row["error"] == CHOSEN)
    used = sum(map(len, draws.values())) - rows[0]["tested"]
    calibration = Calibration(CHOSEN, LEVEL, threshold, SQUARE, bundle.defaults.num_inference_steps, CALIBRATION, used)
    table = json.loads(confidence.TABLE.read_text())
    table[bundle.digest] = {"bundle": bundle.name, **calibration._asdict()}
    confidence.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    if args.json:
        report.write(args.json, rows, bundle=bundle.name, calibration=calibration._asdict())
    if args.png:
        Image.fromarray(sheet(upscaler, CHOSEN)).save(args.png)


if __name__ == "__main__":
    main()
