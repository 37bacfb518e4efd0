"""CPU seconds of the start, compared with `import torch` in the same test. results/startup.md has all figures."""

from __future__ import annotations

import pytest

from lab.startup import measure
from scripts.cog_server import ROOT

TORCH = "`import torch` alone"
LIMITS = {  # the most that each command may take, in those of importing torch
    "`seesr --help`": 0.25,  # 0.5 CPU seconds where torch takes 2.2
    "`seesr --version`": 0.25,
    "`import seesr`": 0.25,
    "`seesr missing.jpg`": 0.25,
    "`seesr photo.png --dry-run`": 0.25,
    "`seesr info`": 1.5,
    "`seesr doctor`": 1.5,
    "`Engine.load()`, pocket weights": 1.8,
}


@pytest.fixture(scope="module")
def shares() -> dict[str, float]:
    return {row["command"]: row["of torch"] for row in measure((None, ROOT), 1, [TORCH, *LIMITS])}


@pytest.mark.parametrize("command", LIMITS)
def test_a_command_takes_a_share_of_importing_torch(shares: dict[str, float], command: str) -> None:
    """The least of up to three looks, since a busy machine only adds."""
    share = shares[command]
    for _ in range(2):
        if share >= LIMITS[command]:
            share = min(share, measure((None, ROOT), 1, [TORCH, command])[1]["of torch"])
    assert share < LIMITS[command]
