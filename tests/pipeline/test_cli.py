from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.cog_server import ROOT
from seesr import Engine, Settings
from seesr.cli import commands
from seesr.networks import weights

QUICK = ["--num-inference-steps", "1", "--seed", "1", "--bundle", str(weights.POCKET), "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path, photo: Image.Image) -> Path:
    (tmp_path / "in/sub").mkdir(parents=True)
    photo.reduce(2).save(tmp_path / "in/a.png")
    photo.reduce(2).save(tmp_path / "in/sub/b.jpg")
    (tmp_path / "in/broken.png").write_bytes(b"no picture")
    (tmp_path / "in/notes.txt").write_text("ignored")
    return tmp_path


def test_there_is_a_flag_for_every_setting() -> None:
    args = commands.parser().parse_args(["upscale", "x", "--out", "y"])
    for field in dataclasses.fields(Settings):
        assert getattr(args, field.name) == field.default


def test_a_folder_is_done_but_for_the_bad_file_and_then_skipped(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out"
    command = ["upscale", str(folder / "in"), "--out", str(out), *QUICK]
    assert commands.main(command) == 1
    told = capsys.readouterr()
    assert "3 to do, 0 already there" in told.out
    assert "broken.png: this is not an image" in told.err
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.*")) == ["a-x4.png", "sub/b-x4.png"]
    first = np.asarray(Image.open(out / "a-x4.png"))
    assert first.shape == (96, 128, 3)
    assert commands.main(command) == 1
    assert "1 to do, 2 already there" in capsys.readouterr().out


def test_zips_of_all_views_are_skipped_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["upscale", str(folder / "in/a.png"), "--out", str(folder), *QUICK, "--output-view", "all"]
    assert commands.main(command) == 0
    assert (folder / "a-x4.zip").exists()
    assert commands.main(command) == 0
    assert "0 to do, 1 already there" in capsys.readouterr().out
    assert commands.main([*command, "--cfg-scale", "1.5"]) == 0
    assert "1 to do, 0 already there" in capsys.readouterr().out


def test_two_sources_of_one_name_are_told_apart(folder: Path, photo: Image.Image) -> None:
    photo.reduce(2).save(folder / "in/sub/b.png")
    assert commands.main(["upscale", str(folder / "in/sub"), "--out", str(folder / "out"), *QUICK]) == 0
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["b.jpg-x4.png", "b.png-x4.png"]


@pytest.mark.parametrize("out", ["in/out", "in"])
def test_results_in_the_input_folder_are_not_enlarged_again(
    folder: Path, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "in/broken.png").unlink()
    command = ["upscale", str(folder / "in"), "--out", str(folder / out), *QUICK]
    assert commands.main(command) == 0
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert commands.main(command) == 0
    told = capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    assert "0 to do, 2 already there" in told and "2 passed over, results of earlier runs" in told


def test_a_result_of_other_settings_is_made_anew(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["upscale", str(folder / "in/a.png"), "--out", str(folder / "out"), *QUICK]
    assert commands.main(command) == 0
    first = (folder / "out/a-x4.png").read_bytes()
    for changes in (["--seed", "2"], ["--output-view", "comparison"], ["--user-prompt", "dark"]):
        assert commands.main([*command, *changes]) == 0
        assert "1 to do" in capsys.readouterr().out
    assert commands.main(command) == 0
    assert (folder / "out/a-x4.png").read_bytes() == first
    unseeded = command[: command.index("--seed")] + command[command.index("--bundle") :]
    assert commands.main(unseeded) == 0
    assert "0 to do, 1 already there" in capsys.readouterr().out  # any seed will do where none is asked for


def test_the_record_of_a_file_makes_the_same_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["upscale", str(folder / "in/a.png"), "--bundle", str(weights.POCKET), "--device", "cpu", "--out"]
    assert commands.main([*base, str(folder / "x"), "--num-inference-steps", "2", "--user-prompt", "dark"]) == 0
    first = (folder / "x/a-x4.png").read_bytes()
    assert commands.main([*base, str(folder / "y"), "--like", str(folder / "x/a-x4.png")]) == 0
    assert (folder / "y/a-x4.png").read_bytes() == first
    other = first.replace(b'"bundle_sha256": "', b'"bundle_sha256": "0', 1)
    assert commands.main([*base, str(folder / "z"), "--like", str(folder / "in/a.png")]) == 2
    assert "no settings record" in capsys.readouterr().err.splitlines()[-1]
    from seesr.images.png import chunk

    start = other.index(b"iTXt")
    size = int.from_bytes(first[start - 4 : start], "big")
    body = other[start + 4 : start + 5 + size]
    (folder / "other.png").write_bytes(first[: start - 4] + chunk(b"iTXt", body) + first[start + 8 + size :])
    assert commands.main([*base, str(folder / "z"), "--like", str(folder / "other.png")]) == 2
    assert "was made by another bundle (pocket)" in capsys.readouterr().err


def test_what_was_done_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "in/scan.gif").write_bytes(b"II*")
    commands.main(["upscale", str(folder / "in"), "--out", str(folder / "out"), *QUICK])
    told = capsys.readouterr().out
    assert "bundle pocket" in told and "a-x4.png, seed 1, " in told
    assert "1 passed over, .gif: no picture that can be read" in told and ".txt" in told


def test_what_was_asked_for_wrongly_is_one_line_before_any_work(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["upscale", str(folder / "in/a.png"), "--out", str(folder / "out")]
    assert commands.main([*command, "--device", "nonsense"]) == 2
    assert "the device 'nonsense' cannot be used here" in capsys.readouterr().err
    (folder / "empty").mkdir()
    assert commands.main(["upscale", str(folder / "empty"), "--out", str(folder / "out"), *QUICK]) == 2
    assert "there is no picture in" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(Engine, "load", lambda *_: pytest.fail("loaded although --out cannot be used"))
    assert commands.main(["upscale", str(folder / "in"), "--out", str(folder / "in/a.png")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    monkeypatch.setenv("SEESR_DEADLINE", "soon")
    assert commands.main(command) == 2
    told = capsys.readouterr().err
    assert told.startswith("SEESR_DEADLINE is 'soon'") and told.count("\n") == 1


def test_help_has_ranges_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        commands.main(["upscale", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(1 to 8, default: 4.0)" in told and "(default: on)" in told and "default: random, reported" in told


def test_info_is_json_with_versions_bundle_configuration_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["info", "--bundle", str(weights.POCKET), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bundle"]["name"] == "pocket" and len(found["bundle"]["files"]["unet/config.json"]) == 64
    assert found["libraries"]["torch"] and found["device"] == "cpu"
    assert found["configuration"]["SEESR_ATTENTION"] == "auto" and found["limits"]["largest_side"] == 32768


def test_a_wheel_installs_and_works_outside_the_repository(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "seesr", clone / "seesr", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone)
    wheels, target = tmp_path / "wheels", tmp_path / "site"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(clone)]
    subprocess.run(build, check=True, capture_output=True)
    install = [*pip, "install", "--no-deps", "--target", str(target), *map(str, wheels.glob("*.whl"))]
    subprocess.run(install, check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(target), "SEESR_WEIGHTS": str(weights.POCKET), "SEESR_DEVICE": "cpu"}
    script = "import seesr, sys; print(seesr.__file__); from seesr.cli.commands import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(target)), done.stdout + done.stderr
    assert "ok      weights: pocket" in done.stdout


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
    commands.main(["doctor", "--bundle", str(weights.POCKET)])
    told = capsys.readouterr().out
    assert "ok      weights: pocket" in told and "this is the small model" in told
    assert commands.main(["doctor", "--bundle", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert "PROBLEM weights: no weights" in told and f"repair it with: {weights.FETCH}" in told
    monkeypatch.setenv("SEESR_WEIGHTS", str(tmp_path))
    assert commands.main(["doctor"]) == 1
    assert "repair it with: point SEESR_WEIGHTS to a bundle" in capsys.readouterr().out
    monkeypatch.setenv("SEESR_WEIGHTS", str(weights.POCKET))
    monkeypatch.setenv("SEESR_ATTENTION", "fast")
    assert commands.main(["doctor", "--device", "nonsense"]) == 1
    told = capsys.readouterr().out
    assert "PROBLEM SEESR_ATTENTION is 'fast'" in told and "repair it with: unset SEESR_ATTENTION" in told
    assert "PROBLEM the device 'nonsense' cannot be used here" in told
