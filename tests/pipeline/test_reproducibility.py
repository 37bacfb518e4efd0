"""Reproducibility: the same seed, the tagger's input, wide color profiles, alpha, and no network access."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr import Settings, Upscaler
from seesr.images.image_data import ImageData, resize
from seesr.networks.tagger import preprocess
from seesr.pipeline import tagging
from seesr.runtime.memory import Budget

QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=16)


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_the_tagger_input_does_not_depend_on_the_image_size(depth: type) -> None:
    rgb = np.random.default_rng(0).integers(0, np.iinfo(depth).max, (531, 777, 3), depth, endpoint=True)
    whole = preprocess(tagging.to_floats(torch.tensor(rgb)), 96)
    torch.testing.assert_close(preprocess(tagging.shrunk(rgb, 96), 96), whole, rtol=0, atol=2e-5)
    small = np.random.default_rng(0).integers(0, 255, (31, 20, 3), np.uint8)
    whole = preprocess(tagging.to_floats(torch.tensor(small)), 96)
    torch.testing.assert_close(preprocess(tagging.shrunk(small, 96), 96), whole, rtol=0, atol=2e-5)


def test_the_pipeline_uses_the_plan(pocket: Upscaler, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "for_device", classmethod(lambda cls, *_: cls(2, 0)))  # pyright: ignore[reportCallIssue]
    assert pocket(photo, QUICK).metrics["tile_batch"] == 2


@pytest.mark.parametrize("steps", [4, 8])
def test_the_same_seed_is_the_same_file_at_many_steps(pocket: Upscaler, photo: Image.Image, steps: int) -> None:
    settings = dataclasses.replace(QUICK, num_inference_steps=steps, latent_tiled_size=32)
    first, second = (pocket(photo, settings).data for _ in range(2))
    assert first == second != pocket(photo, dataclasses.replace(settings, seed=2)).data


def test_saturated_colours_of_a_wide_profile_come_back(pocket: Upscaler) -> None:
    """The networks take the values as they are, the colours come from the input, and its profile goes with them."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 240, 10), (10, 220, 230), (230, 20, 200), (128, 128, 128)]
    rgb = np.repeat(np.repeat(np.array(colours, np.uint8)[None], 24, axis=0), 24, axis=1)
    result = pocket(ImageData(rgb, icc=b"wide"), Settings(num_inference_steps=2, seed=1))
    assert result.image_data.icc == b"wide"
    for number, colour in enumerate(colours):
        patch = result.image_data.rgb[24:-24, 96 * number + 32 : 96 * number + 64]
        assert np.abs(patch.mean((0, 1)) - colour).max() <= 1, (colour, patch.mean((0, 1)))


def test_alpha_is_upscaled_by_lanczos(pocket: Upscaler) -> None:
    rng = np.random.default_rng(5)
    source = ImageData(rng.integers(0, 256, (20, 24, 3), np.uint8), alpha=rng.integers(0, 256, (20, 24), np.uint8))
    result = pocket(source, QUICK).image_data.alpha
    assert source.alpha is not None and result is not None
    np.testing.assert_array_equal(result, resize(source.alpha, (48, 40), Image.Resampling.LANCZOS))
    assert (result != resize(source.alpha, (48, 40))).any()


def test_nothing_uses_the_network(tmp_path: Path) -> None:
    """Loading and an image with every connection and every name refused."""
    Image.new("RGB", (24, 18), (90, 120, 60)).save(tmp_path / "small.png")
    script = f"""
import socket
def refuse(*args):
    raise SystemExit(f"the network was asked: {{given}}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from pathlib import Path
from seesr import Engine, Settings
engine = Engine.load("weights/pocket", "cpu")
print(len(engine.run(Path({str(tmp_path / "small.png")!r}), Settings(num_inference_steps=1, seed=1)).data))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 1000, done.stderr[-500:]
