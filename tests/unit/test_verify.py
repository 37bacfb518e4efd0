"""`seesr verify`: its report, and when a file is made again. tests/pipeline/test_provenance.py runs the engine."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seesr.cli import verify
from seesr.cli.verify import NOT_CHECKED, OK, WRONG, Report
from seesr.networks import weights
from seesr.settings import Settings

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("states", "code"),
    [([], 0), ([OK, OK], 0), ([OK, NOT_CHECKED], 2), ([NOT_CHECKED, WRONG, OK], 1), ([WRONG], 1)],
)
def test_the_exit_code_is_that_of_the_worst_check(states: list[str], code: int, capsys: Capture) -> None:
    report = Report({"bundle": "pocket", "settings": {"user_prompt": "ü"}})
    for number, state in enumerate(states):
        report.add(f"check {number}", state, "why")
    assert report.show(False) == code and report.passed == (code == 0)
    captured = capsys.readouterr()
    lines = [f"check {number}: {state}: why" for number, state in enumerate(states)]
    good = [line for line, state in zip(lines, states, strict=True) if state == OK]
    assert captured.out.splitlines() == ["bundle: pocket", 'settings: {"user_prompt": "ü"}', *good]
    assert captured.err.splitlines() == [line for line in lines if line not in good]
    assert report.show(True) == code
    checks = {f"check {number}": {"state": state, "about": "why"} for number, state in enumerate(states)}
    assert json.loads(capsys.readouterr().out) == {**report.about, "checks": checks}


def png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()


def test_how_two_files_differ() -> None:
    first = np.full((4, 5, 3), 100, np.uint8)
    second = first.copy()
    second[0, 0, 0], second[1, 1, 1] = 90, 103
    assert verify.difference(png(first), png(second)) == "pixels differ by up to 10"
    assert verify.difference(png(first), png(first)).startswith("the pixels are the same")
    larger = verify.difference(png(first), png(np.zeros((4, 6, 3), np.uint8)))
    assert larger == "the bytes differ: (5, 4) pixels of uint8, again (6, 4) of uint8"
    assert "again (5, 4) of uint16" in verify.difference(png(first), png(np.zeros((4, 5), np.uint16)))


@pytest.mark.parametrize(
    ("source", "changes", "code", "again"),
    [
        ("a.png", {}, 0, True),
        (None, {}, 0, False),
        ("b.png", {}, 1, False),
        ("a.png", {"bundle_sha256": "another"}, 2, False),
        ("a.png", {"settings": {"unknown": 1}}, 1, False),
    ],
)
def test_a_file_is_made_again_if_a_source_is_named_and_all_else_is_right(
    source: str | None, changes: dict[str, Any], code: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png", "result.png"):
        (tmp_path / name).write_bytes(name.encode())
    record = {
        "settings": Settings(seed=1).recorded, "bundle_sha256": weights.read_manifest(weights.POCKET).digest,
        "source_sha256": weights.sha256(tmp_path / "a.png"),
    }  # fmt: skip
    monkeypatch.setattr(verify, "read_record", lambda path: record | changes)
    monkeypatch.setattr(verify, "read_source_type", lambda path: "a mark")
    monkeypatch.setattr(verify.content_credentials, "state", lambda data: None)
    runs: list[Any] = []
    monkeypatch.setattr(verify, "run_again", lambda *arguments: runs.append(arguments))
    args: Any = SimpleNamespace(
        file=tmp_path / "result.png", source=source and tmp_path / source, mask=None, json=False, device=None
    )
    assert verify.verify(args, weights.POCKET) == code and bool(runs) is again


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    args: Any = SimpleNamespace(file=tmp_path / "x.txt", source=None)
    with pytest.raises(ValueError, match=r"x\.txt: not a PNG, WebP, JPEG or zip file"):
        verify.verify(args, weights.POCKET)
