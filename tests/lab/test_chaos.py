"""lab.serve.chaos, in short."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.serve.chaos import chaos


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a tmpfs, which needs root")
def test_no_job_is_lost_run_twice_or_misreported(tmp_path: Path) -> None:
    figures = chaos(tmp_path, jobs=40, kills=5)
    assert [figures[name] for name in ("lost", "twice", "misreported", "files_left")] == [0, 0, 0, 0]
    assert "jobs.sqlite is damaged" in figures["said"]["damaged_journal"]
    assert "No space left on device" in figures["said"]["full_disk"]
    assert figures["live_ms"]["max"] < 100
