"""Compares measured images with a card's theoretical time: python -m lab.speed.ratio EVIDENCE... --json FILE

R is the measured seconds over the ideal ones. Ideal is the sum over the stages of max(FLOP / measured product rate,
bytes / measured copy rate): the work of results/counts.json (python -m lab.speed.count --table) at the rates that
`gpu_check` measured on the same card. The bytes are those of every operation on its own, so that fused operations can
pass below this ideal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lab import report

COLUMNS = {"card": "", "size": "", "seconds": ".3f", "ideal": ".3f", "ratio": ".1f", "busy": ".0%"}


def ideal(stages: dict[str, dict[str, float]], tflop_per_second: float, gb_per_second: float) -> float:
    """Seconds of all stages, each bound by its products or by its bytes."""
    kinds = ("conv_tflop", "product_tflop", "attention_tflop")
    return sum(
        max(sum(stage[kind] for kind in kinds) / tflop_per_second, stage["moved_gb"] / gb_per_second)
        for stage in stages.values()
    )


def ratios(evidence: dict[str, Any], counts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each size that was measured with graphs, by its fastest tile side."""
    parts = {name: part["rows"] for name, part in evidence["parts"].items()}
    rates = {row["ceiling"]: row for row in parts["probe"] if "ceiling" in row}
    card = next(row["card"] for row in parts["probe"] if "card" in row)
    profiled = next(row for row in parts["profiled"] if "busy" in row)
    seconds: dict[int, float] = {}
    for row in (*parts["pictures"], *parts["largest"]):
        if "seconds" in row and row.get("graphs", True):
            seconds[row["output"]] = min(row["seconds"], seconds.get(row["output"], row["seconds"]))
    least = {row["size"]: row["stages"] for row in reversed(counts)}  # the first row of a size has the most memory
    rows = []
    for size, measured in sorted(seconds.items()):
        bound = ideal(least[size], rates["product"]["tflops"], rates["copy"]["gb_per_second"])
        row = {"card": card, "size": size, "seconds": measured, "ideal": round(bound, 4), "ratio": measured / bound}
        if size == 2048:  # the size that is profiled
            row["busy"] = profiled["busy"] / profiled["wall"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path, nargs="+", help="evidence.json of gpu_check")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    counts = report.read(report.RESULTS / "counts.json")
    rows = [
        {"evidence": path.name, **row} for path in args.evidence for row in ratios(json.loads(path.read_text()), counts)
    ]
    print(report.table(rows, {"evidence": "", **COLUMNS}))
    if args.json:
        report.write(args.json, rows)


if __name__ == "__main__":
    main()
