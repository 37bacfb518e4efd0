"""Measures CPU seconds from the start of Python to the first output, of this tree and an earlier commit.

    python -m lab.startup                       writes results/startup.json and results/startup.md
    python -m lab.startup --before COMMIT       beside another commit than the one before the start-up was worked on

Every command runs in a process of its own, by turns, beside `import torch` alone; medians of user and system time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from lab.report import RESULTS, ROOT, read, table, write
from seesr.networks import weights

FILE = RESULTS / "startup.json"
BEFORE = "76de13d"
LOAD = f"from seesr import Engine; Engine.load(__import__('pathlib').Path({str(weights.POCKET)!r}), 'cpu')"
COMMANDS = {  # what a user does: as it was and as it is; None: it did not exist
    "`import torch` alone": (["-c", "import torch"],) * 2,
    "`import seesr`": (["-c", "import seesr"],) * 2,
    "`seesr --help`": (["-m", "seesr.cli", "--help"], ["-m", "seesr", "--help"]),
    "`seesr --version`": (None, ["-m", "seesr", "--version"]),
    "`seesr missing.jpg`": (
        ["-m", "seesr.cli", "upscale", "missing.jpg", "--out", "out"],
        ["-m", "seesr", "missing.jpg"],
    ),
    "`seesr photo.png --dry-run`": (None, ["-m", "seesr", "photo.png", "--dry-run"]),
    "`seesr info`": (["-m", "seesr.cli", "info"], ["-m", "seesr", "info"]),
    "`seesr doctor`": (["-m", "seesr.cli", "doctor"], ["-m", "seesr", "doctor"]),
    "`Engine.load()`, pocket weights": (["-c", LOAD],) * 2,
}


def cpu_seconds(command: list[str], tree: Path, folder: Path) -> float:
    """User and system seconds of a process and of those that it waited for."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SEESR_")}
    environment |= {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(folder)}  # no rates of earlier images
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # or Popen believes that it still runs
    return used.ru_utime + used.ru_stime


def measure(trees: tuple[Path | None, Path], times: int, names: list[str]) -> list[dict[str, Any]]:
    """Medians of every command in both trees."""
    from PIL import Image

    results: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        Image.new("RGB", (64, 48)).save(folder / "photo.png")
        for _ in range(times):
            for name in names:
                for side, tree in enumerate(trees):
                    command = COMMANDS[name][side]
                    if tree is not None and command is not None:
                        results.setdefault((name, side), []).append(cpu_seconds(command, tree, folder))
    rows = []
    for name in names:
        sides = [statistics.median(results[name, side]) if (name, side) in results else None for side in (0, 1)]
        torch = statistics.median(results["`import torch` alone", 1])
        assert sides[1] is not None
        rows.append({"command": name, "before": sides[0], "after": sides[1], "of torch": sides[1] / torch})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="commit to compare with")
    parser.add_argument("--times", type=int, default=3, help="runs of each command")
    parser.add_argument("--table", action="store_true", help="only write the table again")
    args = parser.parse_args()
    if not args.table:
        with tempfile.TemporaryDirectory() as temporary:
            archive = subprocess.run(["git", "archive", args.before], cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(["tar", "-x", "-C", temporary], input=archive, check=True)
            rows = measure((Path(temporary), ROOT), args.times, list(COMMANDS))
        write(FILE, rows, before=args.before, times=args.times)
    before, times = read(FILE, "before"), read(FILE, "times")
    columns = {"command": "", "before": ".2f", "after": ".2f", "of torch": ".2f"}
    FILE.with_suffix(".md").write_text(f"""# Start-up

CPU seconds, median of {times} run(s) of each command by turns: commit {before} before, this tree after. The last column
is the time after as a multiple of `import torch` alone. Written by `python -m lab.startup`.

{table(read(FILE), columns)}
""")


if __name__ == "__main__":
    main()
