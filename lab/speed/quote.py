"""Measures the error of quotes on one machine, and whether accepted deadlines are met, over mixed small images.

    OMP_NUM_THREADS=1 python -m lab.speed.quote --json results/quote.json

A server with the pocket bundle and without any earlier rates takes images of mixed sizes, scales, steps and formats, a
few at a time, with deadlines from hopeless to generous. An accepted job whose deadline passes fails at that moment.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from starlette.testclient import TestClient

from lab import report
from seesr.config import Configuration
from seesr.images.image_data import ImageData
from seesr.images.write import encode
from seesr.networks import weights
from seesr.serving import app

WITHIN = 0.2  # of the actual seconds
CURVE = (0.05, 0.1, 0.2, 0.3, 0.5)
REPEATED = 0.2  # share of images that are sent twice
LONGEST_QUEUE = 4  # images that are sent before one has ended
FACTORS = (0.3, 3.0)  # deadlines, as shares of what the quote expects
COLUMNS = {"jobs": "", "images": "d", "within_20_percent": ".1%", "median_error": ".1%", "p95_error": ".1%"}


def image(rng: np.random.Generator) -> tuple[bytes, dict[str, str]]:
    """A crop of a photograph as a file, and its settings."""
    photo = (skimage.data.chelsea, skimage.data.astronaut, skimage.data.coffee)[rng.integers(3)]()
    height, width = rng.integers(20, 48, 2)
    top, left = rng.integers(0, photo.shape[0] - height), rng.integers(0, photo.shape[1] - width)
    data = encode(ImageData(np.ascontiguousarray(photo[top : top + height, left : left + width])), "png", 95)
    settings = {
        "scale_factor": str(rng.choice([2, 2, 3])),
        "num_inference_steps": str(rng.choice([1, 1, 1, 2])),
        "latent_tiled_size": str(rng.choice([16, 32, 32])),
        "output_format": str(rng.choice(["png", "webp", "jpg"])),
        "fidelity": str(rng.choice([0.0, 0.0, 0.3])),
        "seed": str(rng.integers(2**31)),
    }
    return data, settings


def run(count: int, seed: int, folder: Path) -> tuple[list[dict[str, Any]], int]:
    """The finished jobs in order, and how many images were refused."""
    rng = np.random.default_rng(seed)
    configuration = Configuration(data=folder, rate=10**6)
    built = app.build(
        configuration,
        "http://images.test",
        weights.POCKET,
        lambda send: app.local(
            configuration, lambda: app.load_engine(weights.POCKET, "cpu", folder / "rates"), weights.POCKET, send
        ),
    )
    results: list[dict[str, Any]] = []
    open_jobs: list[tuple[str, dict[str, Any]]] = []
    refused = 0
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)

        def collect(maximum: int) -> None:
            while len(open_jobs) > maximum:
                id, row = open_jobs[0]
                job = client.get(f"/jobs/{id}").json()
                if job["completed"] is None:
                    time.sleep(0.01)
                    continue
                open_jobs.pop(0)
                metrics = job["metrics"]
                row |= {"status": job["status"], "took": job["completed"] - job["created"]}
                if metrics:
                    row |= {"quoted": metrics["quote"]["seconds"], "actual": metrics["actual"]["seconds"]}
                    row |= {"quoted_wait": metrics["quote"]["wait"], "actual_wait": metrics["actual"]["wait"]}
                results.append(row)

        data, settings, number = b"", {}, -1
        while len(results) + len(open_jobs) < count:
            if not data or rng.random() >= REPEATED:
                (data, settings), number = image(rng), number + 1
            headers = {"Content-Type": "image/png"}
            quote = client.post("/quote", params=settings, content=data, headers=headers).json()
            params = {**settings, "wait": "0"}
            row: dict[str, Any] = {"image": number, "deadline": None}
            if rng.random() < 0.5:
                expected = quote["wait"] + (quote["seconds"] or 1.0)
                row["deadline"] = round(float(rng.uniform(*FACTORS)) * expected, 3)
                params["deadline"] = str(row["deadline"])
            answer = client.post("/upscale", params=params, content=data, headers=headers)
            if answer.status_code == 409:
                refused += 1
                continue
            open_jobs.append((answer.json()["id"], row))
            collect(int(rng.integers(0, LONGEST_QUEUE + 1)))
        collect(0)
    return results, refused


def errors(rows: list[dict[str, Any]]) -> list[float]:
    """Relative errors of the quoted seconds."""
    return sorted(abs(row["quoted"] / row["actual"] - 1) for row in rows if "actual" in row)


def summarized(name: str, values: list[float]) -> dict[str, Any]:
    """Shares and percentiles of sorted errors, of which there is at least one."""
    return {
        "jobs": name,
        "images": len(values),
        "within_20_percent": sum(error <= WITHIN for error in values) / len(values),
        "within": {f"{limit:.0%}": sum(error <= limit for error in values) / len(values) for limit in CURVE},
        "median_error": statistics.median(values),
        "p95_error": values[int(0.95 * (len(values) - 1))],
    }


def repeats(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The relative differences between two runs of the same image."""
    pairs = [
        abs(first["actual"] / second["actual"] - 1)
        for first, second in itertools.pairwise([row for row in rows if "actual" in row])
        if first["image"] == second["image"]
    ]
    return summarized("repeats", sorted(pairs))


def promises(rows: list[dict[str, Any]], refused: int) -> dict[str, Any]:
    """What became of the jobs with a deadline."""
    with_deadline = [row for row in rows if row["deadline"] is not None]
    in_time = [row for row in with_deadline if row["status"] == "succeeded"]
    return {
        "accepted": len(with_deadline),
        "refused": refused,
        "in_time": len(in_time),
        "failed_at_the_deadline": len(with_deadline) - len(in_time),
        "latest_over_deadline": max((row["took"] / row["deadline"] for row in in_time), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["SEESR_CACHE_MB"] = "0"  # repeated images compute every stage
    with tempfile.TemporaryDirectory() as folder:
        rows, refused = run(args.jobs, args.seed, Path(folder))
    table = [summarized("all", errors(rows))]
    for start in range(0, len(rows), 50):
        part = rows[start : start + 50]
        table.append(summarized(f"{start + 1} to {start + len(part)}", errors(part)))
    table.append(repeats(rows))
    print(report.table(table, COLUMNS))
    summary = promises(rows, refused)
    print(summary)
    if args.json:
        report.write(
            args.json, table, promises=summary, jobs=[{k: v for k, v in row.items() if v is not None} for row in rows]
        )


if __name__ == "__main__":
    main()
