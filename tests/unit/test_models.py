"""Networks against diffusers and the reference: keys, schedule, tokens, tags, prompts and cached values."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from seesr import Settings, Upscaler, WeightsError
from seesr.networks import models, tagger, weights
from seesr.networks.attention import Tokens
from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.text_encoder import ClipTokenizer
from seesr.networks.transformer import TextThenImage
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.pipeline import prompt as prompt_module
from seesr.pipeline import sampling
from seesr.pipeline.denoiser import Denoiser, layout
from seesr.runtime import tiling

SD21 = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


@pytest.mark.parametrize(
    ("cls", "parameters", "image_parameters", "wraps", "keys"),
    [(UNet2DConditionModel, 1_126_760_324, 260_849_600, 16, 1102), (ControlNetModel, 489_031_440, None, 7, 522)],
)
def test_full_size_networks_have_seesrs_keys_and_parameters(
    cls: type, parameters: int, image_parameters: int | None, wraps: int, keys: int
) -> None:
    with torch.device("meta"):
        network = cls(**SD21)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(network.state_dict()) == keys
    pairs = [m for m in network.modules() if isinstance(m, TextThenImage)]
    assert len(pairs) == wraps
    if image_parameters:
        assert sum(p.numel() for pair in pairs for p in pair.image.parameters()) == image_parameters


def test_norm_epsilons_that_no_recorded_number_can_see() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD21)
        vae = AutoencoderKL(**tiny.KL)
        tags = tagger.Tagger(**tiny.TAGGER, **tiny.TAGS)
    for name, module in unet.named_modules():
        if isinstance(module, nn.GroupNorm):
            assert module.eps == (1e-6 if "attentions" in name else 1e-5), name
    assert {m.eps for m in vae.modules() if isinstance(m, nn.GroupNorm)} == {1e-6}
    assert {m.eps for m in tags.tagging_head.modules() if isinstance(m, nn.LayerNorm)} == {1e-12}
    assert {m.eps for m in tags.visual_encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


def test_both_kinds_of_tokens_reach_the_prediction(tiny_upscaler: Upscaler) -> None:
    networks = tiny_upscaler.networks
    z, conditioning = torch.randn(1, 4, 16, 16), torch.rand(1, 3, 128, 128)
    text, tokens = torch.randn(1, 77, 16), torch.randn(1, 5, 24)

    def predict(text: torch.Tensor, tokens: torch.Tensor, conditioning: torch.Tensor, t: int = 999) -> torch.Tensor:
        denoiser = Denoiser(
            unet=networks.unet, controlnet=networks.controlnet, text=Tokens(text), image=Tokens(tokens),
            conditioning=lambda tile: conditioning, tiles=[], weight=z,
        )  # fmt: skip
        return denoiser.predict(z, torch.tensor([t]), conditioning)

    base = predict(text, tokens, conditioning)
    assert torch.equal(base, predict(text, tokens, conditioning))
    for changed in (
        predict(-text, tokens, conditioning),
        predict(text, -tokens, conditioning),
        predict(text, tokens, 1 - conditioning),
        predict(text, tokens, conditioning, 499),
    ):
        assert (changed - base).abs().max() > 1e-3


def stock_scheduler(steps: int) -> diffusers.DDPMScheduler:
    scheduler = diffusers.DDPMScheduler.from_config(tiny.SCHEDULER, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return scheduler


def test_schedule_and_step_equal_the_library(tiny_upscaler: Upscaler) -> None:
    z, eps = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    for count in (1, 2, 3, 4, 5, 6, 7, 8):
        steps, scheduler = sampling.schedule(tiny_upscaler.networks.scheduler, count), stock_scheduler(count)
        assert steps[0].t == sampling.START
        assert steps[-1].alpha_bar_next == 1
        for step in steps:
            theirs = scheduler.step(eps, step.t, z, generator=torch.Generator().manual_seed(1)).prev_sample  # pyright: ignore[reportAttributeAccessIssue]
            noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
            ours = sampling.ddpm_step(z, sampling.predicted_x0(eps, z, step), step, noise)
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_predicted_x0_agrees_with_the_library(tiny_upscaler: Upscaler) -> None:
    z, eps = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    step = sampling.schedule(tiny_upscaler.networks.scheduler, 2)[1]
    theirs = stock_scheduler(2).step(eps, step.t, z).pred_original_sample  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(sampling.predicted_x0(eps, z, step), theirs, atol=1e-5, rtol=1e-5)


def test_networks_that_predict_something_else_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "scheduler"
    folder.mkdir()
    config = {**tiny.SCHEDULER, "prediction_type": "v_prediction"}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="predict v_prediction"):
        models.scheduler(folder)


def test_one_tile_equals_no_tiles_and_guidance_one_is_the_positive_branch(tiny_upscaler: Upscaler) -> None:
    networks = tiny_upscaler.networks
    z, conditioning = torch.randn(1, 4, 16, 16), torch.rand(1, 3, 128, 128)
    text, tokens = torch.randn(2, 77, 16), torch.randn(1, 5, 24)
    tiles, weight = layout(16, 16, 16, 4, z.device)

    def run(text: torch.Tensor, guidance: float) -> torch.Tensor:
        denoiser = Denoiser(
            unet=networks.unet, controlnet=networks.controlnet, text=Tokens(text), image=Tokens(tokens),
            conditioning=lambda tile: tile.scaled(8).crop(conditioning), tiles=tiles, weight=weight, guidance=guidance,
        )  # fmt: skip
        return denoiser(z, 999, 0)

    positive = run(text[1:], 1.0)
    torch.testing.assert_close(run(text, 1.0), positive, atol=1e-5, rtol=1e-5)
    negative = run(text[:1], 1.0)
    torch.testing.assert_close(run(text, 1.5), negative + 1.5 * (positive - negative), atol=1e-4, rtol=1e-4)


def test_what_does_not_depend_on_the_latents_is_computed_once(tiny_upscaler: Upscaler, photo: Image.Image) -> None:
    """Keys and values once per cross-attention, conditioning features once per tile, tagger and encoder once."""
    networks = tiny_upscaler.networks
    calls: dict[str, int] = {}
    handles = []

    def count(module: nn.Module, name: str) -> None:
        def called(*_: object) -> None:
            calls[name] = calls.get(name, 0) + 1

        handles.append(module.register_forward_hook(called))

    both = [*networks.unet.modules(), *networks.controlnet.modules()]
    pairs = [module for module in both if isinstance(module, TextThenImage)]
    for number, pair in enumerate(pairs):
        count(pair.text.transformer_blocks[0].attn2.to_k, f"text {number}")  # pyright: ignore[reportAttributeAccessIssue]
        count(pair.image.transformer_blocks[0].attn2.to_v, f"image {number}")  # pyright: ignore[reportAttributeAccessIssue]
    count(networks.controlnet.controlnet_cond_embedding.conv_in, "conditioning")
    count(networks.tagger.visual_encoder.norm, "tagger")
    count(networks.vae.encoder.conv_in, "encoder")
    count(networks.vae.decoder.conv_in, "decoder")
    count(networks.unet.conv_in, "unet")
    settings = Settings(
        seed=1, num_inference_steps=3, use_kds=True, num_particles=2, latent_tiled_size=16, latent_tiled_overlap=4
    )
    tiles = tiny_upscaler(photo, settings).metrics["tiles"]
    for handle in handles:
        handle.remove()
    assert tiles > 1
    assert calls.pop("conditioning") == tiles
    assert calls.pop("unet") == tiles * 3 * 2
    assert set(calls.values()) == {1}
    assert len(calls) == 2 * len(pairs) + 3


def test_cached_keys_and_values_give_the_same_prediction(tiny_upscaler: Upscaler) -> None:
    unet = tiny_upscaler.networks.unet
    z, text, image = torch.randn(4, 4, 16, 16), torch.randn(2, 77, 16), torch.randn(1, 5, 24)
    plain = unet(z, 999, (text.repeat_interleave(2, 0), image.expand(4, -1, -1)))
    context = (Tokens(text), Tokens(image))
    for _ in range(2):
        torch.testing.assert_close(unet(z, 999, context), plain, atol=1e-5, rtol=1e-5)


def test_noise_is_a_matter_of_the_seed_alone() -> None:
    first, second = (sampling.noise_stream(7, (1, 4, 8, 8), torch.device("cpu")) for _ in range(2))
    assert all(torch.equal(next(first), next(second)) for _ in range(3))
    assert not torch.equal(next(first), next(sampling.noise_stream(8, (1, 4, 8, 8), torch.device("cpu"))))


def test_the_tagger_resizes_without_antialiasing() -> None:
    x = torch.rand(1, 3, 40, 900)
    expected = torch.nn.functional.interpolate(x, (384, 384), mode="bilinear", antialias=False)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (tagger.MEAN, tagger.STD))
    torch.testing.assert_close(tagger.preprocess(x, 384), (expected - mean) / std)


def test_tags_are_those_above_their_thresholds(tiny_upscaler: Upscaler) -> None:
    network = tiny_upscaler.networks.tagger
    names, tokens = network(torch.rand(1, 3, 30, 50))
    logits = network.logits(tokens)[0]
    assert names == [tag for tag, logit in zip(network.tags, logits, strict=True) if logit.sigmoid() > 0.5]
    assert tokens.shape == (1, 1 + 12 * 12, 24)


def test_prompts_are_composed_like_the_reference() -> None:
    assert prompt_module.compose(["a", "b"], "", "clean, high-resolution, 8k") == "a, b, ,clean, high-resolution, 8k"
    assert prompt_module.compose([], "", "clean") == ", ,clean"
    assert prompt_module.compose(["a"], "a cat", "clean") == "a, a cat,clean"


def test_too_many_tags_leave_room_for_what_the_user_wrote(tiny_upscaler: Upscaler) -> None:
    tokenizer = tiny_upscaler.networks.tokenizer
    tags = [f"noisy{n}" for n in range(100)]
    prompt = prompt_module.fit(tokenizer, tags, "my prompt", "clean")
    assert 0 < len(prompt.tags) < 100 and prompt.tags + prompt.left_out == tags and prompt.cut == ""
    assert prompt.text == prompt_module.compose(prompt.tags, "my prompt", "clean")
    assert len(tokenizer.encode(prompt.text)) <= tokenizer.model_max_length
    assert prompt_module.fit(tokenizer, ["a", "b"], "", "clean").left_out == []


def test_a_prompt_may_fill_the_text_encoder() -> None:
    """77 tokens with the start and the end; each of these words is one."""
    tokenizer, seen = ClipTokenizer(weights.POCKET / "tokenizer"), set()
    for count in range(65, 80):
        prompt = prompt_module.fit(tokenizer, [], "dark " * count, "clean")
        beyond = len(tokenizer.encode(prompt.text)) - 77
        assert len(prompt.cut.split()) == max(0, beyond)
        seen.add(beyond)
    assert {-1, 0, 1} <= seen


def test_words_that_do_not_fit_are_reported(tiny_upscaler: Upscaler, photo: Image.Image) -> None:
    user = "dark " * 90
    prompt = prompt_module.fit(tiny_upscaler.networks.tokenizer, ["cat"], user, "clean")
    assert prompt.tags == [] and prompt.left_out == ["cat"] and prompt.cut.split()[-1] == "clean"
    metrics = tiny_upscaler(photo, Settings(num_inference_steps=1, seed=1, user_prompt=user)).metrics
    assert metrics["tags"] == "" and "clean" in metrics["prompt_cut"]


def test_a_tile_is_the_same_place_on_every_grid() -> None:
    latents, pixels = torch.arange(24.0).view(1, 1, 4, 6), torch.arange(24.0).view(1, 1, 4, 6)
    pixels = pixels.repeat_interleave(8, 2).repeat_interleave(8, 3)
    tile = tiling.Tile(1, 2, 3, 5)
    assert torch.equal(tile.scaled(8).crop(pixels)[..., ::8, ::8], tile.crop(latents))
