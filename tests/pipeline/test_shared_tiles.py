"""One image whose tiles are computed by several processes, or by threads that stand for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray

from seesr import Output, Progress, Settings, Upscaler
from seesr.networks.attention import Tokens
from seesr.pipeline.denoiser import Denoiser
from seesr.pipeline.tile_helper import TileHelper
from seesr.runtime import shared_tiles
from seesr.runtime.shared_tiles import SharedTiles
from seesr.runtime.tile_batches import TileBatches

QUICK = Settings(num_inference_steps=2, seed=1, latent_tiled_size=16, latent_tiled_overlap=0)


class Threads:
    """A pool of one thread that computes with the networks of this process.

    Args:
        fate: takes the number of a batch before it is computed; "lost": the thread ends with it; "given back": the
            thread gives it back and ends.
    """

    def __init__(self, upscaler: Upscaler, fate: Callable[[int], Any] = lambda number: None) -> None:
        self.helper, self.fate = TileHelper(upscaler.networks), fate
        self.threads: list[threading.Thread] = []

    def begin(self, batches: TileBatches) -> None:
        """Returns when the helper has taken its first batch."""
        taken = threading.Event()
        self.threads.append(threading.Thread(target=self.work, args=(batches, taken)))
        self.threads[-1].start()
        assert taken.wait(10)

    def work(self, batches: TileBatches, taken: threading.Event) -> None:
        if not self.helper.knows(batches.image):
            self.helper.learn(batches.image, batches.context)
        while (number := batches.take_or_wait()) is not None:
            taken.set()
            fate = self.fate(number)
            if fate == "given back":
                batches.give_back(number)
            if fate is not None:
                return
            batches.put(number, self.helper(batches.image, batches.task(number)), from_helper=True)


def photo(deep: bool = False) -> NDArray[Any]:
    pixels = skimage.data.chelsea()[60:140, 100:196]
    return pixels.astype(np.uint16) * 257 if deep else pixels


def run(upscaler: Upscaler, pool: Any, settings: Settings = QUICK, source: Any = None) -> Output:
    shared = Upscaler(upscaler.networks)
    shared.pools = [] if pool is None else [pool]
    return shared(photo() if source is None else source, settings)


@pytest.mark.parametrize(
    ("changes", "deep"),
    [
        ({}, False),
        ({}, True),
        ({"cfg_scale": 1.5}, False),
        ({"use_kds": True, "num_particles": 2}, False),
        ({"latent_tiled_size": 24, "latent_tiled_overlap": 6}, False),
        ({"region": "0,0,40,40"}, False),
    ],
    ids=["plain", "16-bits", "guidance", "particles", "overlap", "region"],
)
def test_the_bytes_are_those_of_one_process(tiny_upscaler: Upscaler, changes: dict[str, Any], deep: bool) -> None:
    settings, pool = QUICK.replace(**changes), Threads(tiny_upscaler)
    alone, shared = (run(tiny_upscaler, p, settings, photo(deep)) for p in (None, pool))
    assert shared.data == alone.data
    assert alone.metrics["tiles_shared"] == 0 < shared.metrics["tiles_shared"]
    for thread in pool.threads:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.long
def test_the_tiles_of_a_local_autoencoder_are_shared(pocket: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    source, settings = skimage.data.chelsea()[60:100, 100:392], QUICK.replace(num_inference_steps=1)  # 2 tiles of 256
    shared: list[str] = []
    parts = SharedTiles.parts
    monkeypatch.setattr(SharedTiles, "parts", lambda *args: shared.append(args[1]) or parts(*args))
    pool = Threads(pocket)
    output = run(pocket, pool, settings, source)
    assert shared == ["encode", "decode"] and len(pool.threads) == 3
    assert output.data == run(pocket, None, settings, source).data


@pytest.mark.parametrize("fate", ["lost", "given back"])
def test_a_batch_of_a_lost_helper_is_computed_again(tiny_upscaler: Upscaler, fate: str) -> None:
    pool = Threads(tiny_upscaler, lambda number: fate if number > 2 else None)
    shared = run(tiny_upscaler, pool)
    assert shared.data == run(tiny_upscaler, None).data


def test_a_helper_that_hangs_is_not_waited_for(tiny_upscaler: Upscaler) -> None:
    released = threading.Event()
    pool = Threads(tiny_upscaler, lambda number: released.wait(30))
    try:
        started = time.monotonic()
        shared = run(tiny_upscaler, pool)
        assert time.monotonic() - started < 15 and shared.metrics["tiles_shared"] == 0
    finally:
        released.set()
    assert shared.data == run(tiny_upscaler, None).data


def test_watchers_are_called_while_a_helper_is_waited_for(
    tiny_upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deadline or a cancellation then ends the image, and the helper takes nothing more."""
    monkeypatch.setattr(shared_tiles, "OVERDUE", 1e9)
    monkeypatch.setattr(shared_tiles, "POLL", 0.01)
    released, taken = threading.Event(), []

    def hang(number: int) -> None:
        taken.append(number)
        released.wait(30)

    calls = 0

    def watch(position: Any) -> None:
        nonlocal calls
        calls = calls + 1 if taken and position.stage == "denoise" else 0
        if calls > 50:
            raise TimeoutError

    pool = Threads(tiny_upscaler, hang)
    shared = Upscaler(tiny_upscaler.networks)
    shared.pools = [pool]
    try:
        with pytest.raises(TimeoutError):
            shared(photo(), QUICK, Progress(watch))
    finally:
        released.set()
    pool.threads[0].join(5)
    assert not pool.threads[0].is_alive() and len(set(taken)) == 1


def test_networks_that_were_cast_to_float32_are_not_shared(tiny_upscaler: Upscaler) -> None:
    def share(*args: Any) -> Any:
        raise AssertionError("shared")

    half, networks = Tokens(torch.zeros(1, 5, 8, dtype=torch.float16)), tiny_upscaler.networks
    denoiser = Denoiser(
        unet=networks.unet, controlnet=networks.controlnet, text=half, image=half,
        conditioning=lambda tile: torch.empty(0), tiles=[], weight=torch.empty(0), share=share,  # type: ignore[arg-type]
    )  # fmt: skip
    assert list(denoiser.execute(torch.zeros(1), 999, 0, lambda group: torch.ones(1), [[], []])) == [1, 1]
