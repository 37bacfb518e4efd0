"""The stage cache: recomputed stages, the same bytes as without it, bounded memory."""

from __future__ import annotations

import collections
import dataclasses
import gc
import io
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from seesr import Engine, Output, Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.pipeline import stages
from seesr.pipeline.stages import NOT_CACHED, READS, StageCache
from seesr.runtime.memory import Budget
from seesr.runtime.owner import image_of

BASE = Settings(num_inference_steps=1, seed=1, latent_tiled_size=16, scale_factor=2)
RGB = skimage.data.chelsea()[60:90, 100:140]
HALF = np.zeros((30, 40), np.uint8)
HALF[:, :23] = 255
LARGE = 10**8
CHANGES: dict[str, dict[str, Any]] = {  # each setting with the networks that then run again
    "scale_factor": {"scale_factor": 2.5, "runs": {"vae", "unet", "controlnet"}},
    "target_side": {"target_side": 96, "runs": {"vae", "unet", "controlnet"}},
    "target_megapixels": {"target_megapixels": 0.006, "runs": {"vae", "unet", "controlnet"}},
    "fidelity": {"fidelity": 0.4},
    "user_prompt": {"user_prompt": "a cat", "runs": {"text_encoder", "unet", "controlnet", "vae"}},
    "positive_prompt": {"positive_prompt": "sharp", "runs": {"text_encoder", "unet", "controlnet", "vae"}},
    "negative_prompt": {"negative_prompt": "grain"},
    "num_inference_steps": {"num_inference_steps": 2, "runs": {"unet", "controlnet", "vae"}},
    "cfg_scale": {"cfg_scale": 1.5, "runs": {"text_encoder", "unet", "controlnet", "vae"}},
    "latent_tiled_size": {"latent_tiled_size": 24, "runs": {"unet", "controlnet", "vae"}},
    "latent_tiled_overlap": {"latent_tiled_overlap": 2, "runs": {"unet", "controlnet", "vae"}},
    "use_kds": {"use_kds": True, "num_particles": 2, "runs": {"unet", "controlnet", "vae"}},
    "num_particles": {"num_particles": 3},
    "bandwidth": {"bandwidth": 0.5},
    "color_fix": {"color_fix": "adain"},
    "output_view": {"output_view": "comparison"},
    "region": {"region": "10,5,40,30"},
    "output_format": {"output_format": "webp"},
    "output_quality": {"output_quality": 50, "output_format": "jpg"},
    "keep_exif": {"keep_exif": False},
    "dpi": {"dpi": 300},
    "seed": {"seed": 2, "runs": {"unet", "controlnet", "vae"}},
}


class Launches(collections.Counter[str]):
    """Calls of the modules of each network."""

    def __init__(self, upscaler: Upscaler) -> None:
        super().__init__()
        names = ("tagger", "text_encoder", "vae", "unet", "controlnet")
        self.owners = {module: name for name in names for module in getattr(upscaler.networks, name).modules()}

    def __call__(self, module: torch.nn.Module, inputs: Any) -> None:
        if module in self.owners:
            self[self.owners[module]] += 1


@pytest.fixture
def cached(pocket: Upscaler) -> Upscaler:
    """The pocket networks with an empty cache."""
    return Upscaler(pocket.networks, cache=LARGE)


@pytest.fixture
def launches(cached: Upscaler) -> Iterator[Launches]:
    counter = Launches(cached)
    handle = register_module_forward_pre_hook(counter)
    yield counter
    handle.remove()


def photo() -> ImageData:
    return ImageData(RGB, exif=Image.Exif().tobytes())


def data_of(output: Output) -> tuple[bytes, Any]:
    """The file, and what the metrics say of the image."""
    metrics: dict[str, Any] = dict(output.metrics)
    return output.data, {name: metrics[name] for name in ("tags", "tiles", "tiles_skipped", "steps", "output_size")}


def test_every_setting_belongs_to_a_stage_or_to_none() -> None:
    fields = [field.name for field in dataclasses.fields(Settings)]
    classified = [*NOT_CACHED, *(name for names in READS.values() for name in names)]
    assert sorted(classified) == sorted(fields) == sorted(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_repeats_only_what_depends_on_it(
    cached: Upscaler, pocket: Upscaler, launches: Launches, name: str
) -> None:
    changes = dict(CHANGES[name])
    expected = changes.pop("runs", set())
    settings = BASE.replace(**changes)
    cold = data_of(pocket(photo(), settings))
    cached(photo(), BASE)
    launches.clear()
    warm = cached(photo(), settings)
    assert set(launches) == expected
    assert data_of(warm) == cold
    reused = set(warm.metrics["reused"].split(", "))
    assert reused >= ({"tags", "text", "encode", "denoise", "decode"} if not expected else {"tags"})


def test_a_change_of_seed_repeats_no_tagging_text_or_encoding(
    cached: Upscaler, pocket: Upscaler, launches: Launches
) -> None:
    cached(photo(), BASE)
    encoder = []
    handle = cached.networks.vae.encoder.register_forward_pre_hook(lambda *_: encoder.append(1))
    warm = cached(photo(), BASE.replace(seed=3))
    handle.remove()
    assert not encoder and warm.metrics["reused"] == "tags, text, encode"
    assert data_of(warm) == data_of(pocket(photo(), BASE.replace(seed=3)))


def test_a_mask_after_the_whole_image_runs_no_network(cached: Upscaler, pocket: Upscaler, launches: Launches) -> None:
    cached(photo(), BASE)
    launches.clear()
    for mask in (HALF, 255 - HALF, np.zeros_like(HALF)):
        warm = cached(photo(), BASE, mask=mask)
        assert not launches
        assert data_of(warm) == data_of(pocket(photo(), BASE, mask=mask))
        launches.clear()  # of the run without a cache


@pytest.mark.parametrize("steps", [1, 2])
def test_the_whole_image_reuses_the_tiles_of_a_region(cached: Upscaler, pocket: Upscaler, steps: int) -> None:
    wide = ImageData(np.concatenate([RGB, RGB[:, ::-1], RGB, RGB], axis=1))
    settings = BASE.replace(num_inference_steps=steps)
    part = cached(wide, settings.replace(region="0,0,16,16"))
    result = part.metrics["tiles"] - part.metrics["tiles_skipped"]
    whole = cached(wide, settings)
    assert data_of(whole) == data_of(pocket(wide, settings))
    assert 0 < result < part.metrics["tiles"] and whole.metrics["tiles_reused"] >= result
    other = settings.replace(region="200,20,30,30")
    assert data_of(cached(wide, other)) == data_of(pocket(wide, other))


def test_other_pixels_and_owners_share_nothing(cached: Upscaler, pocket: Upscaler) -> None:
    cached(photo(), BASE)
    assert cached(dataclasses.replace(photo(), exif=None), BASE).metrics["reused"].endswith("decode")
    other = ImageData(np.ascontiguousarray(RGB[::-1]))
    for image in (other, ImageData(RGB.astype(np.uint16)), ImageData(RGB.reshape(40, 30, 3))):
        result = cached(image, BASE)
        assert result.metrics["reused"] == "" and result.metrics["tiles_reused"] == 0
        without_cache = pocket(image, BASE)
        assert data_of(result) == data_of(without_cache) and without_cache.metrics["tiles_reused"] == 0
    with image_of("somebody else"):
        assert cached(photo(), BASE).metrics["reused"] == ""
    assert cached(photo(), BASE).metrics["reused"].endswith("decode")


def test_without_memory_nothing_is_cached(pocket: Upscaler) -> None:
    for _ in range(2):
        assert pocket(photo(), BASE).metrics["reused"] == ""
    assert not pocket.cache.entries


def test_a_run_that_went_on_in_float32_is_not_cached(cached: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget.for_device(cached.networks.device, 256)
    budget.redone = 1
    with monkeypatch.context() as patch:
        patch.setattr(Budget, "for_device", lambda *_, **__: budget)
        cached(photo(), BASE)
    assert cached(photo(), BASE).metrics["reused"] == ""


def test_cached_results_are_not_changed(cached: Upscaler) -> None:
    cached(photo(), BASE)
    before = {key: repr(stages.moved(result, stages.CPU)) for key, (result, _) in cached.cache.entries.items()}
    for changes in ({"fidelity": 0.5}, {"color_fix": "none"}, {"color_fix": "adain"}, {"output_view": "all"}):
        cached(photo(), BASE.replace(**changes))
    for key, text in before.items():
        assert repr(cached.cache.entries[key][0]) == text


def test_memory_is_bounded_and_the_least_recently_used_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = StageCache(5000)
    for number in range(10):
        cache.put(number, torch.zeros(100))
        assert cache.get(0) is not None
    assert cache.held <= 5000 and sorted(cache.entries) == [0, 8, 9]
    cache.put("too large", torch.zeros(2000))
    assert cache.get("too large") is None and sorted(cache.entries) == [0, 8, 9]
    cache.put(0, torch.ones(100))
    assert cache.get(0).sum() == 100 and cache.held == 3 * 1400
    monkeypatch.setattr(stages, "free", lambda device: 1000)
    cache.put(11, torch.zeros(100))  # (1000 + 4 * 1400) / 4 = 1650 bytes
    assert list(cache.entries) == [11]


def test_the_pixels_of_some_files_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "FILES", 3)
    cache = StageCache(10)
    for number in range(5):
        cache.add_file(f"file {number}", f"pixels {number}")
    assert list(cache.files.values()) == ["pixels 2", "pixels 3", "pixels 4"]
    assert cache.reusable(BASE, "file 4") == cache.reusable(BASE, "file 0") == cache.reusable(BASE, None) == set()
    cache.entries["decode", stages.keys(BASE, "pixels 4")["decode"], None] = (None, 0)
    assert cache.reusable(BASE, "file 4") == {"decode"} and cache.reusable(BASE.replace(seed=9), "file 4") == set()


def test_many_threads_use_one_cache() -> None:
    cache, errors = StageCache(50_000), []

    def use(start: int) -> None:
        for i in range(300):
            number = (start + i) % 40
            cache.put(number, torch.full((100,), float(number)))
            result = cache.get((number + 7) % 40)
            if result is not None and not (result == (number + 7) % 40).all():
                errors.append(number)

    threads = [threading.Thread(target=use, args=(5 * i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and cache.held == sum(size for _, size in cache.entries.values()) <= 50_000


def test_the_engine_uses_and_clears_the_stage_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "PNG")
    engine = Engine.load(weights.POCKET, "cpu")
    assert engine.upscaler is not None and not engine.upscaler.cache.entries  # of the warm-up
    first = engine.run(buffer.getvalue(), BASE)
    second = engine.run(buffer.getvalue(), BASE)
    assert second.data == first.data and second.metrics["reused"] == "tags, text, encode, denoise, decode"
    gone = weakref.ref(engine.upscaler.cache)
    engine.unload()
    gc.collect()
    assert gone() is None
    monkeypatch.setenv("SEESR_CACHE_MB", "0")
    engine = Engine.load(weights.POCKET, "cpu")
    for _ in range(2):
        assert engine.run(buffer.getvalue(), BASE).metrics["reused"] == ""
