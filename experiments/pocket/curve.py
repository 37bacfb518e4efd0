"""Training curves: rows as JSON lines, and the plot of them."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from experiments.pocket.sizes import WORK

log = logging.getLogger(__name__)


class Curve:
    """Logs a running mean every `every` steps and keeps it as JSON lines."""

    def __init__(self, stage: str, every: int = 100, first: int = 0) -> None:
        """Goes on at step `first` of a run that was interrupted."""
        path = WORK / f"{stage}.jsonl"
        before = path.read_text().splitlines()[: first // every] if first else []
        self.file = path.open("w")
        self.file.writelines(line + "\n" for line in before)
        self.file.flush()  # or a second interruption would lose them
        self.every, self.sums = every, {}
        self.started = time.monotonic() - (json.loads(before[-1])["seconds"] if before else 0)

    def add(self, step: int, **values: float) -> None:
        for name, value in values.items():
            if not math.isnan(value):
                self.sums.setdefault(name, []).append(value)
        if (step + 1) % self.every == 0:
            row = {"step": step + 1, "seconds": round(time.monotonic() - self.started, 1)}
            row |= {name: round(float(np.mean(result)), 5) for name, result in self.sums.items()}
            self.sums = {}
            log.info("%s", row)
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()


def plot(path: Path, width: int = 640, height: int = 320) -> None:
    """The denoiser's gain over bicubic on its training crops, in dB, against the step, as a PNG."""
    rows = [json.loads(line) for line in (WORK / "denoiser.jsonl").read_text().splitlines()]
    steps, gains = [0.0, *(row["step"] for row in rows)], [0.0, *(row["gain_db"] for row in rows)]  # from bicubic
    steps, gains = np.array(steps), np.array(gains)
    low, high = math.floor(gains.min() * 2) / 2, math.ceil(gains.max() * 2) / 2
    canvas = np.full((height, width, 3), 255, np.uint8)
    left, bottom = 60, height - 40

    def at(step: float, gain: float) -> tuple[int, int]:
        x = left + (width - left - 20) * step / steps[-1]
        return round(x), round(bottom - (bottom - 20) * (gain - low) / (high - low))

    for mark in np.arange(low, high + 0.01, 0.5):
        cv2.line(canvas, at(0, mark), at(steps[-1], mark), (220, 220, 220))
        cv2.putText(canvas, f"{mark:+.1f} dB", (2, at(0, mark)[1] + 4), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    for mark in np.linspace(0, steps[-1], 5):
        cv2.putText(canvas, f"{mark:.0f}", (at(mark, low)[0] - 14, height - 20), 0, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
    points = np.array([at(*pair) for pair in zip(steps, gains, strict=True)], np.int32)
    cv2.polylines(canvas, [points], False, (40, 90, 200), 2, cv2.LINE_AA)
    Image.fromarray(canvas).save(path)
