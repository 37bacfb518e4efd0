"""Measures how much two processes on the same cores slow each other down, by the way OpenMP's threads wait.

    python -m lab.speed.contention --json results/contention.json

Each process upscales a small image with the pocket bundle; seconds are means per image. Nothing else may run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lab import report

WAITING: dict[str, dict[str, str]] = {
    "as OpenMP does by default": {"GOMP_SPINCOUNT": "300000"},
    "as seesr sets it": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
IMAGES = 6


def work(ready: Path, start: Path) -> None:
    """One process: loads, says so, waits for the start, and prints its seconds per image."""
    import skimage.data
    from PIL import Image

    from seesr import Settings, Upscaler
    from seesr.networks import weights

    upscaler = Upscaler.load(weights.POCKET, "cpu")
    photo = Image.fromarray(skimage.data.chelsea()[60:252, 100:356]).reduce(4)
    settings = Settings(num_inference_steps=4, seed=1)
    upscaler(photo, settings)
    ready.touch()
    while not start.exists():
        time.sleep(0.01)
    started = time.perf_counter()
    for _ in range(IMAGES):
        upscaler(photo, settings)
    print((time.perf_counter() - started) / IMAGES)


def together(count: int, environment: dict[str, str]) -> float:
    """Seconds per image of the slowest of `count` processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clean = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
        command = [sys.executable, "-m", "lab.speed.contention", "--work"]
        processes = [
            subprocess.Popen(
                [*command, str(folder / f"{n}"), str(folder / "start")], cwd=report.ROOT, env={**clean, **environment},
                stdout=subprocess.PIPE, text=True,
            )
            for n in range(count)
        ]  # fmt: skip
        while len(list(folder.iterdir())) < count:
            time.sleep(0.1)
        (folder / "start").touch()
        return max(float(process.communicate()[0]) for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.work:
        work(*args.work)
        return
    rows: list[dict[str, Any]] = []
    for name, environment in WAITING.items():
        one, two = together(1, environment), together(2, environment)
        rows.append({"waiting": name, "one alone, s": one, "two together, s": two, "times": two / one})
    print(report.table(rows, {"waiting": "", "one alone, s": ".2f", "two together, s": ".2f", "times": ".2f"}))
    if args.json:
        report.write(args.json, rows, cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
