"""Measures what keeping freed memory and SEESR_PRECISION=bfloat16 change on a CPU, with the bundled networks.

    python -m lab.speed.cpu_options --json results/bench/cpu-options.json

Each row is a process of its own that makes one image and then times some more; seconds are the least. Nothing else may
run. `level` is the mean difference from float32, in levels of 255.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab import report
from lab.speed.bench import processor

OPTIONS: dict[str, tuple[str, dict[str, str]]] = {  # precision, environment
    "float32, freed memory returned": ("float32", {"GLIBC_TUNABLES": ""}),  # malloc stays as it is
    "float32": ("float32", {}),
    "bfloat16": ("bfloat16", {}),
}


def measured(precision: str, threads: int, side: int, times: int, path: Path) -> dict[str, Any]:
    """The row of this process; the image goes to `path`."""
    import skimage.data
    from PIL import Image

    from seesr import Settings, Upscaler
    from seesr.networks import weights

    torch.set_num_threads(threads)
    upscaler = Upscaler.load(weights.POCKET, "cpu", precision=precision)
    image = Image.fromarray(skimage.data.astronaut()).resize((side // 4, side // 4), Image.Resampling.BICUBIC)
    settings = Settings(scale_factor=4, seed=1)
    upscaler(image, settings)
    seconds, cpu_seconds = [], []
    for _ in range(times):
        started, used = time.perf_counter(), time.process_time()
        output = upscaler(image, settings)
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - used)
    np.save(path, np.asarray(output.image.convert("RGB")))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return {"seconds": min(seconds), "cpu_seconds_per_mp": min(cpu_seconds) / side**2 * 1e6, "peak_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[512, 1024], help="sides of the output, in pixels")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--times", type=int, default=4, help="images that are timed in each process")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)  # precision, threads, side, path
    args = parser.parse_args()
    if args.one:
        precision, threads, side, path = args.one
        print(json.dumps(measured(precision, int(threads), int(side), args.times, Path(path))))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in args.side:
            for threads in args.threads:
                images, group = {}, []
                for name, (precision, environment) in OPTIONS.items():
                    path = Path(folder) / "image.npy"
                    one = ["--times", str(args.times), "--one", precision, str(threads), str(side), str(path)]
                    command = [sys.executable, "-m", "lab.speed.cpu_options", *one]
                    completed = subprocess.run(
                        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
                    )
                    images[name] = np.load(path).astype(np.float32)
                    row = {"size": side, "threads": threads, "option": name}
                    group.append(row | json.loads(completed.stdout.splitlines()[-1]))
                for row in group:
                    row["level"] = float(np.abs(images[row["option"]] - images["float32"]).mean())
                    print(row, flush=True)
                rows += group
    if args.json:
        report.write(args.json, rows, processor=processor(), torch=torch.__version__)


if __name__ == "__main__":
    main()
