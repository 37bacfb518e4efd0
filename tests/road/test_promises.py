"""Promises that no other test would see broken: planning from free memory, same bytes, alpha, no network."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seesr import Settings, Upscaler, budget, tagging
from seesr.budget import HALF_CELL, HOST_HOLD, LARGEST_BATCH, WHOLE_SHARE, Budget
from seesr.images.picture import Picture, enlarge
from seesr.networks.tagger import preprocess

CELLS = 64 * 64
QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2)


@pytest.mark.parametrize(("share", "batch"), [(100, 8), (1.0, 8), (0.99, 4), (0.5, 4), (0.49, 2), (0.2, 1), (0.0, 1)])
def test_a_gpu_is_planned_from_what_is_free(monkeypatch: pytest.MonkeyPatch, share: float, batch: int) -> None:
    """Half of it for batches, half for what waits, more for a pass over the whole."""
    free = 2 * int(share * LARGEST_BATCH * CELLS * HALF_CELL)
    monkeypatch.setattr(budget, "free", lambda device: free)
    found = Budget.for_device(torch.device("cuda"), CELLS)
    assert (found.batch.amount, found.hold.amount) == (batch, free // 2)
    assert found.whole.amount == int(WHOLE_SHARE * 2 * (free // 2))


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "CUDA error: operation failed due to a previous error during capture (cudaErrorStreamCaptureInvalidated)",
    ],
)
def test_running_out_of_memory_is_known_in_all_its_words(words: str) -> None:
    assert budget.is_out_of_memory(RuntimeError(words))
    assert not budget.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("amount", "steps"), [(2**30, [2**29, 2**28, 0]), (1, [0])])
def test_what_is_held_is_halved_until_it_is_nothing(amount: int, steps: list[int]) -> None:
    hold, seen = Budget(hold=amount).hold, []

    def fails() -> None:
        seen.append(hold.amount)
        raise MemoryError

    with pytest.raises(budget.OutOfMemory):
        hold.attempt(fails)
    assert seen == [amount, *steps]


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_large_picture_is_seen_by_the_tagger_as_any_other(depth: type) -> None:
    rgb = np.random.default_rng(0).integers(0, np.iinfo(depth).max, (531, 777, 3), depth, endpoint=True)
    whole = preprocess(tagging.to_floats(torch.tensor(rgb)), 96)
    torch.testing.assert_close(preprocess(tagging.shrunk(rgb, 96), 96), whole, rtol=0, atol=2e-5)
    small = np.random.default_rng(0).integers(0, 255, (31, 20, 3), np.uint8)
    whole = preprocess(tagging.to_floats(torch.tensor(small)), 96)
    torch.testing.assert_close(preprocess(tagging.shrunk(small, 96), 96), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("free", [10**9, 10**12])
def test_a_cpu_holds_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(budget, "free", lambda device: free)
    found = Budget.for_device(torch.device("cpu"), CELLS)
    assert (found.batch.amount, found.hold.amount) == (1, min(free // 2, HOST_HOLD))


def test_a_picture_asks_for_the_plan(pocket: Upscaler, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "for_device", classmethod(lambda cls, device, cells: cls(2, 0)))
    assert pocket(photo, QUICK).metrics["tile_batch"] == 2


@pytest.mark.parametrize("steps", [4, 8])
def test_the_same_seed_is_the_same_file_at_many_steps(pocket: Upscaler, photo: Image.Image, steps: int) -> None:
    settings = dataclasses.replace(QUICK, num_inference_steps=steps, latent_tiled_size=32)
    first, second = (pocket(photo, settings).encode() for _ in range(2))
    assert first == second != pocket(photo, dataclasses.replace(settings, seed=2)).encode()


def test_saturated_colours_of_a_wide_profile_come_back(pocket: Upscaler) -> None:
    """The networks take the values as they are, the colours come from the input, and its profile goes with them."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (250, 240, 10), (10, 220, 230), (230, 20, 200), (128, 128, 128)]
    rgb = np.repeat(np.repeat(np.array(colours, np.uint8)[None], 24, axis=0), 24, axis=1)
    result = pocket(Picture(rgb, icc=b"wide"), Settings(num_inference_steps=2, seed=1))
    assert result.picture.icc == b"wide"
    for number, colour in enumerate(colours):
        patch = result.picture.rgb[24:-24, 96 * number + 32 : 96 * number + 64]
        assert np.abs(patch.mean((0, 1)) - colour).max() <= 1, (colour, patch.mean((0, 1)))


def test_alpha_is_enlarged_by_lanczos(pocket: Upscaler) -> None:
    rng = np.random.default_rng(5)
    source = Picture(rng.integers(0, 256, (20, 24, 3), np.uint8), alpha=rng.integers(0, 256, (20, 24), np.uint8))
    found = pocket(source, QUICK).picture.alpha
    assert source.alpha is not None and found is not None
    np.testing.assert_array_equal(found, enlarge(source.alpha, (48, 40), Image.Resampling.LANCZOS))
    assert (found != enlarge(source.alpha, (48, 40))).any()


def test_nothing_asks_the_network(tmp_path: Path) -> None:
    """Loading and a picture with every connection and every name refused."""
    Image.new("RGB", (24, 18), (90, 120, 60)).save(tmp_path / "small.png")
    words = f"""
import socket
def refuse(*given):
    raise SystemExit(f"the network was asked: {{given}}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
from pathlib import Path
from seesr import Engine, Settings
engine = Engine.load("weights/pocket", "cpu")
print(len(engine.run(Path({str(tmp_path / "small.png")!r}), Settings(num_inference_steps=1, seed=1)).data))
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) > 1000, done.stderr[-500:]
