"""Quotes of an engine: from the header alone, counted as the pipeline computes, refined by every image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from cog_client import png
from PIL import Image

from scripts.cog_server import ROOT
from seesr import Engine, Settings, Upscaler, cli
from seesr.engine.rates import Rates
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.pipeline.outline import outline_of
from seesr.pipeline.stages import StageCache
from seesr.pipeline.work import plan
from seesr.runtime.owner import image_of
from seesr.runtime.progress import Deadline, DeadlineExceeded

QUICK = Settings(num_inference_steps=1, seed=1, latent_tiled_size=16, scale_factor=2)
RGB = skimage.data.chelsea()[60:90, 100:140]
HALF = np.zeros((30, 40), np.uint8)
HALF[:, :23] = 255
CHANGES: list[dict[str, Any]] = [
    {},
    {"num_inference_steps": 2},
    {"num_inference_steps": None},
    {"latent_tiled_size": None},
    {"latent_tiled_overlap": 0},
    {"scale_factor": 3.5},
    {"target_side": 111},
    {"region": "0,0,16,16"},
    {"region": "0,0,16,16", "num_inference_steps": 2},
    {"fidelity": 1.0},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_plan_is_what_is_computed(pocket: Upscaler, changes: dict[str, Any], masked: bool) -> None:
    settings, mask = QUICK.replace(**changes), HALF if masked else None
    planned = plan(outline_of(pocket.networks), settings, (40, 30), mask)
    metrics = pocket(ImageData(RGB), settings, mask=mask).metrics
    assert "x".join(map(str, planned.output)) == (metrics["output_size"] if not settings.region else "80x60")
    assert len(planned.steps) == metrics["steps"]
    assert len(planned.steps[-1]) == metrics["tiles"] - metrics["tiles_skipped"]


def test_an_outline_survives_its_file(pocket: Upscaler, tiny_upscaler: Upscaler, tmp_path: Path) -> None:
    for number, upscaler in enumerate((pocket, tiny_upscaler)):
        rates = Rates(tmp_path / str(number))
        rates.begin({}, outline_of(upscaler.networks))
        rates.save()
        assert Rates(rates.path).outline == outline_of(upscaler.networks)


def test_a_quote_needs_the_header_alone_and_becomes_right(engine: Engine, photo: Image.Image, tmp_path: Path) -> None:
    data = png(photo)
    for seed in range(4):
        output = engine.run(data, QUICK.replace(seed=100 + seed, latent_tiled_size=32))
    metrics: Any = output.metrics
    quote = engine.quote(data[:200], QUICK.replace(latent_tiled_size=32))
    assert quote.output_size == "128x96" and quote.tiles == metrics["tiles"] and quote.images > 0
    assert quote.seconds is not None and quote.seconds_at_most is not None and quote.bytes is not None
    assert 0 < quote.seconds <= quote.seconds_at_most and quote.price is None
    assert metrics["quote"]["seconds"] > 0 and metrics["actual"]["bytes"] == len(output.data)
    assert metrics["actual"]["seconds"] == pytest.approx(sum(metrics["seconds"].values()), rel=0.2, abs=0.05)
    assert quote.peak_memory_mb["host"] >= metrics["actual"]["peak_memory_mb"]
    (tmp_path / "photo.png").write_bytes(data)
    for source in (photo, np.asarray(photo), ImageData(np.asarray(photo)), tmp_path / "photo.png"):
        assert engine.quote(source, QUICK).output_size == "128x96"
    larger = engine.quote(data, QUICK.replace(scale_factor=8))
    assert larger.tiles > quote.tiles and larger.seconds > quote.seconds and larger.bytes > quote.bytes  # type: ignore[operator]


def test_a_quote_refuses_what_a_run_refuses(engine: Engine) -> None:
    with pytest.raises(ValueError, match="the largest scale for this image is"):
        engine.quote(np.zeros((3000, 4000, 3), np.uint8), Settings(scale_factor=8))
    with pytest.raises(ValueError, match="not an image"):
        engine.quote(b"not an image at all", QUICK)


def test_quotes_have_a_price_and_rates_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photo: Image.Image
) -> None:
    monkeypatch.setenv("SEESR_PRICE_PER_HOUR", "36")
    engine = Engine.load(weights.POCKET, "cpu", tmp_path)
    first = engine.quote(photo, QUICK)
    assert first.images == 0 and first.seconds and first.price == pytest.approx(first.seconds / 100, abs=1e-5)
    engine.run(photo, QUICK)
    engine.run(photo, QUICK)  # whose stages are cached: it says nothing of a whole image
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["images"] == 1
    assert Engine.load(weights.POCKET, "cpu", tmp_path).quote(photo, QUICK).images == 1


def test_a_deadline_counts_from_the_call(engine: Engine, photo: Image.Image) -> None:
    taken = threading.Event()

    def hold() -> None:
        with engine.turn:
            taken.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    assert taken.wait(5)
    with pytest.raises(DeadlineExceeded, match=r"the deadline of 0\.2 s has passed \(read, 0 of 1\)"):
        engine.run(png(photo), QUICK, deadline=0.2)
    other.join()
    with pytest.raises(DeadlineExceeded, match=r"the deadline of 100 s has passed"):
        engine.run(png(photo), QUICK, deadline=Deadline(100, passed=100.5))
    assert engine.run(png(photo), QUICK, deadline=Deadline(100, passed=10)).data


def loaded_torch(arguments: list[str]) -> str:
    """Whether a command in a process of its own loads torch."""
    script = f"import sys; from seesr.cli import main; main({arguments!r}); print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    return done.stdout.splitlines()[-1]


def test_a_dry_run_quotes_what_this_machine_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photo: Image.Image
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photo.save("a.png")
    command = ["a.png", "--bundle", str(weights.POCKET), "--device", "cpu", "--scale-factor", "2", "--dry-run"]
    assert cli.main(command) == 0
    assert "rough: no image was measured" in capsys.readouterr().out
    engine = Engine.load(weights.POCKET, "cpu")
    engine.run(photo, QUICK)
    assert cli.main([*command, "--device", "cuda"]) == 0
    assert "rough: no image was measured" in capsys.readouterr().out
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert loaded_torch(command) == "False"
    assert " tiles, " in output and "MB of memory" in output and "MB file" in output
    assert cli.main([*command, "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["quote"]["output_size"] == "128x96" and row["quote"]["images"] == 1
    assert row["estimated_seconds"] == round(row["quote"]["seconds"], 1)


def test_a_quote_leaves_out_what_an_earlier_run_computed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, photo: Image.Image
) -> None:
    """Of the same file and owner; the time is that of the stages that remain."""
    engine = Engine.load(weights.POCKET, "cpu", tmp_path)
    data, settings = png(photo), QUICK.replace(latent_tiled_size=32)
    before = engine.quote(data, settings)
    first = engine.run(data, settings)
    for changes in ({"fidelity": 0.4}, {"output_format": "webp"}, {"region": "0,0,32,32"}):
        other = engine.quote(data, settings.replace(**changes))
        assert other.tiles == 0 < before.tiles and other.seconds is not None and before.seconds is not None
        assert other.seconds < before.seconds / 2
        assert engine.run(data, settings.replace(**changes)).metrics["reused"].endswith("denoise, decode")
    warm = engine.run(data, settings.replace(fidelity=0.7))
    assert warm.metrics["quote"]["seconds"] < first.metrics["quote"]["seconds"] / 2  # type: ignore[typeddict-item]
    seed = engine.quote(data, settings.replace(seed=2))
    assert seed.tiles == before.tiles and seed.seconds is not None
    (tmp_path / "photo.png").write_bytes(data)
    assert engine.quote(tmp_path / "photo.png", settings).tiles == 0
    for elsewhere in (settings.replace(seed=None), settings.replace(scale_factor=3)):
        assert engine.quote(data, elsewhere).tiles > 0
    with image_of("another"):
        assert engine.quote(data, settings).tiles == before.tiles
    monkeypatch.setattr(engine.upscaler, "cache", StageCache(0))
    assert engine.quote(data, settings).tiles == before.tiles
