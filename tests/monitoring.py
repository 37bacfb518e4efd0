"""Names of metrics: documented, exported by a server, and used by the files of deploy/monitoring."""

from __future__ import annotations

import re
from collections.abc import Iterable

from scripts.cog_server import ROOT

FOLDER = ROOT / "deploy/monitoring"
ROW = re.compile(r"^\| `(seesr_\w+)[^`]*` \| (server|fleet|server, fleet) \|", re.M)


def documented_metrics() -> dict[str, str]:
    """Name -> where it is exported, as the table of docs/operations.md says."""
    return dict(ROW.findall((ROOT / "docs/operations.md").read_text()))


def exported(text: str) -> set[str]:
    """The families of what a server exports."""
    return set(re.findall(r"^# TYPE (\w+) ", text, re.M))


def series(families: Iterable[str], text: str) -> set[str]:
    """The names of the series of these families, also of those without values yet."""
    histograms = set(re.findall(r"^# TYPE (\w+) histogram", text, re.M))
    plain = {name for name in families if name not in histograms}
    return plain | {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}


def used(name: str) -> set[str]:
    """The series that a file of deploy/monitoring asks for."""
    return set(re.findall(r"\bseesr_\w+", (FOLDER / name).read_text()))
