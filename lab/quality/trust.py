"""Calibrates the view `confidence`: below which disagreement of particles the error stays within a bound.

    OMP_NUM_THREADS=1 python -m lab.quality.trust --json results/trust.json

Windows of the held-out and the built-in photographs are made small, upscaled with particles and compared with the
original. Finished windows are kept in build/trust, so that a run that was stopped goes on (--seconds stops it). The
photographs are split: CALIBRATION of them give the thresholds, the others test them. The coverage over random splits
is measured, too. The table of the chosen bound goes to seesr/pipeline/confidence.json. Needs the `eval` extra.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
CROPS = 3  # windows of a photograph
DAMAGE = ("clean", "mild")
CALIBRATION = 20  # photographs; a level of 95 % needs at least 19
LEVEL = 0.95
ERRORS = (12.0, 16.0, 20.0, 24.0, 32.0)  # bounds that are measured, levels of 255
CHOSEN = 20.0  # the bound of the view
SPLITS = 200
SHOWN = {
    "error": ".0f", "threshold": ".3f", "tested": "", "within": ".1%", "within_over_splits": ".1%", "trusted": ".0%",
    "trusted_clean": ".0%", "trusted_mild": ".0%", "within_everywhere": ".0%",
}  # fmt: skip


class Window(NamedTuple):
    """One draw: a window of a photograph after one damage.

    Attributes:
        disagreement, error: [H, W], see seesr.pipeline.confidence.
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
    """The largest threshold that a window of a new photograph keeps with a probability of at least `level`.

    The photographs are exchangeable, their windows are not. Each of n photographs counts 1 / (n + 1), shared by its
    windows, and the new one as failed: the weight of all limits below the threshold and 1 / (n + 1) are at most
    1 - level together. A pixel is trusted below the threshold, so that a limit equal to it holds.

    Args:
        limits: of the windows of each photograph.
        level: from 0 to 1.

    Returns:
        The threshold; 0 where there are too few photographs.
    """
    share = 1 / (len(limits) + 1)
    weighted = sorted((limit, share / len(of_one)) for of_one in limits for limit in of_one)
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
    found = [(f"{kind}-{n}", one) for kind, ones in photographs(held_out=True).items() for n, one in enumerate(ones)]
    return [*found, *built_in()]


def window_of(picture: Rgb, number: int, crop: int) -> Rgb:
    """A window of SIDE x SIDE pixels, or less of a small photograph, at a place of its own."""
    rng = np.random.default_rng([number, crop])
    height, width = (min(SIDE, side // degradations.SCALE * degradations.SCALE) for side in picture.shape[:2])
    top, left = (int(rng.integers(0, a - b + 1)) for a, b in zip(picture.shape, (height, width), strict=False))
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def compare(upscaler: Upscaler, low: Rgb, high: Rgb, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Disagreement and error of one window."""
    run = UpscaleRun(upscaler.networks, Settings(use_kds=True, seed=seed), ImageData(low), Progress())
    run.calibration = Calibration(0, LEVEL, 0, SIDE, run.steps, 0, 0)  # so that the particles are compared
    output = run.run()
    assert output.disagreement is not None
    return output.disagreement, confidence.local_error(output.image_data.rgb, high)


def windows(upscaler: Upscaler, end: float) -> Iterator[Window]:
    """All windows; those that an earlier run made are read."""
    folder = WORK / upscaler.networks.bundle.digest[:12]
    folder.mkdir(parents=True, exist_ok=True)
    for crop in range(CROPS):
        for number, (name, picture) in enumerate(sources()):
            high = window_of(picture, number, crop)
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
                    yield Window(name, damage, file["disagreement"], file["error"])


def split(names: Sequence[str], seed: int) -> set[str]:
    """The photographs of the calibration."""
    return set(np.random.default_rng(seed).permutation(sorted(names))[:CALIBRATION].tolist())


def measured(found: Sequence[Window], error: float) -> dict[str, Any]:
    """The row of one bound."""
    names = list(dict.fromkeys(window.photograph for window in found))
    limits = {name: [window.limit(error) for window in found if window.photograph == name] for name in names}

    def calibrated(chosen: set[str]) -> tuple[float, list[Window]]:
        threshold = threshold_of([limits[name] for name in names if name in chosen], LEVEL)
        return threshold, [window for window in found if window.photograph not in chosen]

    threshold, tested = calibrated(split(names, 0))
    kept = []
    for seed in range(1, SPLITS + 1):
        other, windows = calibrated(split(names, seed))
        kept += [window.limit(error) >= other for window in windows]
    by_damage = {
        f"trusted_{damage}": float(np.mean([w.trusted(threshold) for w in tested if w.damage == damage]))
        for damage in DAMAGE
    }
    return {
        "error": error,
        "threshold": threshold,
        "tested": len(tested),
        "within": float(np.mean([window.limit(error) >= threshold for window in tested])),
        "within_over_splits": float(np.mean(kept)),
        "trusted": float(np.mean([window.trusted(threshold) for window in tested])),
        **by_damage,
        "within_everywhere": float(np.mean([window.limit(error) == np.inf for window in tested])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--device")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; run again to go on")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    upscaler = Upscaler.load(args.bundle or weights.locate(), args.device)
    bundle, found = upscaler.networks.bundle, list(windows(upscaler, end))
    rows = [measured(found, error) for error in ERRORS]
    print(report.table(rows, SHOWN))
    threshold = next(row["threshold"] for row in rows if row["error"] == CHOSEN)
    draws = len(found) - rows[0]["tested"]
    steps = bundle.defaults.num_inference_steps
    calibration = Calibration(CHOSEN, LEVEL, threshold, SIDE, steps, CALIBRATION, draws)
    table = json.loads(confidence.TABLE.read_text())
    table[bundle.digest] = {"bundle": bundle.name, **calibration._asdict()}
    confidence.TABLE.write_text(json.dumps(table, indent=1) + "\n")
    if args.json:
        report.write(args.json, rows, bundle=bundle.name, calibration=calibration._asdict())


if __name__ == "__main__":
    main()
