"""Measures the time that the stage cache saves when an image runs again with one change.

    python -m lab.speed.stages --json results/stages.json

Each row is a pair of runs with the pocket bundle: `cold` without a cache, `warm` after the run that `after` names. The
bytes of both are compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import skimage.data

from lab import report
from seesr import Settings, Upscaler
from seesr.networks import weights

CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "fidelity": {"fidelity": 0.3},
    "color_fix": {"color_fix": "adain"},
    "output_view": {"output_view": "comparison"},
    "seed": {"seed": 2},
    "user_prompt": {"user_prompt": "a cat"},
}
REGION = "0,0,256,256"
CACHE = 10**9  # bytes
COLUMNS = {"after": "", "change": "", "cold": ".2f", "warm": ".2f", "reused": "", "tiles_reused": "d", "tiles": "d"}


def timed(upscaler: Upscaler, side: int, settings: Settings) -> tuple[float, Any]:
    """Seconds of a run with its file, and the output."""
    left = (300 - side) // 2
    rgb = skimage.data.chelsea()[left : left + side, left : left + side]
    started = time.perf_counter()
    output = upscaler(rgb, settings)
    _ = output.data
    return time.perf_counter() - started, output


def rows(side: int) -> list[dict[str, Any]]:
    """All pairs for an input of `side` x `side` pixels."""
    plain = Upscaler.load(weights.POCKET, "cpu")
    plain.warm_up()
    base, result = Settings(seed=1), []
    pairs = [("the whole image", base, name, base.replace(**changes)) for name, changes in CHANGES.items()]
    pairs.append(("the whole image", base, "region", base.replace(region=REGION)))
    pairs.append((f"region {REGION}", base.replace(region=REGION), "the whole image", base))
    for after, first, change, settings in pairs:
        cached = Upscaler(plain.networks, cache=CACHE)
        cold, expected = timed(plain, side, settings)
        timed(cached, side, first)
        warm, output = timed(cached, side, settings)
        if output.data != expected.data:
            raise AssertionError(f"{change} after {after}: the cached run gave other bytes")
        metrics = {name: output.metrics[name] for name in ("reused", "tiles_reused", "tiles")}
        result.append({"after": after, "change": change, "cold": round(cold, 3), "warm": round(warm, 3), **metrics})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=236, help="side of the input, pixels")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = rows(args.side)
    print(report.table(result, COLUMNS))
    if args.json:
        report.write(args.json, result, side=args.side)


if __name__ == "__main__":
    main()
