"""The plan of `seesr upscale`: where results go, what is refused, and what is done already."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from seesr.cli import plan
from seesr.cli.plan import STREAM, Destination, Failure, Task
from seesr.networks.weights import Bundle, Defaults
from seesr.settings import Settings

BUNDLE = Bundle(Path(), "name", "kind", "", {"a": "b"}, Defaults(3, (64, 72)))


@pytest.mark.parametrize(
    ("out", "sources", "expected"),
    [
        (None, [STREAM], Destination(stream=True)), (None, ["a.png"], Destination()),
        (None, ["a.png", STREAM], Destination()), (STREAM, ["a.png"], Destination(stream=True)),
        ("x.PNG", ["a.png"], Destination(file=Path("x.PNG"))), ("x.jpeg", ["a"], Destination(file=Path("x.jpeg"))),
        ("x.zip", ["a"], Destination(file=Path("x.zip"))), ("x.tif", ["a"], Destination(folder=Path("x.tif"))),
        ("x.png/", ["a", "b"], Destination(folder=Path("x.png"))), ("d.png", ["a"], Destination(folder=Path("d.png"))),
        ("out", ["a", "b"], Destination(folder=Path("out"))),
    ],
)  # fmt: skip
def test_what_out_names(
    out: str | None, sources: list[str], expected: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d.png").mkdir()
    tasks = [Task(source, Path(source), Path()) for source in sources]
    assert plan.choose_output(out, tasks, False) == expected
    if expected.file or out == STREAM:
        for several in (tasks * 2, tasks[:0]):
            with pytest.raises(ValueError, match=f"--out {out} is one file, and there are {len(several)} images"):
                plan.choose_output(out, several, False)
        with pytest.raises(ValueError, match="is one file"):
            plan.choose_output(out, tasks, True)
    plan.name_targets(tasks, expected, Settings())
    if expected.stream or expected.file:
        assert tasks[0].target == str(expected.file or STREAM)


def test_standard_input_and_a_file_of_its_name() -> None:
    tasks = [Task(STREAM, Path("stdin"), Path()), Task("stdin", Path("stdin"), Path())]
    plan.name_targets(tasks, Destination(), Settings())
    assert [task.target for task in tasks] == ["stdin-1-x4.png", "stdin-2-x4.png"]


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    longest = os.pathconf(tmp_path, "PC_NAME_MAX")
    for length in (longest, longest + 1):
        task = Task("a", Path("a"), Path(), str(tmp_path / ("n" * length)))
        if length > longest:
            with pytest.raises(Failure, match=f"the output name has {length} bytes, the limit is {longest}"):
                plan.check_target(task, set(), False)
        else:
            plan.check_target(task, set(), False)
    with pytest.raises(Failure, match="is a folder: choose another --out"):
        plan.check_target(Task("a", Path("a"), Path(), str(tmp_path)), set(), True)


SETTINGS: dict[str, Any] = Settings(seed=7, num_inference_steps=3, latent_tiled_size=72).recorded
RECORD = {"settings": SETTINGS, "bundle_sha256": BUNDLE.digest, "source_sha256": "sum"}


@pytest.mark.parametrize(
    ("settings", "record", "done"),
    [
        (Settings(), RECORD, True),
        (Settings(seed=7, num_inference_steps=3, latent_tiled_size=72), RECORD, True),
        (Settings(seed=8), RECORD, False), (Settings(num_inference_steps=2), RECORD, False),
        (Settings(latent_tiled_size=64), RECORD, False), (Settings(scale_factor=2), RECORD, False),
        (Settings(), None, False), (Settings(), {**RECORD, "mask_sha256": "sum"}, False),
        (Settings(), {**RECORD, "bundle_sha256": "another"}, False),
        (Settings(), {**RECORD, "source_sha256": "another"}, False),
        (Settings(), {**RECORD, "settings": {**SETTINGS, "num_inference_steps": 2}}, False),
        (Settings(), {**RECORD, "settings": {**SETTINGS, "latent_tiled_size": 48}}, False),
    ],
)  # fmt: skip
def test_a_result_is_done_if_the_same_was_made_from_the_same_source(
    settings: Settings, record: dict[str, Any] | None, done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "record_of", lambda path: record)
    assert plan.is_done(Path("x.png"), settings, BUNDLE, "sum") is done


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (Failure("no"), "no"), (ValueError("wrong"), "wrong"), (OSError("No device"), "no device"),
        (PermissionError(13, "Permission denied"), "permission denied"), (KeyError("a\nb"), r"KeyError 'a\nb'"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_why_a_file_failed_in_one_line(error: Exception, line: str) -> None:
    def fail() -> None:
        raise error

    assert plan.in_one_line(fail) == line and plan.in_one_line(lambda: None) is None


def test_a_file_without_settings_is_refused_as_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.png cannot be read: No such file"):
        plan.settings_like(tmp_path / "nowhere.png", "")
    (tmp_path / "x.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"x\.png cannot be read: it is not an image"):
        plan.settings_like(tmp_path / "x.png", "")
