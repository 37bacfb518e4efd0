"""The stages of one image: what they are given, what is measured, and what is cached for whom."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch

from seesr import Progress, Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.pipeline import prompt, sampling, tagging
from seesr.pipeline.denoiser import Denoiser
from seesr.pipeline.pipeline import UpscaleRun
from seesr.runtime.memory import Budget
from seesr.runtime.progress import Position

QUICK = Settings(num_inference_steps=1, seed=1, latent_tiled_size=16, scale_factor=2)
RGB = skimage.data.chelsea()[60:76, 100:260]  # whose result takes several tiles
LEFT = np.zeros((16, 160), np.uint8)
LEFT[:, :8] = 255


def run_of(upscaler: Upscaler, settings: Settings = QUICK, **more: Any) -> UpscaleRun:
    return UpscaleRun(upscaler.networks, settings, ImageData(RGB), Progress(), **more)


def test_what_was_computed_of_some_tiles_is_not_taken_for_the_whole(pocket: Upscaler) -> None:
    cached = Upscaler(pocket.networks, cache=10**8)
    for mask in (LEFT, LEFT[:, ::-1].copy(), None, LEFT):
        result = cached(ImageData(RGB), QUICK, mask=mask)
        np.testing.assert_array_equal(result.image_data.rgb, pocket(ImageData(RGB), QUICK, mask=mask).image_data.rgb)
        if mask is not None and result.metrics["reused"].count("denoise") == 0:
            assert 0 < result.metrics["tiles_skipped"] < result.metrics["tiles"]
    assert result.metrics["reused"] == "tags, text, encode, denoise, decode"


def test_metrics_of_an_undisturbed_run(pocket: Upscaler) -> None:
    metrics: Any = pocket(ImageData(RGB, warnings=("one", "two")), QUICK).metrics
    expected = {
        "seed": 1, "prompt_cut": "", "input_size": "160x16", "output_size": "320x32",
        "warnings": "one; two", "steps": 1, "tile_size": 16, "tiles_skipped": 0, "region": "", "tile_batch": 1,
        "reused": "", "tiles_reused": 0, "tiles_shared": 0, "out_of_memory_retries": 0, "float32_retries": 0,
        "device": "cpu", "graphs": "off (not enabled, or no GPU)", "bundle": "pocket",
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == expected and metrics["tiles"] > 1
    assert all(0 <= value == round(value, 3) < 60 for value in metrics["seconds"].values())
    assert max(metrics["seconds"].values()) > 0 and metrics["peak_memory_mb"]["host"] > 100


def test_a_gpu_s_own_events_measure_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.calls: list[str] = []

        def record(self) -> None:
            self.calls.append("record")

        def synchronize(self) -> None:
            self.calls.append("synchronize")

        def elapsed_time(self, last: Event) -> float:
            assert self.calls == ["record"] and last.calls == ["record", "synchronize"]
            return 1234.5678  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    run = object.__new__(UpscaleRun)
    run.networks, run.progress = SimpleNamespace(device=torch.device("cuda")), Progress()  # type: ignore[assignment]
    run.seconds, run.events = {}, {}
    with run.timed("encode"):
        assert run.progress.position == Position("encode", 0, 1)
    assert run.progress.position == Position("encode", 1, 1)
    assert run.finished_seconds() == {"encode": 1.235}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"num_inference_steps": 2}, 2),
        ({"use_kds": True, "num_particles": 2}, 2),
        ({"num_inference_steps": 2, "use_kds": True, "num_particles": 2}, 4),
    ],
    ids=str,
)
def test_progress_counts_tiles_of_all_steps_and_particles(
    pocket: Upscaler, changes: dict[str, Any], passes: int
) -> None:
    seen: list[Position] = []
    output = pocket(ImageData(RGB[:, :32]), QUICK.replace(**changes), Progress(seen.append))
    positions = [(position.done, position.total) for position in seen if position.stage == "denoise"]
    total = passes * output.metrics["tiles"]
    assert positions[-1] == (total, total) and [done for done, whole in positions if whole == total] == [
        *range(total + 1)
    ]


def test_a_stage_without_tiles_counts_as_one(pocket: Upscaler) -> None:
    seen: list[Position] = []
    output = pocket(ImageData(RGB), QUICK.replace(fidelity=1.0), Progress(seen.append))
    assert {position.total for position in seen if position.stage == "denoise"} == {1}
    assert output.metrics["tiles_skipped"] == output.metrics["tiles"]


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_guidance_needs_the_negative_prompt_first(
    pocket: Upscaler, cfg_scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def encode(encoder: Any, tokenizer: Any, prompts: list[str], budget: Budget) -> torch.Tensor:
        seen.append(list(prompts))
        return torch.zeros(len(prompts), 77, 8)

    monkeypatch.setattr(prompt, "encode", encode)
    settings = QUICK.replace(cfg_scale=cfg_scale, negative_prompt="grain", user_prompt="a lake", positive_prompt="8k")
    fitted, tokens = run_of(pocket, settings).encode_text(["sky"])
    assert seen == [["sky, a lake,8k"] if cfg_scale == 1 else ["grain", "sky, a lake,8k"]]
    assert len(tokens) == len(seen[0]) and fitted.tags == ["sky"]


def test_passes_of_every_batch_that_fits_are_recorded(pocket: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[tuple[int, ...], list[int], int]] = []
    monkeypatch.setattr(
        Denoiser, "predict", lambda self, z, t, features: seen.append((tuple(z.shape), t.tolist(), len(features)))
    )
    run = run_of(pocket)
    run.budget.batch.amount = 5
    run.record()
    channels = pocket.networks.unet.config["in_channels"]
    assert seen == [((count, channels, 16, 16), [sampling.START] * count, count) for count in (1, 4, 5)]


@pytest.mark.parametrize(("limit", "moved"), [(32, True), (31, False)])
def test_a_large_image_is_shrunk_before_it_is_tagged(limit: int, moved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tagging, "LARGE", limit)
    rgb, seen = np.arange(96, dtype=np.uint8).reshape(4, 8, 3), []

    class Stub:
        image_proj = SimpleNamespace(weight=torch.zeros(1))
        image_size = 6

        def __call__(self, pixels: torch.Tensor) -> tuple[list[str], torch.Tensor]:
            seen.append(pixels)
            return ["cat"], torch.zeros(1, 3, 4)

    stub: Any = Stub()
    tags, tokens = tagging.tag(stub, rgb, Budget())
    assert tags == ["cat"] and tokens.shape == (1, 3, 4)
    expected = tagging.to_floats(torch.tensor(rgb)) if moved else tagging.shrunk(rgb, 6)
    assert torch.equal(seen[0], expected) and seen[0].max() <= 1


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(4, 7), (40, 90), (6, 6), (1, 1)])
def test_the_shrunk_image_is_that_of_a_bilinear_filter(
    depth: type, size: tuple[int, int], rng: np.random.Generator
) -> None:
    rgb = rng.integers(0, np.iinfo(depth).max, (*size, 3), endpoint=True).astype(depth)
    whole = tagging.to_floats(torch.tensor(rgb))
    expected = torch.nn.functional.interpolate(whole, (16, 16), mode="bilinear", align_corners=False)
    torch.testing.assert_close(tagging.shrunk(rgb, 16), expected, rtol=0, atol=1e-5)
    assert whole.max().item() == pytest.approx(rgb.max() / np.iinfo(depth).max)
