"""The folder of outputs of a process, and metrics in one level."""

from __future__ import annotations

import atexit
import os
import re
import stat
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from seesr.engine.output_folder import PREFIX, OutputFolder, flat


def test_folders_of_processes_that_ended_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda *args, **options: at_exit.append(partial(*args, **options)))
    own, ended, running = (f"{PREFIX}{pid}" for pid in (os.getpid(), 999999999, 1))
    for name in (own, ended, running, "others"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").touch()
    outputs = OutputFolder()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([own, running, "others"])
    assert list(outputs.path.iterdir()) == [] and stat.S_IMODE(outputs.path.stat().st_mode) == 0o700
    paths = [outputs.save(b"data", 7, "png") for _ in range(2)]
    assert len(set(paths)) == 2 and all(path.read_bytes() == b"data" for path in paths)
    assert all(re.fullmatch(r"7-[0-9a-f]{8}\.png", path.name) for path in paths)
    outputs.clear()
    assert list(outputs.path.iterdir()) == []
    (call,) = at_exit
    call()
    call()  # the folder may be gone by then
    assert not outputs.path.exists()
    assert OutputFolder().path.exists()


def test_metrics_in_one_level() -> None:
    metrics: dict[str, Any] = {"seed": 1, "seconds": {"read": 0.1, "file": 0.2}}
    assert dict(flat(metrics)) == {"seed": 1, "seconds.read": 0.1, "seconds.file": 0.2}
