"""The Engine: bytes in, bytes out, from any thread, with deadlines, cancellation and unloading."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from cog_client import png
from PIL import Image

from scripts.cog_server import ROOT
from seesr import Engine, Settings, Upscaler
from seesr.config import Configuration
from seesr.engine.engine import computed, reused_stages
from seesr.engine.rates import Measured
from seesr.images.read import decode
from seesr.images.record import read_record
from seesr.networks import kernels, weights
from seesr.pipeline.pipeline import UpscaleRun
from seesr.runtime.memory import Budget
from seesr.runtime.progress import Deadline, DeadlineExceeded, Position, Progress
from seesr.runtime.tile_batches import TilePool

QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=32)
STAGES = ["read", "tags", "text", "enlarge", "encode", "denoise", "decode", "finish", "file"]


class Stopped(BaseException):
    """Raised by a watcher, as a cancelled caller's exception would be."""


def test_bytes_and_a_path_give_what_the_upscaler_gives(
    engine: Engine, pocket: Upscaler, photo: Image.Image, tmp_path: Path
) -> None:
    (tmp_path / "photo.png").write_bytes(png(photo))
    output = engine.run(png(photo), QUICK)
    assert output.data == engine.run(tmp_path / "photo.png", QUICK).data == pocket(png(photo), QUICK).data
    assert output.seed == output.metrics["seed"] == 1
    assert list(output.metrics["seconds"]) == STAGES


def test_what_was_repaired_in_a_file_is_in_the_metrics(engine: Engine) -> None:
    inputs = ROOT / "tests/data/inputs"
    settings = Settings(num_inference_steps=1, seed=1, scale_factor=1)
    cut = engine.run((inputs / "vips-rgb.jpg").read_bytes()[:-2], settings)
    assert cut.metrics["warnings"] == "the JPEG has no end (EOI); all of its pixels are there"
    turned = (inputs / "exif-gps-text.jpg").read_bytes()
    mask = png(Image.new("L", (24, 32), 255))
    output = engine.run(turned, settings, mask=mask)
    assert output.metrics["warnings"] == "EXIF data that cannot be read are left out: GPSLatitude"
    assert decode(output.data).size == (24, 32)


def test_the_seconds_of_the_stages_are_those_that_passed(engine: Engine, photo: Image.Image) -> None:
    shares, actuals = [], []
    for seed in range(100, 104):  # none of them is cached
        started = time.perf_counter()
        metrics: Any = engine.run(png(photo), QUICK.replace(seed=seed)).metrics
        seconds, actual = metrics["seconds"].values(), metrics["actual"]["seconds"]
        whole = time.perf_counter() - started
        assert 0 < actual <= whole + 0.001 and actual == round(actual, 3)
        actuals.append(actual)
        assert all(second >= 0 and second == round(second, 3) for second in seconds)
        assert sum(seconds) <= whole + 0.001 * len(seconds)
        assert any(second != round(second, 2) for second in seconds)
        shares.append(sum(seconds) / whole)
    assert any(actual != round(actual, 2) for actual in actuals)
    assert max(shares) > 0.5  # of several: other processes can delay one between its stages


def test_about_describes_the_loaded_bundle(engine: Engine) -> None:
    about = engine.about()
    assert about["loaded"] is True and about["device"] == "cpu"
    assert about["attention"] in kernels.KERNELS
    defaults = {"num_inference_steps": 1, "latent_tiled_size": (64, 72)}
    assert about["bundle"] == {**engine.loaded._asdict(), "path": str(weights.POCKET), "defaults": defaults}
    assert engine.loaded.kind == "pocket"
    assert engine.machine.startswith(torch.backends.cpu.get_cpu_capability())
    assert engine.upscaler is not None and engine.upscaler.cache.limit == engine.configuration.cache_mb * 1_000_000


def test_bundle_and_device_are_the_callers_or_those_of_the_environment(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SEESR_WEIGHTS", str(tiny_bundle))
    monkeypatch.setenv("SEESR_DEVICE", "cpu:0")
    with caplog.at_level("INFO"):
        engine = Engine.load()
    assert (engine.bundle, engine.device) == (tiny_bundle, "cpu:0") and "pocket bundle" not in caplog.text
    match = re.search(r"setup: load (\S+) s, warm-up (\S+) s", caplog.text)
    assert match and all(0 <= float(seconds) < 60 for seconds in match.groups())
    engine = Engine.load(weights.POCKET, "cpu")
    assert (engine.bundle, engine.device) == (weights.POCKET, "cpu") and "the small pocket bundle" in caplog.text
    monkeypatch.delenv("SEESR_WEIGHTS")
    assert Engine.load().bundle == weights.locate()
    monkeypatch.setenv("SEESR_DEVICE", "elsewhere")
    with pytest.raises(ValueError, match="elsewhere"):
        Engine.load(weights.POCKET)


def test_what_an_image_says_of_the_machine(engine: Engine, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with a mask, or with cached stages, says nothing of how right its quote was."""
    learned: list[Measured] = []
    monkeypatch.setattr(engine.rates, "learn", learned.append)
    settings = QUICK.replace(seed=500, output_format="webp", user_prompt="words that no other test has")
    first_output = engine.run(photo.rotate(180), settings)
    engine.run(photo.rotate(180), settings)
    mask = np.full((48, 64), 255, np.uint8)
    engine.run(photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT), settings.replace(user_prompt="others"), mask=mask)
    metrics: Any = first_output.metrics
    first, cached, masked = learned
    assert first.quoted == metrics["quote"]["seconds"] and cached.quoted is masked.quoted is None
    assert first.seconds.keys() == masked.seconds.keys() > cached.seconds.keys()
    assert (first.suffix, first.megapixels, first.length) == ("webp", 128 * 96 / 1e6, len(first_output.data))
    assert first.before["host"] <= first.after["host"] == metrics["peak_memory_mb"]["host"]


def test_settings_are_the_defaults_where_none_are_named(
    engine: Engine, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_run", lambda source, settings, *more: settings)
    for given, expected in ((None, Settings()), (QUICK, QUICK)):
        results: list[Any] = [engine.run(b"x", given), asyncio.run(engine.arun(b"x", given))]
        assert results == [expected, expected]
    assert engine.quote(photo).output_size == "256x192" and engine.quote(photo, QUICK).output_size == "128x96"


def test_the_deadline_of_a_caller_replaces_that_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_upscale", lambda self, upscaler, source, settings, progress, mask: progress.watchers)
    for configured in (None, 7.0):
        engine = Engine(weights.POCKET, "cpu", Configuration(deadline=configured), tmp_path)
        engine.upscaler = SimpleNamespace()  # type: ignore[assignment]
        for own, seconds in ((None, configured), (5, 5.0), (Deadline(3.0), 3.0)):
            watchers: Any = engine.run(b"x", deadline=own, watchers=(print,))
            assert watchers[0] is print
            assert [watcher.seconds for watcher in watchers[1:]] == ([] if seconds is None else [seconds])


class Helper:
    """Stands for the tile helper: answers with the context of the image and the task."""

    def __init__(self, networks: object, graphs: object) -> None:
        self.networks, self.graphs, self.contexts = networks, graphs, dict[str, bytes]()

    def knows(self, image: str) -> bool:
        return image in self.contexts

    def learn(self, image: str, context: bytes) -> None:
        assert image not in self.contexts, "once for each image"
        self.contexts[image] = context

    def __call__(self, image: str, task: bytes) -> bytes:
        return self.contexts[image] + task


def test_tiles_of_other_processes_are_computed_by_one_helper_for_each_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seesr.engine.engine.TileHelper", Helper)
    engine = Engine(weights.POCKET, "cpu", Configuration(), tmp_path)
    assert engine.compute_tiles("image", lambda: b"context ", b"task") is None  # nothing is loaded
    assert not engine.busy
    for bundle in ("one", "two"):
        engine.upscaler = SimpleNamespace(networks=bundle, graphs=f"graphs of {bundle}")  # type: ignore[assignment]
        for task in (b"1", b"2"):
            assert engine.compute_tiles("image", lambda b=bundle: b.encode(), task) == bundle.encode() + task
        helper: Any = engine.helper
        assert (helper.networks, helper.graphs) == (bundle, f"graphs of {bundle}")
    with engine.turn:  # an image of this engine is made
        assert engine.busy and engine.compute_tiles("image", lambda: b"context ", b"task") is None
    assert not engine.busy


def test_tiles_are_shared_with_pools_while_a_bundle_is_loaded(tmp_path: Path) -> None:
    engine, pool = Engine(weights.POCKET, "cpu", Configuration(), tmp_path), cast(TilePool, object())
    engine.share_tiles(pool)
    engine.upscaler = SimpleNamespace(pools=[])  # type: ignore[assignment]
    engine.share_tiles(pool)
    assert cast(Any, engine.upscaler).pools == [pool]


@pytest.mark.parametrize(("workers", "devices"), [(1, None), (2, ["cpu"]), (3, ["cpu", "cpu"])])
def test_the_processes_that_share_an_image(
    workers: int, devices: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seesr.engine.engine.HelperProcesses", lambda *arguments: arguments)
    monkeypatch.setattr(os, "sched_getaffinity", {0: range(6)}.__getitem__)
    configuration = Configuration(tile_workers=workers)
    engine = Engine(weights.POCKET, "cpu", configuration, tmp_path)
    upscaler: Any = SimpleNamespace(networks=SimpleNamespace(device=torch.device("cpu")))
    expected = None if devices is None else (weights.POCKET, devices, 2, configuration)
    assert engine._helpers(upscaler, 2) == expected


@pytest.mark.parametrize(
    ("reused", "tiles", "expected"),
    [("", 0, set()), ("tags, text", 3, {"tags", "text", "denoise"}), ("particles", 0, {"particles", "decode"})],
)
def test_stages_with_results_of_earlier_runs(reused: str, tiles: int, expected: set[str]) -> None:
    metrics: Any = {"reused": reused, "tiles_reused": tiles}
    assert reused_stages(metrics) - {""} == expected
    work = {"tags": 1.0, "denoise": 2.0, "decode": 3.0, "file:png": 4.0}
    assert computed(work, metrics) == {name: units for name, units in work.items() if name not in expected}


def test_callers_on_many_threads_wait_for_their_turn(engine: Engine, photo: Image.Image) -> None:
    expected = {seed: engine.run(png(photo), QUICK.replace(seed=seed)).data for seed in range(4)}
    result: dict[int, bytes] = {}

    def ask(seed: int) -> None:
        result[seed] = engine.run(png(photo), QUICK.replace(seed=seed)).data

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert result == expected


@pytest.mark.parametrize("stage", STAGES)
def test_a_watcher_can_end_the_work_in_every_stage(engine: Engine, photo: Image.Image, stage: str) -> None:
    seen = []

    def watch(position: Position) -> None:
        seen.append(position.stage)
        if position.stage == stage:
            raise Stopped

    with pytest.raises(Stopped):
        engine.run(png(photo), QUICK, watchers=(watch,))
    assert list(dict.fromkeys(seen)) == STAGES[: STAGES.index(stage) + 1]
    assert Image.open(io.BytesIO(engine.run(png(photo), QUICK).data)).size == (128, 96)


def test_a_deadline_ends_the_work_and_says_how_far_it_came(
    engine: Engine, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = engine.run(png(photo), QUICK).data
    long = Settings(num_inference_steps=8, seed=1, latent_tiled_size=32)
    with pytest.raises(DeadlineExceeded, match=r"^the deadline of 0\.3 s has passed \(\w+, \d+ of \d+\); allow"):
        engine.run(png(photo), long, deadline=0.3)
    assert engine.run(png(photo), QUICK).data == good
    monkeypatch.setenv("SEESR_DEADLINE", "0.3")
    with pytest.raises(DeadlineExceeded):
        Engine.load(weights.POCKET, "cpu").run(png(photo), long)


def test_an_unloaded_engine_says_so_and_loads_again(photo: Image.Image) -> None:
    engine = Engine.load(weights.POCKET, "cpu")
    before = engine.run(png(photo), QUICK).data
    assert engine.healthy()
    upscaler = engine.upscaler
    engine.reload()
    assert engine.upscaler is upscaler  # nothing to do
    engine.unload()
    assert not engine.healthy() and engine.about() == {"loaded": False}
    with pytest.raises(RuntimeError):
        _ = engine.loaded
    with pytest.raises(RuntimeError, match="the engine is unloaded"):
        engine.run(png(photo), QUICK)
    engine.reload()
    assert engine.healthy() and engine.run(png(photo), QUICK).data == before


def test_health_is_false_once_the_device_has_failed(photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(weights.POCKET, "cpu")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("seesr.pipeline.upscaler.torch.ones", fail)
    assert not engine.healthy()


def test_health_is_answered_during_a_run(engine: Engine, photo: Image.Image) -> None:
    answers = []
    engine.run(png(photo), QUICK, watchers=(lambda position: answers.append(engine.healthy()),))
    assert answers and all(answers)


def test_loading_runs_one_image_first(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    whole = UpscaleRun.run
    monkeypatch.setattr(UpscaleRun, "run", lambda self: (runs.append(self), whole(self))[1])
    Engine.load(weights.POCKET, "cpu")
    assert len(runs) == 1


def test_watchers_see_every_stage_count_up_to_its_total(pocket: Upscaler, photo: Image.Image) -> None:
    """The filling of the last batch of tiles is not counted."""
    positions: list[Position] = []
    settings = Settings(num_inference_steps=2, seed=1, latent_tiled_size=32, latent_tiled_overlap=8)
    job = UpscaleRun(pocket.networks, settings, decode(png(photo)), Progress(positions.append))
    job.budget = Budget(4)
    tiles = job.run().metrics["tiles"]
    assert tiles % 4 != 0
    denoised = [position for position in positions if position.stage == "denoise"]
    assert denoised[-1] == Position("denoise", 2 * tiles, 2 * tiles)
    assert all(position.done <= position.total for position in positions)
    assert list(dict.fromkeys(position.stage for position in positions)) == STAGES[1:-1]


def test_a_saved_result_keeps_depth_profile_exif_and_record(pocket: Upscaler, tmp_path: Path) -> None:
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x010F] = "maker"
    grey = Image.fromarray(np.linspace(0, 65535, 48 * 64).reshape(48, 64).astype(np.uint16))
    buffer = io.BytesIO()
    grey.save(buffer, "PNG", exif=exif)
    result = pocket(decode(buffer.getvalue()), QUICK)
    result.save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as opened:
        assert opened.getexif()[0x010F] == "maker"
    assert decode((tmp_path / "deep.png").read_bytes()).rgb.dtype == np.uint16
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 30, 90)).save(buffer, "PNG", icc_profile=icc)
    result = pocket(decode(buffer.getvalue()), QUICK)
    result.save(tmp_path / "a.jpeg")
    with Image.open(tmp_path / "a.jpeg") as opened:
        assert opened.format == "JPEG" and opened.info["icc_profile"] == icc
    record = read_record(tmp_path / "a.jpeg")
    assert record["settings"]["seed"] == 1 and record["settings"]["output_format"] == "jpg"
    with pytest.raises(ValueError, match="a.bmp must end in .png, .webp, .jpg"):
        result.save(tmp_path / "a.bmp")


def test_the_package_and_its_settings_load_without_torch() -> None:
    script = "import seesr, sys; seesr.Settings(); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
