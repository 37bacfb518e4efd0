"""Simulates a fleet for a day: GPU time and waits with the scaling rule of deploy/kubernetes, and with fixed sizes.

    python -m lab.scaling --json results/scaling.json --plot docs/scaling.png

Measured: the seconds of an image on an H200 and of a worker's start (SERVICE, START). From scripts/prices.toml: the
seconds until a machine is there (BOOT). Assumed: the arrivals, equal shares of the four sizes, and the spot losses.
The transfer of files is left out. A day has a seed and gives the same figures again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab.report import RESULTS, ROOT, read, table, write
from lab.scaling.simulation import DAY, Keda, Simulation
from seesr.config import Configuration

SERVICE, START, BENCH = "gpu-h200/ratio.json", "gpu-h200/evidence-2.json", "bench/h200.jsonl"  # in results/
BOOT = "Hugging Face"  # whose boot_s is the longest of scripts/prices.toml
FIXED = (1, 2, 4, 8)
LOSSES = 6.0  # hours after which a spot machine is lost, on average
COLUMNS = {
    "arrivals": "", "workers": "", "images": "d", "gpu_hours": ".1f", "gpu_seconds_per_image": ".2f", "busy": ".0%",
    "median_wait_s": ".1f", "p95_wait_s": ".1f", "p95_wait_s_spot": ".1f",
}  # fmt: skip


def patterns(seed: int = 0) -> Iterator[tuple[str, list[float]]]:
    """Arrivals of a day by name: half an image a second; 0 to 1.5 a second with a peak at noon; bursts of 200."""
    for name, most, share in (
        ("steady", 0.5, lambda now: 1.0), ("diurnal", 1.5, lambda now: (1 - math.cos(2 * math.pi * now / DAY)) / 2),
    ):  # fmt: skip
        chance, now, result = random.Random(f"{name} {seed}"), 0.0, []
        while (now := now + chance.expovariate(most)) < DAY:
            if chance.random() < share(now):
                result.append(now)
        yield name, result
    chance, now, result = random.Random(f"bursts {seed}"), 0.0, []
    while (now := now + chance.expovariate(1 / 3600)) < DAY:
        result += [now] * 200
    yield "bursts", result


def measured() -> tuple[list[float], dict[str, float]]:
    """The seconds of an image by size, and of the parts of a worker's start."""
    sizes = [row["seconds"] for row in read(RESULTS / SERVICE) if row["evidence"] == Path(START).name]
    setup = json.loads((RESULTS / BENCH).read_text().splitlines()[-1])["setup_seconds"]
    graphs = json.loads((RESULTS / START).read_text())["parts"]["upscaler"]["rows"][0]["seconds"]
    prices = tomllib.loads((ROOT / "scripts/prices.toml").read_text())["price"]
    boot = max(price["boot_s"] for price in prices if price["platform"] == BOOT)
    return sizes, {"machine": boot, "import": setup["import"], "load": setup["load"], "graphs": graphs}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def row_of(name: str, arrivals: list[float], workers: int | None) -> dict[str, Any]:
    """One row: KEDA's rule, or a fixed number of workers; without and with spot losses."""
    sizes, parts = measured()

    def day(lifetime: float) -> Simulation:
        draw = random.Random(name)
        scaler = Keda.read() if workers is None else None
        lease = Configuration.model_fields["lease"].default
        service = lambda: draw.choice(sizes)  # noqa: E731
        return Simulation(arrivals, service, sum(parts.values()), scaler, workers or 0, lifetime, lease).run()

    plain, spot = day(math.inf), day(LOSSES * 3600)
    return {
        "arrivals": name, "workers": "KEDA, 0 to 8" if workers is None else str(workers), "images": len(arrivals),
        "gpu_hours": plain.billed / 3600, "gpu_seconds_per_image": plain.billed / len(arrivals),
        "busy": plain.used / plain.billed, "median_wait_s": percentile(plain.waits, 0.5),
        "p95_wait_s": percentile(plain.waits, 0.95), "p95_wait_s_spot": percentile(spot.waits, 0.95),
    }  # fmt: skip


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """GPU time of an image against the wait, for each kind of arrivals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["arrivals"] for row in rows))
    figure, axes = pyplot.subplots(1, len(names), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        for row in (row for row in rows if row["arrivals"] == name):
            color = "C1" if row["workers"].startswith("KEDA") else "C0"
            place = row["gpu_seconds_per_image"], max(0.1, row["p95_wait_s"])
            axis.scatter(*place, color=color)
            axis.annotate(row["workers"], place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(title=f"{name} (simulated)", xlabel="GPU seconds per image", yscale="log")
        axis.set_xlim(0, 1.25 * max(row["gpu_seconds_per_image"] for row in rows if row["arrivals"] == name))
    axes[0].set_ylabel("p95 wait, s")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulates a fleet for a day.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = [row_of(name, arrivals, workers) for name, arrivals in patterns() for workers in (None, *FIXED)]
    print(table(rows, COLUMNS))
    if args.json:
        sizes, parts = measured()
        write(args.json, rows, files=[SERVICE, START, BENCH, "scripts/prices.toml"], image_s=sizes, start_s=parts,
              losses_after_hours=LOSSES)  # fmt: skip
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
