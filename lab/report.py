"""Reports measurements: a Markdown table on the screen, and JSON with its command in a file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"


def command() -> str:
    """How this program was called, as a user would type it."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    name = f"-m {spec.name}" if spec else Path(sys.argv[0]).name
    return f"python {name} {shlex.join(sys.argv[1:])}".strip()


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Rows as a Markdown table.

    Args:
        columns: the keys to show, in order, each with the format of its values ("" for words, ".2f" for numbers); a
            row that lacks a key has an empty cell.
    """
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [format(row[key], form) if row.get(key) is not None else "" for key, form in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """Keeps the rows, with the command that made them, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command(), **more, "rows": rows}, indent=1) + "\n")


def read(path: Path, part: str = "rows") -> list[dict[str, Any]]:
    """The rows of a file that `write` made, or another part of it."""
    return json.loads(path.read_text())[part]
