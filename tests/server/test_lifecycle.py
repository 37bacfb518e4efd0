"""The life cycle of Cog's server: cancellation at every stage, termination in flight, damaged weights."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from cog_client import ask_in_background, data_uri, image_of, png, predict, wait_for
from PIL import Image

from scripts.cog_server import ROOT, CogServer

POCKET = ROOT / "weights/pocket"


@pytest.mark.long
def test_cancelling_takes_effect_at_once_in_every_long_stage(server: CogServer, photo: Image.Image) -> None:
    numbers = itertools.count()

    def values() -> dict[str, Any]:
        """Of another image each time, since a stage that an earlier run has computed is not computed again."""
        more = next(numbers)
        image = photo.resize((160, 120)).point(lambda level: min(255, level + more))
        return {"image": data_uri(png(image)), "scale_factor": 8, "num_inference_steps": 1, "seed": 1}

    seconds = predict(server, **values())["metrics"]["seconds"]
    stages = ("tags", "text", "enlarge", "encode", "denoise", "decode")
    assert sum(seconds[stage] for stage in stages) > 2
    canceled = []
    for number, stage in enumerate(stages):
        if seconds[stage] <= 0.5:
            continue
        for _ in range(5):  # a run may be quicker than the one before, and end before it is cancelled
            wait_for(server, "READY")
            asking, answers = ask_in_background(server, **values())
            wait_for(server, "BUSY")
            time.sleep(sum(seconds[name] for name in stages[:number]) + seconds[stage] / 2)
            started = time.monotonic()
            cancelled = requests.post(f"{server.url}/predictions/long/cancel", timeout=10)
            asking.join(60)
            if answers[0]["status"] != "succeeded":
                break
            seconds = answers[0]["metrics"]["seconds"]
        assert cancelled.status_code == 200 and answers[0]["status"] == "canceled", (stage, seconds, answers)
        assert time.monotonic() - started < 0.5, stage
        canceled.append(stage)
    assert "denoise" in canceled, "tests/pipeline/test_engine.py ends the others"
    good = predict(server, image=data_uri(png(photo)), num_inference_steps=1, seed=1)
    assert image_of(good).size == (256, 192)


def test_requests_that_run_at_sigterm_are_answered_and_leave_no_files(photo: Image.Image, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with CogServer(tmp_path / "log", SEESR_WEIGHTS=str(POCKET), TMPDIR=str(temporary)) as server:
        server.wait_until_ready()
        assert list(temporary.glob("seesr-outputs-*"))
        asking, answers = ask_in_background(server, image=data_uri(png(photo)), seed=1)
        wait_for(server, "BUSY")
        server.process.terminate()
        asking.join(60)
        assert image_of(answers[0]).size == (256, 192)
        assert server.process.wait(20) == 0
    assert not list(temporary.glob("seesr-outputs-*"))


def test_outputs_of_a_killed_worker_are_removed_at_the_next_start(tmp_path: Path) -> None:
    stale = Path(tempfile.gettempdir()) / "seesr-outputs-999999999"
    stale.mkdir(exist_ok=True)
    (stale / "old.png").write_bytes(b"old")
    with CogServer(tmp_path / "log", SEESR_WEIGHTS=str(POCKET)) as server:
        server.wait_until_ready()
        assert not stale.exists()


def test_damaged_weights_fail_setup_by_name(tmp_path: Path) -> None:
    bundle = tmp_path / "pocket"
    shutil.copytree(POCKET, bundle)
    file = bundle / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1000] ^= 1
    file.write_bytes(data)
    with (
        CogServer(tmp_path / "log", SEESR_WEIGHTS=str(bundle)) as broken,
        pytest.raises(RuntimeError, match="unet/diffusion_pytorch_model.safetensors"),
    ):
        broken.wait_until_ready()
