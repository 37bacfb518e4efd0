from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from seesr import Settings, cli, weights

QUICK = ["--num-inference-steps", "1", "--seed", "1", "--bundle", str(tiny.POCKET), "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, photo: Image.Image) -> Path:
    (tmp_path / "in/sub").mkdir(parents=True)
    photo.reduce(2).save(tmp_path / "in/a.png")
    photo.reduce(2).save(tmp_path / "in/sub/b.jpg")
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    (tmp_path / "in/notes.txt").write_text("ignored")
    return tmp_path


def test_there_is_a_flag_for_every_setting() -> None:
    args = cli.parser().parse_args(["upscale", "x", "--out", "y"])
    for field in dataclasses.fields(Settings):
        assert getattr(args, field.name) == field.default


def test_a_folder_is_done_but_for_the_bad_file_and_then_skipped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    command = ["upscale", str(folder / "in"), "--out", str(out), *QUICK]
    assert cli.main(command) == 1
    told = capsys.readouterr()
    assert "3 to do, 0 already there" in told.out
    assert "broken.png: this is not an image" in told.err
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == ["a-x4.png", "sub/b-x4.png"]
    first = np.asarray(Image.open(out / "a-x4.png"))
    assert first.shape == (96, 128, 3)
    assert cli.main(command) == 1
    assert "1 to do, 2 already there" in capsys.readouterr().out


def test_two_sources_of_one_result_are_told_apart(
    folder: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    photo.reduce(2).save(folder / "in/sub/b.png")
    assert cli.main(["upscale", str(folder / "in/sub"), "--out", str(folder / "out"), *QUICK]) == 1
    assert "would replace that of" in capsys.readouterr().err


def test_a_bad_setting_and_missing_weights_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["upscale", str(folder / "in/a.png"), "--out", str(folder / "out")]
    assert cli.main([*command, "--scale-factor", "9"]) == 2
    assert capsys.readouterr().err == "scale_factor is 9.0; it must be from 1 to 8\n"
    assert cli.main([*command, "--bundle", str(folder / "nowhere")]) == 2
    assert "scripts/download.py" in capsys.readouterr().err


def test_an_interrupt_leaves_nothing_half_written(folder: Path) -> None:
    for number in range(30):
        (folder / f"in/{number}.png").write_bytes((folder / "in/a.png").read_bytes())
    out = folder / "out"
    command = [sys.executable, "-m", "seesr.cli", "upscale", str(folder / "in"), "--out", str(out), *QUICK]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.png")) if out.exists() else []) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped; what is finished stays" in errors
    left = [path for path in out.rglob("*") if path.is_file()]
    assert 2 <= len(left) < 30
    for path in left:
        with Image.open(path) as opened:
            opened.load()
        assert not path.name.startswith(".")


def test_doctor_names_what_is_wrong_and_the_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SEESR_WEIGHTS", str(tiny.POCKET))
    cli.main(["doctor"])
    told = capsys.readouterr().out
    assert "ok      weights: pocket" in told and "this is the small model" in told
    monkeypatch.setenv("SEESR_WEIGHTS", str(tmp_path))
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "PROBLEM weights: no weights" in told and f"mend it with: {weights.FETCH}" in told
    monkeypatch.setenv("SEESR_WEIGHTS", str(tiny.POCKET))
    monkeypatch.setenv("SEESR_ATTENTION", "fast")
    assert cli.main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "PROBLEM SEESR_ATTENTION is 'fast'" in told and "mend it with: unset SEESR_ATTENTION" in told
