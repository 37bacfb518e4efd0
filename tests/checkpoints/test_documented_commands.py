"""The documented commands for the full weights, from a fresh clone, against the replica of the public repositories."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import published
import pytest
from hub import Hub

from seesr.networks import weights

ROOT = weights.ROOT.parent


@pytest.fixture
def clone(tmp_path: Path, repositories: Path) -> Path:
    """The committed files with this environment's packages, and the sums of the miniatures as the published ones."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", "--shared", ROOT, clone], check=True)
    environment = clone / ".venv"
    environment.mkdir()
    for path in (ROOT / ".venv").resolve().iterdir():
        if path.name != ".installed":
            (environment / path.name).symlink_to(path)
    (clone / "seesr/checkpoints/published.json").write_text(json.dumps(published.sums(repositories)))
    (environment / ".installed").touch()  # newer than pyproject.toml, so that nothing is installed
    return clone


def documented(page: str) -> list[str]:
    """Every command line of a page that starts with ./scripts/weights, without its comment."""
    lines = re.findall(r"^(\./scripts/weights[^#\n]*)", (ROOT / page).read_text(), flags=re.MULTILINE)
    return list(dict.fromkeys(line.strip() for line in lines))


@pytest.mark.slow
def test_the_documented_commands_work_from_a_fresh_clone(clone: Path, repositories: Path, tmp_path: Path) -> None:
    commands = documented("docs/weights.md")
    assert {"./scripts/weights", "./scripts/weights --plan"} <= set(commands)
    with Hub(repositories) as hub:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")} | {
            "HF_ENDPOINT": hub.url,
            "SEESR_GITHUB": hub.raw,
            "SEESR_CACHE": str(tmp_path / "cache"),
            "HF_HOME": str(tmp_path / "no-login"),
        }
        for command in commands:
            done = subprocess.run(command.split(), cwd=clone, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, (command, done.stderr)
    assert weights.verify(clone / "weights/full").kind == "full"
    assert not (tmp_path / "cache/downloads").exists()
