"""The whole pipeline of an image, on the pocket model and on tiny networks."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from seesr import Output, Progress, Settings, Upscaler
from seesr.images.image_data import ImageData
from seesr.images.read import from_pil
from seesr.images.write import encode
from seesr.networks import models
from seesr.networks.graphs import FREED, Graphs
from seesr.pipeline import denoiser, prompt
from seesr.pipeline.pipeline import UpscaleRun
from seesr.runtime.memory import Budget, OutOfMemory
from seesr.runtime.tiling import offsets

LARGEST_SEAM = 1.3
QUICK = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=32)


def pixels(upscaler: Upscaler, image: Image.Image, **changes: object) -> np.ndarray:
    return np.asarray(upscaler(image, dataclasses.replace(QUICK, **changes)).image)


def test_same_seed_same_bytes_other_seed_other_bytes(pocket: Upscaler, photo: Image.Image) -> None:
    first = pixels(pocket, photo)
    np.testing.assert_array_equal(first, pixels(pocket, photo))
    assert (first != pixels(pocket, photo, seed=2)).any()


def test_a_missing_seed_is_drawn_and_reported(pocket: Upscaler, photo: Image.Image) -> None:
    settings = dataclasses.replace(QUICK, seed=None)
    first, second = pocket(photo, settings), pocket(photo, settings)
    assert first.seed != second.seed
    again = pocket(photo, dataclasses.replace(settings, seed=first.seed))
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(first.image))


def seen(result: Output) -> bytes:
    """The file without its settings record, which every setting changes."""
    settings = result.settings
    shown = [dataclasses.replace(result.view(name), record=None) for name in settings.views]
    kinds = ["png" if name == "uncertainty" else settings.output_format for name in settings.views]
    return b"".join(map(encode, shown, kinds, [settings.output_quality] * len(kinds)))


CHANGES: dict[str, tuple[dict[str, object], object]] = {  # setting -> (what it needs beside it, another value)
    "scale_factor": ({}, 3.0),
    "target_side": ({}, 100),
    "target_megapixels": ({}, 0.01),
    "fidelity": ({}, 0.5),
    "user_prompt": ({}, "dark blurry noisy"),
    "positive_prompt": ({}, "blur, lowres, smooth"),
    "negative_prompt": ({"cfg_scale": 2.0}, "dark"),
    "num_inference_steps": ({}, 2),
    "cfg_scale": ({}, 2.0),
    "latent_tiled_size": ({}, 24),
    "latent_tiled_overlap": ({"latent_tiled_size": 16}, 12),
    "use_kds": ({"num_particles": 2}, True),
    "num_particles": ({"use_kds": True}, 3),
    "bandwidth": ({"use_kds": True, "num_particles": 2}, 5.0),
    "color_fix": ({}, "adain"),
    "output_view": ({}, "comparison"),
    "region": ({}, "0,0,64,64"),
    "output_format": ({}, "webp"),
    "output_quality": ({"output_format": "jpg"}, 30),
    "keep_exif": ({}, False),
    "dpi": ({}, 300),
    "seed": ({}, 2),
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Settings)])
def test_every_setting_changes_the_file(pocket: Upscaler, photo: Image.Image, field: str) -> None:
    """A new setting must be added to CHANGES."""
    needs, value = CHANGES[field]
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    source = dataclasses.replace(from_pil(photo), exif=exif.tobytes())
    base = dataclasses.replace(QUICK, **needs)
    changed = dataclasses.replace(base, **{field: value})
    assert seen(pocket(source, base)) != seen(pocket(source, changed))


@pytest.mark.parametrize("field", ["color_fix", "output_format", "output_view"])
def test_every_choice_gives_another_file(pocket: Upscaler, photo: Image.Image, field: str) -> None:
    about = {item.name: item.metadata for item in dataclasses.fields(Settings)}[field]
    base = dataclasses.replace(QUICK, use_kds=True, num_particles=2)
    choices = [choice for choice in about["choices"] if choice != "confidence"]  # see test_confidence.py
    files = [seen(pocket(photo, dataclasses.replace(base, **{field: choice}))) for choice in choices]
    assert len(set(files)) == len(files)


def test_the_negative_prompt_works_with_guidance_only(pocket: Upscaler, photo: Image.Image) -> None:
    np.testing.assert_array_equal(pixels(pocket, photo), pixels(pocket, photo, negative_prompt="dark"))
    guided = pixels(pocket, photo, cfg_scale=2.0)
    assert (guided != pixels(pocket, photo, cfg_scale=2.0, negative_prompt="dark")).any()


def test_the_overlap_changes_the_tiles_and_the_image(pocket: Upscaler, photo: Image.Image) -> None:
    few, many = (
        pocket(photo, dataclasses.replace(QUICK, latent_tiled_size=16, latent_tiled_overlap=overlap))
        for overlap in (0, 12)
    )
    assert few.metrics["tiles"] == 4 < many.metrics["tiles"]
    assert (np.asarray(few.image) != np.asarray(many.image)).any()


def test_views(pocket: Upscaler, photo: Image.Image) -> None:
    result = pocket(photo, QUICK)
    comparison = result.view("comparison")
    assert comparison.size == (256, 96)
    np.testing.assert_array_equal(comparison.rgb[:, 128:], result.image_data.rgb)
    with pytest.raises(ValueError, match="needs steering"):
        result.view("uncertainty")


def test_the_warm_up_on_a_cpu_is_a_smaller_tile(pocket: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = []
    monkeypatch.setattr(Upscaler, "run_grey", lambda self, tiles, scale=1.0, side=None: sides.append((tiles, side)))
    pocket.warm_up()
    assert sides == [(1, 48)]
    grey = pocket.grey(2, 48).rgb
    assert grey.shape == (96, 96, 3) and (grey.min(), grey.max()) == (64, 192)


def test_the_warm_up_on_a_gpu_is_one_tile_and_several(pocket: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler, calls = Upscaler(pocket.networks), []
    upscaler.networks = dataclasses.replace(pocket.networks, device=torch.device("cuda"))
    monkeypatch.setattr(Upscaler, "run_grey", lambda self, *values: calls.append(values) or len(calls))
    monkeypatch.setattr(Upscaler, "record", lambda self: calls.append("record"))
    assert upscaler.warm_up() == 2 and calls == [(1,), (2,)]
    upscaler.graphs = Graphs(lambda work: (lambda: None, work()))
    assert upscaler.warm_up() == 4 and calls[2:] == [(1,), (2,), "record"]


def test_graphs_are_recorded_at_every_side_of_a_tile(pocket: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    upscaler, calls = Upscaler(pocket.networks), []
    graphs = upscaler.graphs = Graphs(lambda work: (lambda: None, work()))
    monkeypatch.setattr(Upscaler, "run_grey", lambda self, *values: calls.append((*values, graphs.recording)))
    monkeypatch.setattr(UpscaleRun, "record", lambda run: calls.append((run.sides, run.steps, graphs.recording)))
    upscaler.record()
    assert calls == [(1, 1.0, True), (1, 1.5, True), ((64,), 1, True), ((72,), 1, True)] and not graphs.recording
    assert upscaler.graphs_state == "on" and pocket.graphs_state == "off (not enabled, or no GPU)"


def test_graphs_that_were_freed_are_recorded_again(
    pocket: Upscaler, photo: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []

    def stop(run: UpscaleRun) -> None:
        raise NotImplementedError

    upscaler = Upscaler(pocket.networks)
    graphs = upscaler.graphs = Graphs(lambda work: (lambda: None, work()))
    monkeypatch.setattr(Upscaler, "record", lambda self: recorded.append(graphs.reason))
    monkeypatch.setattr(UpscaleRun, "run", stop)
    for graphs.reason in ("", FREED, "a replayed pass differs"):
        with pytest.raises(NotImplementedError):
            upscaler(photo, QUICK)
    assert recorded == [FREED]


def test_a_device_that_has_failed_is_not_healthy(pocket: Upscaler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pocket.healthy()
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *sizes, **options: 3 * ones(*sizes, **options))
    assert not pocket.healthy(), "it computes something else"

    def fails(*sizes: int, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", fails)
    assert not pocket.healthy()


@pytest.mark.parametrize(
    ("size", "scale"),
    [((1, 1), 4), ((1, 1), 1), ((3, 2), 8), ((67, 41), 1.5), ((130, 1), 4), ((1, 90), 2.7), ((64, 64), 4)],
)
def test_the_size_is_exact(pocket: Upscaler, size: tuple[int, int], scale: float, rng: np.random.Generator) -> None:
    image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    result = pocket(image, dataclasses.replace(QUICK, scale_factor=scale))
    assert result.image.size == (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))


@pytest.mark.long
def test_steps_one_to_eight_work_and_stay_close_to_the_image(pocket: Upscaler, photo: Image.Image) -> None:
    bicubic = np.asarray(photo.resize((photo.width * 2, photo.height * 2), Image.Resampling.BICUBIC), float)
    for steps in range(1, 9):
        ours = pixels(pocket, photo, num_inference_steps=steps).astype(float)
        assert np.sqrt(((ours - bicubic) ** 2).mean()) < 20


def test_metrics_say_what_happened(pocket: Upscaler, photo: Image.Image) -> None:
    metrics = pocket(photo, QUICK).metrics
    assert metrics["seed"] == 1
    assert metrics["input_size"] == "64x48" and metrics["output_size"] == "128x96"
    assert metrics["steps"] == 1 and metrics["tiles"] == 1
    assert metrics["bundle"] == "pocket" and metrics["device"] == "cpu"
    assert set(metrics["seconds"]) == {"tags", "text", "enlarge", "encode", "denoise", "decode", "finish"}


def test_alpha_and_depth_and_metadata_survive(pocket: Upscaler, rng: np.random.Generator) -> None:
    alpha = np.zeros((24, 30), np.uint16)
    alpha[:, 10:] = 65535
    source = ImageData(rng.integers(0, 65536, (24, 30, 3), dtype=np.uint16), alpha, b"profile", b"exif", (72, 72))
    result = pocket(source, QUICK).image_data
    assert result.rgb.dtype == np.uint16 and result.rgb.shape == (48, 60, 3)
    assert result.alpha is not None and result.alpha.shape == (48, 60)
    assert (result.alpha[:, :15] == 0).all() and (result.alpha[:, 25:] == 65535).all()
    assert (result.icc, result.exif, result.dpi) == (b"profile", b"exif", (72, 72))
    assert len(np.unique(result.rgb)) > 256


def test_a_kl_autoencoder_bundle_with_epsilon_prediction_works(tiny_upscaler: Upscaler, photo: Image.Image) -> None:
    first = pixels(tiny_upscaler, photo, num_inference_steps=2)
    np.testing.assert_array_equal(first, pixels(tiny_upscaler, photo, num_inference_steps=2))
    assert (first != pixels(tiny_upscaler, photo, num_inference_steps=2, seed=2)).any()


def test_values_that_are_not_finite_fail(tiny_bundle: Path, photo: Image.Image) -> None:
    broken = Upscaler.load(tiny_bundle, "cpu")
    with torch.no_grad():
        broken.networks.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        broken(photo, QUICK)


@pytest.mark.parametrize("opacity", [0, 1])
def test_invisible_pixels_do_not_change_visible_ones(pocket: Upscaler, photo: Image.Image, opacity: int) -> None:
    """Neither by the tags nor by bleeding into edges."""
    rgb, alpha = np.asarray(photo), np.full((48, 64), 255, np.uint8)
    alpha[:, 32:] = opacity
    results = []
    for hidden in (0, 255):
        pixels = rgb.copy()
        pixels[:, 32:] = hidden
        results.append(pocket(ImageData(pixels, alpha), QUICK))
    assert results[0].metrics["tags"] == results[1].metrics["tags"]
    np.testing.assert_array_equal(results[0].image_data.rgb, results[1].image_data.rgb)
    np.testing.assert_array_equal(results[0].view("comparison").rgb, results[1].view("comparison").rgb)


def test_tags_are_in_the_prompt(pocket: Upscaler, photo: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts: list[list[str]] = []
    encode_text = prompt.encode
    monkeypatch.setattr(prompt, "encode", lambda *args: (prompts.append(args[2]), encode_text(*args))[1])
    metrics = pocket(photo, dataclasses.replace(QUICK, user_prompt="a cat")).metrics
    assert metrics["tags"] and prompts == [[f"{metrics['tags']}, a cat,{Settings.positive_prompt}"]]


def test_a_failing_tagger_fails_the_image(pocket: Upscaler, photo: Image.Image) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the tagger is broken")

    hook = pocket.networks.tagger.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="the tagger is broken"):
            pocket(photo, QUICK)
    finally:
        hook.remove()


def black(pixels: torch.Tensor) -> torch.Tensor:
    return torch.full_like(pixels, -1.0)


def one_value_per_tile(pixels: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(pixels) + pixels.mean((2, 3), keepdim=True)


def collapsed(pixels: torch.Tensor) -> torch.Tensor:
    return pixels * 0.1 + pixels.mean((2, 3), keepdim=True) * 0.9


@pytest.mark.parametrize("color_fix", ["wavelet", "adain", "none"])
@pytest.mark.parametrize("fault", [black, one_value_per_tile, collapsed])
def test_a_decoder_that_gives_no_image_fails(
    pocket: Upscaler, photo: Image.Image, color_fix: str, fault: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Whatever the colour fix pastes into it afterwards."""
    hook = pocket.networks.vae.decoder.register_forward_hook(lambda module, values, result: fault(result))
    try:
        with pytest.raises(RuntimeError, match="the decoder produced no image"):
            pocket(photo, dataclasses.replace(QUICK, color_fix=color_fix))
    finally:
        hook.remove()


@pytest.mark.parametrize("scale", [1, 4])
def test_smoothed_noise_passes_the_contrast_check(pocket: Upscaler, scale: int, rng: np.random.Generator) -> None:
    noise = Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8))
    assert pocket(noise, dataclasses.replace(QUICK, scale_factor=scale)).image.size == (96 * scale, 96 * scale)


def test_a_flat_image_stays_one(pocket: Upscaler) -> None:
    off = np.abs(pixels(pocket, Image.new("RGB", (64, 48), (90, 120, 150))).astype(int) - (90, 120, 150))
    assert off[16:-16, 16:-16].max() <= 4  # convolutions see zeros beyond the border
    assert off.mean() <= 1


TILED = dataclasses.replace(QUICK, num_inference_steps=2, latent_tiled_size=16, latent_tiled_overlap=4)


def run(upscaler: Upscaler, image: Image.Image, budget: Budget) -> tuple[np.ndarray, dict]:
    job = UpscaleRun(upscaler.networks, TILED, from_pil(image), Progress())
    job.budget = budget
    result = job.run()
    return result.image_data.rgb, result.metrics


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_the_tile_batch_does_not_change_a_byte(pocket: Upscaler, photo: Image.Image, batch: int) -> None:
    np.testing.assert_array_equal(run(pocket, photo, Budget(1))[0], run(pocket, photo, Budget(batch))[0])


@pytest.mark.parametrize("fits", [4, 1])
def test_every_memory_reduction_recovers_with_the_same_pixels(pocket: Upscaler, photo: Image.Image, fits: int) -> None:
    """An allocation fails for batches of more than `fits` tiles."""

    def allocate(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB")

    undisturbed, _ = run(pocket, photo, Budget(8))
    hook = pocket.networks.unet.conv_in.register_forward_pre_hook(allocate)
    try:
        result, metrics = run(pocket, photo, Budget(8))
    finally:
        hook.remove()
    np.testing.assert_array_equal(result, undisturbed)
    assert metrics["tile_batch"] == fits
    assert metrics["out_of_memory_retries"] == {4: 2, 1: 3}[fits]


def test_an_upscaler_that_ran_out_of_memory_works_again(pocket: Upscaler, photo: Image.Image) -> None:
    def allocate(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512.00 MiB")

    before = pixels(pocket, photo)
    hook = pocket.networks.unet.conv_in.register_forward_pre_hook(allocate)
    try:
        with pytest.raises(OutOfMemory, match="smaller latent_tiled_size"):
            pocket(photo, QUICK)
    finally:
        hook.remove()
    np.testing.assert_array_equal(before, pixels(pocket, photo))


@pytest.mark.parametrize("part", ["unet", "encoder", "decoder", "tagger", "text"])
def test_an_overflow_in_half_precision_is_done_again(tiny_bundle: Path, photo: Image.Image, part: str) -> None:
    """From there on in single precision to the image's end, and then in the same half precision at the same place."""
    networks = models.load(tiny_bundle, torch.device("cpu"), torch.bfloat16)
    network, layer = {
        "unet": (networks.unet, networks.unet.conv_out),
        "encoder": (networks.vae, networks.vae.encoder.conv_out),
        "decoder": (networks.vae, networks.vae.decoder.conv_out),
        "tagger": (networks.tagger, networks.tagger.image_proj),
        "text": (networks.text_encoder, list(networks.text_encoder.modules())[-1]),
    }[part]
    upscaler = Upscaler(networks)
    before = [(value.data_ptr(), value.clone()) for value in network.parameters()]

    def overflow(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        return output if output.dtype == torch.float32 else output * float("inf")

    layer.register_forward_hook(overflow)
    result = upscaler(photo, dataclasses.replace(QUICK, num_inference_steps=2))
    assert result.metrics["float32_retries"] == 1
    assert np.ptp(result.image_data.rgb) > 0
    for value, (place, own) in zip(network.parameters(), before, strict=True):
        assert value.dtype == torch.bfloat16 and value.data_ptr() == place and torch.equal(value, own)


def hard_blend(fn, tiles, shape, batch, weight, finished=lambda count: None, execute=map):
    """The later tile wins, as in tools whose tiles can be seen."""
    total = torch.zeros(tuple(shape))
    for n in range(shape[0]):
        for tile in tiles:
            tile.crop(total[n]).copy_(fn([(n, tile)])[0])
    return total


def seam(tiled: Output, whole: Output, factor: int) -> float:
    """How the difference to the image made from one tile jumps across tile borders, over its slope beside them."""
    difference = tiled.image_data.rgb.astype(float) - whole.image_data.rgb
    settings, across, beside = tiled.settings, [], []
    side = settings.latent_tiled_size
    assert side is not None
    for axis in (0, 1):
        slope = np.abs(np.diff(difference, axis=axis)).mean((1 - axis, 2))
        starts = offsets(len(slope) // factor + 1, side, settings.latent_tiled_overlap)
        borders = {factor * edge - 1 for start in starts for edge in (start, start + side)}
        for line in borders & set(range(8, len(slope) - 8)):
            across.append(slope[line])
            beside.append((slope[line - 8] + slope[line + 8]) / 2)
    return float(np.mean(across) / np.mean(beside))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["noise", "photo"])
def test_no_seam_where_tiles_meet(
    pocket: Upscaler, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smooth images would not do: their tiles differ by less than a level, so no seam shows even without blending."""
    image = {
        "noise": rng.normal(128, 40, (96, 160, 3)).clip(0, 255),
        "photo": skimage.data.astronaut()[100:484, :640].reshape(96, 4, 128, 4, 3).mean((1, 3)),
    }[kind].astype(np.uint8)
    low, factor = Image.fromarray(image), pocket.networks.factor
    tiled, whole = (pocket(low, QUICK.replace(scale_factor=4, latent_tiled_size=side)) for side in (64, 160))
    assert tiled.metrics["tiles"] >= 4 > 1 == whole.metrics["tiles"]
    monkeypatch.setattr(denoiser, "blend", hard_blend)
    hard = pocket(low, tiled.settings)
    assert seam(tiled, whole, factor) <= LARGEST_SEAM < seam(hard, whole, factor)


def test_keep_exif_keeps_or_removes_exif(pocket: Upscaler, photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0110] = "a camera"
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    source = dataclasses.replace(from_pil(photo), exif=exif.tobytes())
    for keep in (True, False):
        result = pocket(source, dataclasses.replace(QUICK, keep_exif=keep)).image_data
        for kind in ("png", "webp", "jpg"):
            with Image.open(io.BytesIO(encode(result, kind, 90))) as opened:
                assert (opened.getexif().get(0x0110) == "a camera") == keep
                assert bool(opened.getexif().get_ifd(0x8825)) == keep
