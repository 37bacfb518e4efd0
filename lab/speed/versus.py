"""Compares the speed of this source tree with another one, on a CPU, with the bundled networks; runs alternate.

    git worktree add ../before 76de13d
    python -m lab.speed.versus ../before --json results/bench/versus.json

Each run is a process of its own that loads the networks, makes one image, and then times some more. `default` takes the
settings that a caller gets who names none; `4 steps` names the steps. ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA choose
the processor's instructions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lab import report
from lab.speed.bench import processor

INSTRUCTIONS: dict[str, dict[str, str]] = {
    "native": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
PROGRAM = """
import json, sys, time
from pathlib import Path
import skimage.data
from PIL import Image
from seesr import Settings, Upscaler

given, side, times = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
upscaler = Upscaler.load(Path("weights/pocket").resolve(), "cpu")
image = Image.fromarray(skimage.data.astronaut()).resize((side // 4, side // 4), Image.Resampling.BICUBIC)
upscaler(image, Settings(seed=1, **given))
for _ in range(times):
    started = time.perf_counter()
    result = upscaler(image, Settings(seed=1, **given))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "stages": result.metrics["seconds"], "tiles": result.metrics["tiles"],
                      "steps": result.metrics["steps"], "attention": result.metrics["attention"]}))
"""


def run(tree: Path, values: dict[str, Any], side: int, times: int, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of one process in a source tree."""
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(values), str(side), str(times)],
        cwd=tree, env={**os.environ, "PYTHONPATH": str(tree), **environment},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in completed.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a source tree")
    parser.add_argument("--side", type=int, default=512, help="side of the output, pixels")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--times", type=int, default=2, help="images of every process")
    parser.add_argument("--instructions", choices=INSTRUCTIONS, nargs="+", default=list(INSTRUCTIONS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for isa in args.instructions:
        environment = INSTRUCTIONS[isa]
        for name, values in {"default": {}, "4 steps": {"num_inference_steps": 4}}.items():
            results: dict[str, list[dict[str, Any]]] = {"other": [], "this": []}
            for _ in range(args.rounds):
                for tree, place in (("other", args.other.resolve()), ("this", report.ROOT)):
                    results[tree] += run(place, values, args.side, args.times, environment)
            seconds = {tree: statistics.median(row["seconds"] for row in each) for tree, each in results.items()}
            row = {"instructions": isa, "settings": name, **seconds, "times": seconds["other"] / seconds["this"]}
            rows.append(row | {f"{tree} run": each[-1] for tree, each in results.items()})
            print({key: row[key] for key in ("instructions", "settings", "other", "this", "times")}, flush=True)
            if args.json:
                report.write(args.json, rows, side=args.side, processor=processor(), torch=torch.__version__)


if __name__ == "__main__":
    main()
