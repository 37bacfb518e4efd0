"""The command line: planning before loading, outputs, messages and exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from scripts.cog_server import ROOT
from seesr import Engine, Settings, cli
from seesr.checkpoints import __main__ as checkpoints_command
from seesr.cli import commands, plan, upscale
from seesr.cli.commands import COMMANDS, SHELLS, parser
from seesr.engine import preflight
from seesr.images import xmp
from seesr.images.record import read_record
from seesr.networks import hardware, weights
from seesr.serving import app, mcp_server

QUICK = ["--num-inference-steps", "1", "--seed", "1", "--scale-factor", "2", "--latent-tiled-size", "16"]
QUICK += ["--bundle", str(weights.POCKET)]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def quick(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the engine of the other tests."""
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: engine)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "load", lambda *args, **more: pytest.fail("loaded although there is nothing to do"))


def image(path: Path | str, shade: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """Writes a small image, different for every shade."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.add.outer(np.arange(size[1]), np.arange(size[0]) * 3)[..., None] + [shade, 40, 90]
    Image.fromarray(ramp.astype(np.uint8)).save(path, format={".jpeg": "JPEG", ".jpg": "JPEG"}.get(path.suffix, "PNG"))
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def run(*arguments: object) -> int:
    return cli.main(["upscale", *QUICK, *map(str, arguments)])


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "seesr", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SEESR_DEVICE": "cpu", **options.pop("env", {})}
    return subprocess.run(command, capture_output=True, env=environment, timeout=100, **options)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["photo.jpg"], ["photo-x2.png"]),
        (["upscale", "photo.jpg"], ["photo-x2.png"]),
        (["photo.jpg", "--output-format", "webp"], ["photo-x2.webp"]),
        (["photo.jpg", "-o", "out/"], ["out/photo-x2.png"]),
        (["photo.jpg", "--out", "out"], ["out/photo-x2.png"]),
        (["photo.jpg", "--out", "new/x.jpeg"], ["new/x.jpeg"]),
        (["photo.jpg", "-o", "x.webp"], ["x.webp"]),
        (["photo.jpg", "-o", "x.zip", "--output-view", "all"], ["x.zip"]),
        (["photo.jpg", "--output-view", "all"], ["photo-x2.zip"]),
        (["photo.jpg", "in"], ["in/a-x2.png", "in/sub/b-x2.png", "photo-x2.png"]),
        (["in", "-o", "out"], ["out/a-x2.png", "out/sub/b-x2.png"]),
        (["in", "--no-recursive", "-o", "out"], ["out/a-x2.png"]),
        (["in/*.png"], ["in/a-x2.png"]),
        (["in/**/*.png", "-o", "out"], ["out/a-x2.png", "out/b-x2.png"]),
        (["photo.jpg", "photo.jpg", "./photo.jpg", "in/a.png"], ["in/a-x2.png", "photo-x2.png"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_where_results_go(quick: None, folder: Path, arguments: list[str], expected: list[str]) -> None:
    sources = {"photo.jpg", "in/a.png", "in/sub/b.png"}
    for source in sources:
        image(source)
    assert cli.main([*arguments, *QUICK]) == 0
    assert sorted(set(files(folder)) - sources) == expected
    for name in expected:
        assert read_record(folder / name)["settings"]["output_format"] == {".jpeg": "jpg", ".webp": "webp"}.get(
            Path(name).suffix, "png"
        )


@pytest.mark.parametrize(
    ("sources", "arguments", "expected"),
    [
        (["d1/a.png", "d2/a.png"], ["d1", "d2"], ["d1/a-x2.png", "d2/a-x2.png"]),
        (["d1/a.png", "d2/a.png"], ["d1/a.png", "d2/a.png"], ["d1/a-x2.png", "d2/a-x2.png"]),
        (["x/d/a.png", "y/d/a.png"], ["x/d", "y/d"], ["a.png-1-x2.png", "a.png-2-x2.png"]),
        (["t/s.jpg", "t/s.png"], ["t"], ["s.jpg-x2.png", "s.png-x2.png"]),
        (
            ["t/s.jpg", "t/s.jpg.png", "t/s.png"], ["t"],
            ["s.jpg-x2.png", "s.jpg.png-x2.png", "s.png-x2.png"],
        ),
        (["t/s.jpg", "t/s.jpg.png"], ["t"], ["s-x2.png", "s.jpg-x2.png"]),
    ],
)  # fmt: skip
def test_every_source_has_a_target_of_its_own(
    unloaded: None, folder: Path, sources: list[str], arguments: list[str], expected: list[str], capsys: Capture
) -> None:
    for source in sources:
        image(source)
    assert run(*arguments, "-o", "o", "--dry-run", "--json") == 0
    targets = [json.loads(line)["target"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(targets) == [f"o/{name}" for name in expected]


def test_a_result_is_skipped_only_for_the_same_source_settings_and_bundle(
    quick: None, folder: Path, capsys: Capture
) -> None:
    image("d1/a.png", 1), image("d2/a.png", 2)

    def made(*arguments: object) -> bool:
        assert run(*arguments, "-o", "o") == 0
        return "1 to do, 0 already there, bundle pocket\n" in capsys.readouterr().out

    assert made("d1/a.png") and not made("d1/a.png")
    first = (folder / "o/a-x2.png").read_bytes()
    assert made("d2/a.png")  # of the same name
    image("d2/a.png", 3)
    assert made("d2/a.png") and not made("d2/a.png")  # its content has changed
    for changes in (["--seed", "2"], ["--user-prompt", "dark"], ["--output-view", "comparison"]):
        assert made("d2/a.png", *changes)
    assert made("d1/a.png") and (folder / "o/a-x2.png").read_bytes() == first
    assert cli.main(["d1/a.png", "-o", "o", *QUICK[:2], *QUICK[4:]]) == 0  # without --seed
    assert "0 to do, 1 already there" in capsys.readouterr().out


def test_a_finished_folder_is_reported_without_loading(
    engine: Engine, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: engine)
    image("a.png")
    assert run("a.png") == 0
    monkeypatch.setattr(Engine, "load", lambda *args, **more: pytest.fail("loaded"))
    assert run("a.png") == 0
    assert "0 to do, 1 already there" in capsys.readouterr().out


def test_results_in_a_folder_are_not_upscaled_again(quick: None, folder: Path, capsys: Capture) -> None:
    image("in/a.png")
    assert run("in") == 0
    before = files(folder)
    assert run("in") == 0
    assert files(folder) == before and "1 skipped, results of earlier runs" in capsys.readouterr().out
    assert run("in/a-x2.png") == 0 and "in/a-x2-x2.png" in files(folder)


def test_foreign_files_are_not_overwritten(quick: None, folder: Path, capsys: Capture) -> None:
    image("a.png", 1), image("a-x2.png", 2)
    theirs = (folder / "a-x2.png").read_bytes()
    assert run("a.png") == 1
    assert "a-x2.png exists and was not written by seesr: use --overwrite" in capsys.readouterr().err
    assert (folder / "a-x2.png").read_bytes() == theirs
    assert run("a.png", "--overwrite") == 0 and (folder / "a-x2.png").read_bytes() != theirs
    for overwrite in ([], ["--overwrite"]):
        assert run("a.png", "-o", "a.png", *overwrite) == 1
        assert "would replace a.png, which is one of the images" in capsys.readouterr().err


def test_an_image_whose_description_is_a_number_is_an_image(quick: None, folder: Path, capsys: Capture) -> None:
    spaces = f"xmlns:rdf='{xmp.RDF}' xmlns:dc='http://purl.org/dc/elements/1.1/'"
    about = "<rdf:Description><dc:description>1987</dc:description></rdf:Description>"
    Image.new("RGB", (16, 16)).save("n.jpg", xmp=f"<rdf:RDF {spaces}>{about}</rdf:RDF>".encode())
    assert run("n.jpg") == 0 and "n-x2.png" in files(folder)
    assert run("n.jpg", "-o", "o", "--like", "n.jpg") == 2
    assert capsys.readouterr().err.strip() == "n.jpg: the file has no settings record"


def test_folders_are_read_by_content(quick: None, folder: Path, capsys: Capture) -> None:
    names = ["web.jfif", "a.jpe", "photo", "scan.old"]
    for name in names:
        shutil.copy(image("x.jpg"), image(f"in/{name}"))
    shutil.copy(ROOT / "tests/data/inputs/cjxl-rgb-8.jxl", "in/render.out")
    for name in ("notes.txt", "clip.mp4", "x.gif", "DSC1.NEF"):
        (folder / "in" / name).write_bytes(b"GIF89a" if name.endswith("gif") else b"II*\0 nothing to see here")
    (folder / "in/notes.txt").write_text("text")
    (folder / "in/clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    assert run("in", "-o", "o") == 0
    output = capsys.readouterr().out
    assert files(folder / "o") == ["a-x2.png", "photo-x2.png", "render-x2.png", "scan-x2.png", "web-x2.png"]
    assert all(f"1 skipped, {kind}: not a readable image" in output for kind in (".txt", ".mp4", ".gif", ".nef"))


def test_sidecars_and_folders_with_the_name_of_an_image(quick: None, folder: Path, capsys: Capture) -> None:
    image("in/p.png"), image("in/holiday.png/inner.png"), image("in/__MACOSX/p.png"), image("in/.hidden/p.png")
    for name in ("._p.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / "in" / name).write_bytes(b"no image")
    assert run("in", "-o", "o") == 0
    assert files(folder / "o") == ["holiday.png/inner-x2.png", "p-x2.png"]
    captured = capsys.readouterr()
    assert "skipped" not in captured.out and captured.err.strip() == ""


def bomb(path: Path) -> None:
    Image.new("1", (14000, 14000)).save(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bomb, "limit"),
        (lambda path: path.write_bytes(b"no image"), "not an image"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(image(path).read_bytes()[:60]), "bad.png: "),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
        (lambda path: image(path, size=(9000, 1)), "scale"),
    ],
    ids=["bomb", "text", "empty", "cut", "link", "large"],
)
def test_a_bad_file_fails_alone_and_its_error_is_printed_twice(
    quick: None, folder: Path, make: Callable[[Path], object], message: str, capsys: Capture
) -> None:
    image("in/a.png"), image("in/zz.png")
    make(folder / "in/bad.png")
    assert run("in", "-o", "o", "--scale-factor", "4") in (1,)
    output = capsys.readouterr().err.splitlines()
    assert len(files(folder / "o")) == 2
    assert output[0].startswith("in/bad.png: ") and message in output[0]
    assert output[-2:] == ["1 of 3 images failed:", f"  {output[0]}"]


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), Image.DecompressionBombError("far too\nlarge")])
def test_any_exception_of_one_file_fails_that_file_alone(
    engine: Engine, quick: None, folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    image("in/a.png", 1), image("in/b.png", 2)
    run_one = engine.run

    def fail(source: Path, *args: Any, **options: Any) -> Any:
        if source.name == "a.png":
            raise error
        return run_one(source, *args, **options)

    monkeypatch.setattr(engine, "run", fail)
    assert run("in", "-o", "o") == 1
    assert files(folder / "o") == ["b-x2.png"]
    output = capsys.readouterr().err.splitlines()
    assert output[0].startswith(f"in/a.png: {type(error).__name__}") and len(output) == 3


def test_missing_files_are_reported_before_loading_and_the_others_are_upscaled(
    unloaded: None, folder: Path, monkeypatch: pytest.MonkeyPatch, engine: Engine, capsys: Capture
) -> None:
    assert run("missing.jpg", "*.tif") == 1
    output = capsys.readouterr().err.splitlines()
    assert output[:2] == ["missing.jpg: no such file or directory", "*.tif: no such file or directory"]
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: engine)
    image("a.png")
    assert run("missing.jpg", "a.png") == 1
    assert "a-x2.png" in files(folder)


@pytest.mark.long
def test_names_that_are_not_utf_8(folder: Path) -> None:
    for name in (b"a1.png", b"caf\xe9.png", b"zz.png"):
        image(os.fsdecode(b"names/" + name))
    for encoding in ("utf-8:strict", "ascii"):
        done = process("names", "-o", f"o-{encoding[:3]}", *QUICK, cwd=folder, env={"PYTHONIOENCODING": encoding})
        assert done.returncode == 0, done.stderr
        result = sorted(os.listdir(os.fsencode(folder / f"o-{encoding[:3]}")))  # noqa: PTH208
        assert result == [b"a1-x2.png", b"caf\xe9-x2.png", b"zz-x2.png"]
        assert rb"caf\udce9.png -> " in done.stdout


def test_unwritable_targets_are_reported_before_the_work(unloaded: None, folder: Path, capsys: Capture) -> None:
    image(folder / ("n" * 251 + ".png"))
    assert run("n" * 251 + ".png") == 1
    assert (
        "the output name has 258 bytes, the limit is 255: choose a shorter name with --out" in capsys.readouterr().err
    )
    image("a.png")
    (folder / "x.png").mkdir()
    assert run("a.png", "-o", "a.png/b") == 2
    assert "cannot be written to" in capsys.readouterr().err
    for arguments, message in (
        (["a.png", "a.png/../x.png", "-o", "y.png"], "--out y.png is one file, and there are 2 images"),
        (["x.png"], "there is no image in x.png"),
        (["a.png", "-o", "y.zip"], "--out y.zip needs --output-view all"),
        (["a.png", "-o", "y.png", "--output-view", "all"], "is one image"),
        (["a.png", "--mask", "m.png"], "--mask m.png: no such file"),
        (["a.png", "--scale-factor", "9"], "scale_factor is 9"),
        (["a.png", "c.png", "-o", "y.png"], "--out y.png is one file, and there are 2 images"),
        (["x.png", "-o", "y.png"], "--out y.png is one file, and there are 0 images"),
    ):
        image("x.png/../c.png")
        assert run(*arguments) in (1, 2), arguments
        assert message in capsys.readouterr().err or message == "there is no image in x.png"


def test_parallel_starts_do_not_disturb_one_another(folder: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from seesr.cli.plan import Task, check_folders

    tasks = [Task("a.png", Path("a.png"), Path(), str(folder / "o.png"))]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: check_folders(tasks), range(400)))
    assert files(folder) == []


@pytest.mark.long
def test_standard_input_and_output(folder: Path) -> None:
    data = image("a.png").read_bytes()
    done = process("-", *QUICK, input=data, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert Image.open(io.BytesIO(done.stdout)).size == (40, 32)
    done = process("-", "-o", "x.webp", *QUICK, input=data, cwd=folder)
    assert done.returncode == 0 and read_record(folder / "x.webp")
    done = process("-", "-o", "-", *QUICK, input=b"no image", cwd=folder)
    assert done.returncode == 1 and done.stdout == b"" and b"-: this is not an image" in done.stderr


def test_json_is_one_line_per_image(quick: None, folder: Path, capsys: Capture) -> None:
    image("in/a.png"), image("in/b.png", 5)
    (folder / "in/c.png").write_bytes(b"no image")
    assert run("in", "-o", "o", "--json") == 1
    rows = {row["source"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["in/a.png"]["target"] == "o/a-x2.png" and rows["in/a.png"]["seed"] == 1
    seconds = rows["in/a.png"]["seconds"]
    assert 0 < seconds < 60 and seconds == round(seconds, 3) and rows["in/a.png"]["metrics"]["output_size"] == "40x32"
    assert "not an image" in rows["in/c.png"]["error"] and len(rows) == 3
    (folder / "in/c.png").unlink()
    image("in/d.png", 7)
    assert run("in", "-o", "o", "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {row["source"]: row for row in map(json.loads, lines)}
    assert len(lines) == 3 and rows["in/a.png"]["already_there"] is True and "metrics" in rows["in/d.png"]


def test_a_dry_run_says_what_would_be_done(unloaded: None, folder: Path, capsys: Capture) -> None:
    image("a.png"), image("b.png", size=(40, 30))
    assert run("a.png", "b.png", "-o", "o", "--dry-run") == 0
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("a.png -> o/a-x2.png, 40x32, about ") and "80x60" in output[1]
    assert output[-1].endswith("s in all; nothing was written") and not (folder / "o").exists()


def test_the_bar_has_percent_number_and_time_left(
    quick: None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import tqdm

    real = tqdm.tqdm
    at_once = {"mininterval": 0, "delay": 0}
    monkeypatch.setattr(tqdm, "tqdm", lambda **options: real(**{**options, **at_once}))
    image("in/a.png"), image("in/b.png", 5)
    assert run("in", "-o", "o") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" in line]
    percents = [int(line.split("%")[0]) for line in lines]
    assert percents == sorted(percents) and percents[-1] >= 95
    assert any("image 1 of 2, " in line for line in lines) and any("image 2 of 2, " in line for line in lines)
    assert all(line.endswith(" left") for line in lines)


def test_there_is_a_flag_for_every_setting() -> None:
    args = parser().parse_args(["upscale", "x", "--out", "y"])
    for field in dataclasses.fields(Settings):
        assert getattr(args, field.name) == field.default


def test_help_version_completion_and_misspelt_commands(capsys: Capture) -> None:
    for arguments in (["--help"], ["upscale", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        output = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0 and "exit codes: 0 all images are done; 1 an image failed; 2 " in output
    assert "(1 to 8, default: 4.0)" in output and "(default: on)" in output and "default: random, reported" in output
    assert "--scale-factor FLOAT" in output and "--output-format {png,webp,jpg}" in output
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == "seesr 0.1.0"
    for shell in SHELLS:
        assert cli.main(["completion", shell]) == 0
        assert "_ARGCOMPLETE" in capsys.readouterr().out
    assert cli.main([]) == 2 and "COMMAND" in capsys.readouterr().out
    assert cli.main(["upscal", "x.jpg"]) == 2
    assert "upscal: no such file; is it upscale?" in capsys.readouterr().err


def test_names_that_the_terminal_cannot_show_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    out, error = (io.TextIOWrapper(io.BytesIO(), "ascii") for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", error)
    assert cli.main([]) == 2
    assert out.errors == error.errors == "backslashreplace" and out.line_buffering and error.line_buffering


@pytest.mark.parametrize(
    ("line", "started"),
    [
        (["mcp"], "stdio"), (["mcp", "--http", "--port", "9"], "http 9 mcp with sessions"),
        (["serve", "--port", "9"], "http 9"), (["serve"], "http 5000"),
        (["worker"], "SEESR_REDIS is not set"), (["fleet", "status"], "SEESR_REDIS is not set"),
    ],
)  # fmt: skip
def test_serve_and_mcp_start_the_right_servers(
    line: list[str], started: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    begun = commands_begun(monkeypatch)
    code = cli.main(line)
    if "REDIS" in started:
        assert code == 2 and started in capsys.readouterr().err and not begun
    else:
        assert code == 0 and begun == [started]


def test_the_bar_counts_megapixels() -> None:
    class Bar:
        n, text = 0.0, ""

        def update(self, more: float) -> None:
            self.n += more

        def set_description_str(self, text: str, refresh: bool) -> None:
            self.text = text

    tasks = [plan.Task(name, Path(name), Path(), size=(1000, height)) for name, height in (("a", 2000), ("b", 1000))]
    progress = upscale.RunBar(tasks)
    progress.bar = bar = Bar()  # pyright: ignore[reportAttributeAccessIssue]
    shown = []
    for task in tasks:
        progress.next(task)
        for share in (0.0, 0.5, 0.4, 1.0):
            progress(types.SimpleNamespace(progress=share))  # type: ignore[arg-type]
            shown.append((bar.text, bar.n))
    assert shown == [
        ("image 1 of 2, ", 0.0), ("image 1 of 2, ", 1.0), ("image 1 of 2, ", 1.0), ("image 1 of 2, ", 2.0),
        ("image 2 of 2, ", 2.0), ("image 2 of 2, ", 2.5), ("image 2 of 2, ", 2.5), ("image 2 of 2, ", 3.0),
    ]  # fmt: skip
    assert progress.total == 3.0


def test_the_estimate_by_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr(upscale, "SECONDS", {"full": (96.0, 46.0), "cuda": (0.3, 0.1)})
    task = plan.Task("a.png", Path("a.png"), Path(), size=(2000, 1000))
    four = Settings(num_inference_steps=4)
    steered = four.replace(use_kds=True, num_particles=2, cfg_scale=1.5)
    found = [
        upscale.estimate(task, settings, None, device)
        for settings, device in ((four, "cpu"), (four, "cuda:1"), (steered, "cpu"))
    ]
    assert found == pytest.approx([2 * (96 + 46 * 4) / 2, 2 * (0.3 + 0.1 * 4), 2 * (96 + 46 * 4 * 2 * 2) / 2])


@pytest.mark.parametrize(
    ("line", "started"),
    [
        (["serve", "--port", "9"], "http 9 gateway"), (["mcp", "--http"], "http 5000 mcp gateway"),
        (["worker"], "worker"), (["fleet", "drain", "gpu0"], "drain gpu0"),
    ],
)  # fmt: skip
def test_a_fleet_is_used_where_redis_is_set(line: list[str], started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESR_REDIS", "redis://127.0.0.1:6379/0")
    begun = commands_begun(monkeypatch)

    def work() -> None:
        begun.append("worker")
        sys.exit(0)  # as Celery, which takes the process over

    def command(configuration: Any, order: str, worker: str) -> int:
        begun.append(f"{order} {worker}")
        return 0

    parts: dict[str, Any] = {"gateway": {"parts": "gateway"}, "worker": {"run": work}, "control": {"command": command}}
    for name, values in parts.items():
        monkeypatch.setitem(sys.modules, f"seesr.fleet.{name}", types.SimpleNamespace(**values))  # type: ignore[arg-type]
    try:
        assert cli.main(line) == 0
    except SystemExit as ended:
        assert ended.code == 0
    assert begun == [started]


def commands_begun(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been started, in words."""
    begun: list[str] = []

    def serve(configuration: Any, host: str, port: int, bundle: Any, device: Any, fleet: Any, addition: Any) -> int:
        words = ["http", str(port), "" if addition == app.Addition() else addition, fleet or ""]
        begun.append(" ".join(filter(None, words)))
        return 0

    monkeypatch.setattr(app, "serve", serve)
    monkeypatch.setattr(mcp_server, "run_stdio", lambda *arguments: begun.append("stdio") or 0)
    monkeypatch.setattr(mcp_server, "http_parts", lambda sessions: "mcp with sessions" if sessions else "mcp")
    return begun


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("a value"), 2, "a value"), (weights.WeightsError("no weights"), 2, "no weights"),
        (weights.CannotServe("too small"), 3, "too small"), (BrokenPipeError(), 1, ""),
        (KeyboardInterrupt(), 130, "interrupted; finished outputs are kept and skipped in the next run"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(commands, "run", fail)
    replaced = []
    monkeypatch.setattr(os, "dup2", lambda *descriptors: replaced.append(descriptors))
    assert cli.main(["x.png"]) == code
    assert capfd.readouterr().err.strip() == message and len(replaced) == isinstance(error, BrokenPipeError)


def test_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["seesr", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().out.startswith("seesr ")
    with pytest.raises(SystemExit) as ended:
        cli.main(["keys"])  # without an order
    assert ended.value.code == 2


def test_a_file_that_is_named_like_a_command(unloaded: None, folder: Path, capsys: Capture) -> None:
    assert cli.main(["server.png", "b.png", "--dry-run"]) == 2
    assert capsys.readouterr().err == "server.png: no such file; is it serve?\n"
    image("server.png")
    assert cli.main(["server.png", "b.png", "--dry-run"]) == 1
    assert "server.png -> server-x4.png, 80x64, about " in capsys.readouterr().out


def completed(line: str, folder: Path) -> set[str]:
    environment = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "words"), "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line, "COMP_POINT": str(len(line)),
    }  # fmt: skip
    process(cwd=folder, env=environment)
    return {word.strip() for word in (folder / "words").read_text().splitlines()}


def test_shells_complete_commands_and_flags(folder: Path) -> None:
    assert set(COMMANDS) <= completed("seesr ", folder)
    assert {"--overwrite", "--out"} <= completed("seesr upscale x.png --o", folder)
    assert "--overwrite" in completed("seesr x.png --o", folder)
    assert {"--overwrite", "--out"} <= completed("seesr --o", folder)
    assert completed("seesr serve --p", folder) == {"--port"}


@pytest.mark.parametrize("line", ["--help", "--version", "missing.jpg", "a.png --dry-run", "a.png --x"])
def test_help_and_version_load_neither_torch_nor_configuration(folder: Path, line: str) -> None:
    image("a.png")
    script = f"""
import sys
from seesr.cli import main
try: main({line.split()!r})
except SystemExit: pass
print({{"torch", "pydantic", "diffusers", "transformers", "scipy", "celery", "starlette"}} & set(sys.modules))"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SEESR_")}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_record_of_a_file_makes_the_same_again(quick: None, folder: Path, capsys: Capture) -> None:
    image("a.png")
    base = ["a.png", "--bundle", str(weights.POCKET)]
    assert (
        cli.main([*base, "-o", "x", "--num-inference-steps", "2", "--user-prompt", "dark", "--scale-factor", "2"]) == 0
    )
    first = (folder / "x/a-x2.png").read_bytes()
    assert cli.main([*base, "-o", "y", "--like", "x/a-x2.png"]) == 0
    assert (folder / "y/a-x2.png").read_bytes() == first
    assert cli.main([*base, "-o", "z", "--like", "a.png"]) == 2
    assert "a.png: the file has no settings record" in capsys.readouterr().err
    from seesr.images.png import chunk

    other = first.replace(b'"bundle_sha256": "', b'"bundle_sha256": "0', 1)
    start = first.index(b"iTXtseesr")
    size = int.from_bytes(first[start - 4 : start], "big")
    body = other[start + 4 : start + 5 + size]
    (folder / "other.png").write_bytes(first[: start - 4] + chunk(b"iTXt", body) + first[start + 8 + size :])
    assert cli.main([*base, "-o", "z", "--like", "other.png"]) == 2
    assert "was made with another bundle (pocket)" in capsys.readouterr().err


def test_wrong_devices_and_variables_are_one_line(
    folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    image("a.png")
    assert cli.main(["a.png", "--device", "nonsense"]) == 2
    assert "the device 'nonsense' cannot be used here" in capsys.readouterr().err
    monkeypatch.setenv("SEESR_DEADLINE", "soon")
    assert cli.main(["a.png"]) == 2
    output = capsys.readouterr().err
    assert output.startswith("SEESR_DEADLINE is 'soon'") and output.count("\n") == 1


def test_info_is_json_with_versions_bundle_configuration_and_limits(capsys: Capture) -> None:
    assert cli.main(["info", "--json", "--bundle", str(weights.POCKET), "--device", "cpu"]) == 0
    output = capsys.readouterr().out
    result = json.loads(output)
    assert output == json.dumps(result, indent=1) + "\n"  # one value in a line, for people
    assert result["problem"] is None
    assert result["bundle"]["name"] == "pocket" and len(result["bundle"]["files"]["unet/config.json"]) == 64
    assert result["libraries"]["torch"] and result["device"] == "cpu"
    assert result["configuration"]["SEESR_ATTENTION"] == "auto" and result["limits"]["largest_side"] == 32768


def test_info_is_of_the_arguments_or_the_environment(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("SEESR_DEVICE", "nonsense")
    assert cli.main(["info"]) == 2 and "'nonsense' cannot be used here" in capsys.readouterr().err
    for variables, arguments in (({}, ["--bundle", str(tiny_bundle)]), ({"SEESR_WEIGHTS": str(tiny_bundle)}, [])):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert cli.main(["info", "--device", "cpu", *arguments]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["bundle"]["name"] == "tiny" and result["problem"] is None


@pytest.mark.long
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
    script = "import seesr, sys; print(seesr.__file__); from seesr.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(target)), done.stdout + done.stderr
    assert "ok      weights: pocket" in done.stdout and (target / "seesr/py.typed").exists()


@pytest.mark.long
def test_an_interrupt_leaves_nothing_half_written(folder: Path) -> None:
    for number in range(30):
        image(f"in/{number}.png", number)
    command = [sys.executable, "-m", "seesr", "in", "-o", "out", *QUICK, "--device", "cpu"]
    running = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits it ignored
    )
    deadline = time.monotonic() + 120
    while len(list(Path("out").glob("[!.]*.png"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; finished outputs are kept" in errors
    left = [path for path in (folder / "out").rglob("*") if path.is_file()]
    assert 2 <= len(left) < 30
    for path in left:
        with Image.open(path) as opened:
            opened.load()
        assert not path.name.startswith(".")


def test_doctor_names_what_is_wrong_and_the_remedy(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need = int(re.findall(r"Needs (\d+) GB of disk", str(checkpoints_command.__doc__))[0])
    free = need * 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free) if path.exists() else None)
    assert cli.main(["doctor", "--bundle", str(weights.POCKET)]) == 0
    output = capsys.readouterr().out
    assert "ok      weights: pocket" in output and "this is the small model" in output and "PROBLEM" not in output
    assert f"ok      {need} GB of disk free" in output
    free -= 1
    assert cli.main(["doctor", "--bundle", str(weights.POCKET)]) == 1
    assert (
        f"to fix it: free some space: the public weights and their conversion take {need} GB" in capsys.readouterr().out
    )
    free = 10**18
    assert cli.main(["doctor"]) == 0 and "ok      1000000000 GB of disk free" in capsys.readouterr().out
    for faster in (True, False):
        monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda faster=faster: faster)
        cli.main(["doctor", "--device", "cpu", "--bundle", str(weights.POCKET)])
        assert ("SEESR_PRECISION=bfloat16 is faster" in capsys.readouterr().out) is faster
    assert cli.main(["doctor", "--bundle", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert "PROBLEM weights: no weights" in output and f"to fix it: {weights.FETCH}" in output
    monkeypatch.setenv("SEESR_WEIGHTS", str(tmp_path / "nowhere"))
    assert cli.main(["doctor"]) == 1
    assert "to fix it: point SEESR_WEIGHTS to a bundle" in capsys.readouterr().out
    assert cli.main(["doctor", "--bundle", str(tmp_path)]) == 1
    assert f"to fix it: {weights.FETCH}" in capsys.readouterr().out
    monkeypatch.setenv("SEESR_WEIGHTS", str(weights.POCKET))
    monkeypatch.setenv("SEESR_ATTENTION", "fast")
    assert cli.main(["doctor", "--device", "nonsense"]) == 1
    output = capsys.readouterr().out
    assert "PROBLEM SEESR_ATTENTION is 'fast'" in output and "to fix it: unset SEESR_ATTENTION" in output
    assert "PROBLEM the device 'nonsense' cannot be used here" in output
    monkeypatch.delenv("SEESR_ATTENTION")

    def refuse(*arguments: object) -> None:
        raise weights.CannotServe("this machine is too small")

    monkeypatch.setattr(preflight, "require", refuse)
    assert cli.main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "PROBLEM this machine is too small\n        to fix it: use a machine that meets this" in output
    assert cli.main(["info"]) == 0
    assert json.loads(capsys.readouterr().out)["problem"] == "this machine is too small"
