"""Measures the error of the estimated time left at half time, over images of mixed sizes and settings.

    python -m lab.speed.estimate results/estimate.json

Every image has its counted work, the seconds of its stages, and its progress as (stage, done, total, seconds since its
start). `tests/unit/test_estimate.py` replays the file.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from seesr.engine.engine import Engine
from seesr.networks import weights
from seesr.runtime.estimate import Forecast, Speed
from seesr.runtime.progress import Position
from seesr.settings import Settings

IMAGES = 20
LEAST = 1.0  # seconds of an image below which its time left is not judged
OPTIONS: list[dict[str, Any]] = [
    {}, {}, {}, {"num_inference_steps": 2}, {"cfg_scale": 1.5}, {"output_format": "webp"}, {"fidelity": 0.3},
    {"latent_tiled_size": 32},
]  # fmt: skip


def cases(seed: int = 0) -> list[tuple[tuple[int, int], Settings]]:
    """((width, height), settings) of IMAGES images; the outputs have 0.03 to 0.8 megapixels."""
    chance = random.Random(seed)
    results = []
    for _ in range(IMAGES):
        side, aspect = int(200 * 4.5 ** chance.random()), chance.choice([1.0, 0.75, 1.5])
        scale = chance.choice([2.0, 3.0, 4.0])
        size = max(24, int(side / scale)), max(24, int(side * aspect / scale))
        results.append((size, Settings(scale_factor=scale, seed=1, **chance.choice(OPTIONS))))
    return results


def record(engine: Engine, size: tuple[int, int], settings: Settings) -> dict[str, Any]:
    """Runs one image of noise over a ramp."""
    width, height = size
    ramp = np.linspace(0, 200, width)[None, :, None] + np.random.default_rng(0).integers(0, 50, (height, width, 3))
    events: list[list[Any]] = []
    started = time.monotonic()

    def watch(position: Position) -> None:
        events.append([*position[:3], round(time.monotonic() - started, 3)])

    work = engine.work(settings, size)
    output = engine.run(ramp.astype(np.uint8), settings, watchers=(watch,))
    seconds = round(time.monotonic() - started, 3)
    return {"size": size, "work": work, "stages": output.metrics["seconds"], "events": events, "seconds": seconds}


def error_at_half(speed: Speed, image: dict[str, Any]) -> float:
    """Replays an image with what was known before it: |time left - true time left| / true time left at half time.

    Raises:
        AssertionError: the progress fell, or the time left rose.
    """
    forecast, half, progress, known = Forecast(speed, image["work"]), image["seconds"] / 2, 0.0, float("inf")
    for stage, done, total, elapsed in image["events"]:
        if stage == "read" and done == 0:
            continue  # the work is not counted yet
        if elapsed > half:
            break
        share, left = forecast.at(stage, done, total, elapsed)
        assert left is not None and share >= progress and left <= known, (share, progress, left, known)
        progress, known, at = share, left, elapsed
    return abs(known - (image["seconds"] - at)) / (image["seconds"] - at)


def errors(images: list[dict[str, Any]], first: Speed) -> list[float]:
    """The error of each image of at least LEAST seconds, where `first` learns from one after the other."""
    results = []
    for image in images:
        if image["seconds"] >= LEAST:
            results.append(round(error_at_half(first, image), 3))
        first.learn(image["work"], image["stages"])
    return results


def main(target: str) -> int:
    with Engine.load(weights.POCKET, "cpu") as engine:
        first = Speed()
        first.totals = dict(engine.speed.totals)  # what the warm-up taught
        images = [record(engine, size, settings) for size, settings in cases()]
    results = {"command": "python -m lab.speed.estimate", "first": dict(first.totals), "images": images}
    results["errors"] = errors(images, first)
    Path(target).write_text(json.dumps(results, separators=(",", ":")) + "\n")
    print(results["errors"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
