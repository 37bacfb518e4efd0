"""Operation counts of one image: nothing is computed twice, and the records are correct."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab import sizes
from lab.speed import bench
from seesr import Settings, Upscaler
from seesr.images.read import from_pil
from seesr.networks import weights
from seesr.networks.attention import Tokens
from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.graphs import Graphs
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.pipeline import work
from seesr.runtime import tiling
from seesr.runtime.tiling import Tile

META = torch.device("meta")


def calls(modules: dict[str, nn.Module], work: Callable[[], object]) -> Counter[str]:
    """How often each of the modules runs."""
    results: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: results.update([name])) for name, module in modules.items()
    ]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return results


OUTLINE = work.Outline(4, 2, 64, 1, (64, 72), 24, 512, 512)


def test_the_networks_see_no_whole_tile_of_a_thin_image() -> None:
    sizes = (200, 100), (300, 64), (300, 65), (257, 64), (256, 64), (64, 300)
    assert [OUTLINE.padding((64, 72), size) for size in sizes] == [
        (8, 256), (8, 32), (8, 256), (8, 32), (8, 256), (8, 32)
    ]  # fmt: skip
    assert OUTLINE.padding((16,), (40, 40)) == (8, 64)


def test_the_autoencoder_computes_what_is_needed_and_the_overlaps() -> None:
    assert work.autoencoder_work(OUTLINE, 512, (100, 200), None) == 100 * 200
    assert work.autoencoder_work(OUTLINE, 512, (100, 200), Tile(50, 60, 60, 80)) == (10 + 2 * 24) * (20 + 2 * 24)
    assert work.autoencoder_work(OUTLINE, 128, (100, 200), None) == 2 * 100 * 128
    everywhere = work.autoencoder_work(OUTLINE._replace(halo=None), 128, (64, 64), None)
    assert everywhere == 64 * 64 * (1 + tiling.attention_keys((64, 64)) / work.ATTENTION_KEYS)


def test_units_of_every_stage() -> None:
    base, size = Settings(scale_factor=2), (100, 50)
    units = work.count(OUTLINE, base, size)
    denoise = 64 * 64 * (1 + 64 * 64 / tiling.ATTENTION_AREA) / 1e6
    for stage, expected in {
        "read": 0.005, "tags": 1, "text": 1, "enlarge": 0.02, "denoise": denoise, "finish": 0.02, "file:png": 0.02
    }.items():  # fmt: skip
        assert units[stage] == pytest.approx(expected), stage
    steered = {"use_kds": True, "num_particles": 3}
    for changes, changed in (
        ({"fidelity": 0.1}, {"finish": 2}), ({"cfg_scale": 1.5}, {"text": 2, "denoise": 2}), (steered, {"denoise": 3}),
        ({"num_inference_steps": 3}, {"denoise": 3}), ({"output_view": "comparison"}, {"file:png": 2}),
        ({**steered, "output_view": "confidence"}, {"denoise": 3, "decode": 3}),
    ):  # fmt: skip
        other = work.count(OUTLINE, base.replace(**changes), size)
        assert {stage: round(other[stage] / units[stage], 6) for stage in units} == {
            **dict.fromkeys(units, 1),
            **changed,
        }
    masked = work.count(OUTLINE, base, size, np.full((50, 100), 255, np.uint8))
    assert masked["finish"] == 0.04


@pytest.mark.parametrize(("steps", "particles", "guidance"), [(1, 1, 1.0), (3, 1, 1.0), (2, 2, 1.0), (2, 1, 1.5)])
def test_what_is_constant_is_computed_once(
    pocket: Upscaler, photo: Image.Image, steps: int, particles: int, guidance: float
) -> None:
    networks = pocket.networks
    watched: dict[str, nn.Module] = {
        "tagger": networks.tagger.visual_encoder.patch_embed,
        "text": networks.text_encoder.final_layer_norm,
        "conditioning": networks.controlnet.controlnet_cond_embedding.conv_in,
        "unet": networks.unet.conv_in,
    }
    own = set()
    for net in (networks.unet, networks.controlnet):
        for name, module in net.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                watched[f"{net.__class__.__name__}.{name}"] = module
                own.add(f"{net.__class__.__name__}.{name}")
    settings = Settings(
        num_inference_steps=steps,
        seed=1,
        latent_tiled_size=32,
        latent_tiled_overlap=8,
        use_kds=particles > 1,
        num_particles=particles,
        cfg_scale=guidance,
    )
    tiles = []
    result = calls(watched, lambda: tiles.append(pocket(photo, settings).metrics["tiles"]))
    assert tiles[0] > 1
    assert result["tagger"] == result["text"] == 1
    assert result["conditioning"] == tiles[0]  # once per place, over all steps and particles
    assert result["unet"] == steps * particles * tiles[0]  # batches of one on a CPU, guidance within the batch
    assert own and all(result[name] == 1 for name in own)


@pytest.mark.parametrize(("side", "maximum"), [(2048, 1.57), (4096, 1.35), (8192, 1.35)])
def test_overlap_wastes_little(side: int, maximum: float) -> None:
    """At 2048 pixels four tiles a row would not overlap, so there are five."""
    tile = 64
    tiles = tiling.grid(side // 8, side // 8, tile, Settings.latent_tiled_overlap)
    assert len(tiles) * tile**2 <= maximum * (side // 8) ** 2


def tflop(network: nn.Module, *inputs: object, **options: object) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs, **options)
    return counter.get_total_flops() / 1e12


def test_the_full_size_networks_cost_what_they_should() -> None:
    """Of the public configurations, at 512 x 512 pixels; one product and one sum are two operations."""
    with META:
        unet = UNet2DConditionModel(**sizes.UNET)
        controlnet = ControlNetModel(**sizes.BLOCKS)
        vae = AutoencoderKL(**sizes.VAE)
        z, t = torch.empty(1, 4, 64, 64), torch.empty(1)
        context = (Tokens(torch.empty(1, 77, 1024)), Tokens(torch.empty(1, 145, 512)))
        features, image = torch.empty(1, 320, 64, 64), torch.empty(1, 3, 512, 512)
    step = tflop(unet, z, t, context) + tflop(controlnet, z, t, context, features)
    assert step == pytest.approx(1.61, rel=0.02)
    assert tflop(vae.encoder, image) == pytest.approx(1.117, rel=0.01)
    assert tflop(vae.decoder, z) == pytest.approx(2.515, rel=0.01)
    again = tflop(unet, z, t, context) + tflop(controlnet, z, t, context, features)
    assert 0.98 * step < again < step  # keys and values of the context are there already


def rerun(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for CUDA's recorder: replaying reads and writes the same memory."""
    result = work()

    def replay() -> None:
        result.copy_(work())

    return replay, result


@pytest.mark.long
def test_a_recorded_pass_gives_the_same_images(pocket: Upscaler, photo: Image.Image) -> None:
    recorded = Upscaler(pocket.networks)
    recorded.graphs = Graphs(rerun)
    settings = Settings(num_inference_steps=2, seed=1, scale_factor=2, latent_tiled_size=16, latent_tiled_overlap=4)
    with recorded.graphs.setup():
        for scale in (1.0, 1.5):
            recorded(photo, dataclasses.replace(settings, cfg_scale=scale))
    other = photo.transpose(Image.Transpose.ROTATE_180)
    for image in (photo, other, photo):  # the second must not be made with the first one's tokens
        for values in (settings, dataclasses.replace(settings, cfg_scale=1.3, user_prompt="red")):
            assert recorded(image, values).image.tobytes() == pocket(image, values).image.tobytes()
    assert len(recorded.graphs.recordings) == 3  # with guidance of any scale, without, and the conditioning's embedding
    assert bench.replayed(recorded, from_pil(photo), settings) == {"graphs": 3, "levels_off": 0}
    for recording in recorded.graphs.recordings.values():
        recording.replay = lambda: None  # what it gives is stale then
    assert bench.replayed(recorded, from_pil(other), settings)["levels_off"] > 0


def test_every_network_is_recorded(photo: Image.Image) -> None:
    settings = Settings(num_inference_steps=1, seed=1, scale_factor=2, latent_tiled_size=16)
    upscaler = Upscaler.load(weights.POCKET, "cpu")
    plain = upscaler(photo, settings).image.tobytes()
    recorded = Upscaler(upscaler.networks, graphs=Graphs(rerun))
    assert recorded.graphs is not None
    with recorded.graphs.setup():
        recorded(photo, settings)
    assert len(recorded.graphs.recordings) == 7  # encoder, decoder, tokens, tags, text, conditioning, step
    assert recorded(photo, settings).image.tobytes() == plain
