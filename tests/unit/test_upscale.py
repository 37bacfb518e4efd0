"""`seesr upscale` without an engine: what is planned, estimated and printed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tqdm
from PIL import Image

from scripts.cog_server import ROOT
from seesr.cli import upscale
from seesr.cli.plan import STREAM, Task
from seesr.cli.upscale import Run, RunBar
from seesr.engine.rates import Quote
from seesr.images.limits import megapixels
from seesr.networks import weights
from seesr.networks.weights import Bundle, Defaults
from seesr.runtime.progress import LineStream
from seesr.settings import Settings

Capture = pytest.CaptureFixture[str]
MEGAPIXEL = Task("a.png", Path("a.png"), Path(), "b.png", size=(1000, 1000))
POCKET = weights.read_manifest(weights.POCKET)


def png(size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


def task(name: str, **changes: Any) -> Task:
    return dataclasses.replace(Task(name, Path(name), Path(), f"x/{name}", (10, 5), (20, 10)), **changes)


def two_digits(values: list[float]) -> float:
    return float(f"{statistics.median(values):.2g}")


def test_the_rough_estimate_is_the_median_of_the_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    measured: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for path in (ROOT / "results/bench").glob("*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            area, denoise = megapixels(row["size"], row["size"]), row["seconds"]["denoise"]
            on_cpu = "device" not in row["peak_memory_mb"]
            kind = ("pocket" if row["weights"] == "pocket" else "full") if on_cpu else "cuda"
            cores = int(row["device"].partition(" cores")[0].rpartition(" ")[2]) if on_cpu else 1
            seconds = row["seconds_total"] - denoise, denoise / row["steps"]
            measured[kind].append((seconds[0] / area * cores, seconds[1] / area * cores))
    assert measured.keys() == upscale.SECONDS.keys()
    other = Bundle(Path(), "other", "other", "", {})
    for kind, bundle, device in (
        ("pocket", POCKET, "cpu"), ("full", None, "cpu"), ("full", other, "cpu"), ("cuda", POCKET, "cuda:0"),
    ):  # fmt: skip
        one, two = (upscale.estimate(MEGAPIXEL, Settings(num_inference_steps=n), bundle, device) for n in (1, 2))
        fixed, step = ([row[place] for row in measured[kind]] for place in (0, 1))
        assert (2 * one - two, two - one) == pytest.approx((two_digits(fixed), two_digits(step))), kind


def test_the_estimate_takes_the_steps_of_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscale, "SECONDS", {"cuda": (0.0, 1.0)})
    assert upscale.estimate(MEGAPIXEL, Settings(), POCKET, "cuda") == POCKET.defaults.num_inference_steps
    assert upscale.estimate(MEGAPIXEL, Settings(), None, "cuda") == Defaults().num_inference_steps


QUOTE = Quote("200x100", 5, 3.0, 4.0, 15 * 10**17, {"host": 300}, 0.0123456, 7)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    quotes = {
        (1, 1): None, (2, 2): dataclasses.replace(QUOTE, seconds=None), (3, 3): QUOTE,
        (4, 4): Quote("20x10", 6, 4.0, 5.0, None, {}, None, 7),
    }  # fmt: skip
    monkeypatch.setattr(upscale, "quotes_of", lambda bundle, device: lambda settings, size: quotes[size])
    monkeypatch.setattr(upscale, "estimate", lambda *arguments: 2.04)
    tasks = [task("bad.png", error="it is empty"), task("done.png", done=True)]
    return tasks + [task(f"{side}.png", source_size=(side, side)) for side in (1, 2, 3, 4)]


def test_a_dry_run_prints_what_each_image_should_take(planned: list[Task], capsys: Capture) -> None:
    assert Run(planned, Settings(), sys.stdout, False).forecast(None, None) == 1
    captured = capsys.readouterr()
    rough = "about 2.0 s (rough: no image was measured on this machine yet)"
    assert captured.out.splitlines() == [
        "done.png -> x/done.png, 20x10, already there",
        f"1.png -> x/1.png, 20x10, {rough}",
        f"2.png -> x/2.png, 20x10, {rough}",
        "3.png -> x/3.png, 20x10, about 3.0 s, 5 tiles, 300 MB of memory, 1500000000000.0 MB file, price 0.01235",
        "4.png -> x/4.png, 20x10, about 4.0 s, 6 tiles, 0 MB of memory",
        "about 11.1 s in all; nothing was written",
    ]
    assert captured.err.splitlines() == ["1 of 6 images failed:", "  bad.png: it is empty"]


def test_a_dry_run_as_json(planned: list[Task], capsys: Capture) -> None:
    del planned[0]
    assert Run(planned, Settings(), sys.stdout, True).forecast(None, None) == 0
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [row["estimated_seconds"] for row in rows] == [0.0, 2.0, 2.0, 3.0, 4.0]
    assert [row["already_there"] for row in rows] == [True, False, False, False, False]
    assert all(row["size"] == [20, 10] for row in rows) and [row["quote"] for row in rows[:2]] == [None, None]
    assert rows[3]["quote"] == dataclasses.asdict(QUOTE)


def test_without_a_bundle_or_a_measured_image_there_are_no_quotes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert upscale.quotes_of(None, None) is None and upscale.quotes_of(POCKET, None) is None


@pytest.mark.parametrize(("count", "summary"), [(1, False), (2, True)])
def test_failures_are_summed_up_where_there_were_several_images(count: int, summary: bool, capsys: Capture) -> None:
    tasks = [task("bad.png", error="it is empty"), task("good.png")][:count]
    assert Run(tasks, Settings(), sys.stdout, False).end() == 1
    assert ("1 of 2 images failed:" in capsys.readouterr().err) is summary
    assert Run([task("good.png")] * 2, Settings(), sys.stdout, False).end() == 0
    assert capsys.readouterr().err == ""


def test_no_more_of_standard_input_is_read_than_shows_that_it_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upscale, "LARGEST_FILE", 1000)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(png() + bytes(5000))))
    piped = Task(STREAM, Path("stdin"), Path(), STREAM)
    upscale.check(piped, set(), Settings(), None, SimpleNamespace(overwrite=False, mask=None))  # type: ignore[arg-type]
    assert piped.data is not None and len(piped.data) == 1001
    assert (piped.source_size, piped.size) == ((20, 16), (80, 64))


def test_the_size_of_a_region_is_planned(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    one = Task(str(tmp_path / "a.png"), Path("a.png"), tmp_path, str(tmp_path / "b.png"))
    args: Any = SimpleNamespace(overwrite=False, mask=None)
    upscale.check(one, set(), Settings(region="0,0,30,20"), None, args)
    assert one.size == (30, 20) and not one.done


@pytest.mark.parametrize(
    ("bundle", "mask", "done"), [(POCKET, None, True), (POCKET, Path("m.png"), False), (None, None, False)]
)
def test_a_result_is_compared_only_without_a_mask_and_with_a_bundle(
    bundle: Bundle | None, mask: Path | None, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(b"a result")
    monkeypatch.setattr(upscale.plan, "is_done", lambda *arguments: True)
    one = Task(str(tmp_path / "a.png"), Path("a.png"), tmp_path, str(tmp_path / "b.png"))
    args: Any = SimpleNamespace(overwrite=True, mask=mask)
    upscale.check(one, set(), Settings(), bundle, args)
    assert one.done is done


def test_the_bundle_is_that_of_the_argument_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert upscale.bundle_path(None) == weights.locate()
    monkeypatch.setenv("SEESR_DEVICE", "cpu")
    assert upscale.bundle_path(None) == weights.locate()
    monkeypatch.setenv("SEESR_WEIGHTS", "elsewhere")
    assert upscale.bundle_path(None) == Path("elsewhere") and upscale.bundle_path(Path("x")) == Path("x")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bar_of_a_terminal_and_the_lines_of_a_log(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of less than a second shows none. A log gets a line every ten seconds."""
    options: dict[str, Any] = {}
    calls: list[str] = []
    shown = SimpleNamespace(clear=lambda: calls.append("clear"), refresh=lambda: calls.append("refresh"))
    monkeypatch.setattr(tqdm, "tqdm", lambda **given: options.update(given) or shown)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal))
    bar = RunBar([MEGAPIXEL]).__enter__()
    assert options["total"] == 1.0 and options["delay"] == 1 and options["leave"] is False
    if terminal:
        assert 0 < options["mininterval"] < 0.5 and options["file"] is sys.stderr
    else:
        assert options["mininterval"] == 10 and isinstance(options["file"], LineStream)
    with bar.hidden():
        calls.append("a line")
    assert calls == (["clear", "a line", "refresh"] if terminal else ["a line"])


def test_an_image_whose_header_was_not_read_has_no_size() -> None:
    unread = Task("a.png", Path("a.png"), Path())
    assert unread.source_size == unread.size == (0, 0) and not unread.done
    assert RunBar([unread, MEGAPIXEL]).total == 1.0


def test_the_folders_of_a_result_are_made(tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(run=lambda *args, **options: SimpleNamespace(data=b"result", seed=1, metrics={}))
    run = Run([], Settings(), io.StringIO(), False)
    bar = RunBar([])
    for name in ("a/b/c.png", "a/b/d.png"):
        run.upscale(task("a.png", target=str(tmp_path / name)), engine, None, bar)
        assert (tmp_path / name).read_bytes() == b"result"
