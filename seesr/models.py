"""Builds every network of a bundle: on the meta device, strictly, from safetensors alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from seesr import weights
from seesr.attention import add_image_attention
from seesr.tagger import Tagger
from seesr.weights import WeightsError

IMAGE_WIDTH = 512  # of the image tokens, where a config does not say; SeeSR's configs do not
DIFFUSION_FILE = "diffusion_pytorch_model.safetensors"
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of one bundle, on one device, in one dtype, in evaluation mode."""

    bundle: weights.Bundle
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    tagger: Tagger
    device: torch.device
    dtype: torch.dtype

    @property
    def factor(self) -> int:
        """Pixels per latent cell, each way."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @property
    def tile(self) -> int:
        """Side of the latent square that the UNet was trained at, cells."""
        return self.unet.config["sample_size"]


def load(path: Path, device: torch.device, dtype: torch.dtype) -> Models:
    """Verifies the bundle in `path` and builds its networks.

    Raises:
        WeightsError: the bundle is missing or damaged, or a key is missing, extra or misshapen.
    """
    bundle = weights.verify(path)
    target = {"device": device, "dtype": dtype}
    return Models(
        bundle=bundle,
        unet=diffusion_network(UNet2DConditionModel, path / "unet", **target),
        controlnet=diffusion_network(ControlNetModel, path / "controlnet", **target),
        vae=autoencoder(path / "vae", **target),
        text_encoder=text_encoder(path / "text_encoder", **target),
        tokenizer=CLIPTokenizer.from_pretrained(path / "tokenizer", local_files_only=True),
        scheduler=scheduler(path / "scheduler"),
        tagger=tagger(path / "tagger", **target),
        device=device,
        dtype=dtype,
    )


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A config without the underscored notes that libraries leave in it."""
    return {k: v for k, v in json.loads((folder / name).read_text()).items() if not k.startswith("_")}


def build_diffusion_network(cls: Any, config: dict[str, Any]) -> Any:
    """A UNet or ControlNet of the configured size with its image attention, weights not set."""
    config = dict(config)
    config.pop("use_image_cross_attention", None)
    width = config.pop("image_cross_attention_dim", IMAGE_WIDTH)
    network = cls(**config)
    add_image_attention(network, width)
    return network


def diffusion_network(cls: type[nn.Module], folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        network = build_diffusion_network(cls, read_config(folder))
    return fill(network, read(folder / DIFFUSION_FILE, device, dtype), folder)


def autoencoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    config = read_config(folder)
    if VAES[name] is AutoencoderTiny:
        config.pop("block_out_channels", None)  # written by diffusers for its own use, no argument
    with torch.device("meta"):
        network = VAES[name](**config)
    return fill(network, read(folder / DIFFUSION_FILE, device, dtype), folder)


def text_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> CLIPTextModel:
    config = CLIPTextConfig(**read_config(folder))
    with torch.device("meta"):
        network = CLIPTextModel(config)
    state = read(folder / "model.safetensors", device, dtype)
    state.pop("text_model.embeddings.position_ids", None)  # an old integer buffer, rebuilt in `fill`
    if not any(key.startswith("text_model.") for key in network.state_dict()):  # transformers >= 5 drops the prefix
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    return fill(network, state, folder)


def scheduler(folder: Path) -> DDPMScheduler:
    """The bundle's noise schedule, read as DDPM with trailing timesteps, as SeeSR does."""
    config = read_config(folder, "scheduler_config.json")
    found = DDPMScheduler.from_config(config, timestep_spacing="trailing")
    assert isinstance(found, DDPMScheduler)
    return found


def tagger(folder: Path, device: torch.device, dtype: torch.dtype) -> Tagger:
    with torch.device("meta"):
        network = Tagger(**read_config(folder), **read_config(folder, "tags.json"))
    return fill(network, read(folder / "model.safetensors", device, dtype), folder)


def read(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a safetensors file, floating ones in `dtype`."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def fill(network: nn.Module, state: dict[str, Tensor], source: Path) -> Any:
    """Gives a network built on the meta device its weights; every key and shape must agree.

    Raises:
        WeightsError: names the first missing, extra or misshapen keys.
    """
    expected = network.state_dict()
    for fault, keys in (("missing", expected.keys() - state.keys()), ("extra", state.keys() - expected.keys())):
        if keys:
            raise WeightsError(f"{source}: {len(keys)} {fault} keys, first {', '.join(sorted(keys)[:3])}")
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise WeightsError(f"{source}: {key} has shape {list(tensor.shape)}, expected {list(expected[key].shape)}")
    network.load_state_dict(state, strict=True, assign=True)
    device = next(iter(state.values())).device
    for module, name in unsaved_buffers(network):
        setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        if name == "position_ids":
            buffer = module.get_buffer(name)
            buffer.copy_(torch.arange(buffer.shape[-1], device=device))
    for module in network.modules():
        init = getattr(module, "init_non_persistent_buffers", None)  # timm's: position index, attention mask
        if init is not None:
            init()
    assert not list(unsaved_buffers(network))
    return network.requires_grad_(False).eval()


def unsaved_buffers(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Buffers that no file holds, still on the meta device."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                yield module, name
