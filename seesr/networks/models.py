"""Builds every network of a bundle: on the meta device, strictly, from safetensors alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from seesr.networks import weights
from seesr.networks.attention import add_image_attention
from seesr.networks.tagger import Tagger
from seesr.networks.weights import WeightsError

IMAGE_WIDTH = 512  # of the image tokens, where a config does not say; SeeSR's configs do not
DIFFUSION_FILE = "diffusion_pytorch_model.safetensors"
BY_TIMM = {"relative_position_index", "attn_mask"}  # what its Swin blocks fill themselves, from timm 1.0.23 on
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


class TextEncoder(CLIPTextModel):
    """CLIP's, of which one result is used."""

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, 77] -> [B, 77, width]: the last hidden state after the final LayerNorm, no attention mask."""
        return self(ids).last_hidden_state


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of one bundle, on one device, in one dtype, in evaluation mode."""

    bundle: weights.Bundle
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: TextEncoder
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    tagger: Tagger
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"  # name of the kernel

    @property
    def factor(self) -> int:
        """Pixels per latent cell, each way."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def parts(self) -> list[tuple[nn.Module, str]]:
        """The methods that take one tensor and give one, and can be run as a whole; the step is the denoiser's."""
        vae: Any = self.vae
        forward = [(network, "forward") for network in (vae.encoder, vae.decoder)]
        return [*forward, (self.tagger, "tokens"), (self.tagger, "logits"), (self.text_encoder, "hidden")]

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


def text_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    config = CLIPTextConfig(**read_config(folder))
    with torch.device("meta"):
        network = TextEncoder(config)
    state = read(folder / "model.safetensors", device, dtype)
    state.pop("text_model.embeddings.position_ids", None)  # an old integer buffer, rebuilt in `fill`
    if not any(key.startswith("text_model.") for key in network.state_dict()):  # transformers >= 5 drops the prefix
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    return fill(network, state, folder)


def scheduler(folder: Path) -> DDPMScheduler:
    """The bundle's noise schedule, read as DDPM with trailing timesteps, as SeeSR does.

    Raises:
        WeightsError: the networks were trained to predict something else than the noise.
    """
    config = read_config(folder, "scheduler_config.json")
    if config.get("prediction_type", "epsilon") != "epsilon":
        raise WeightsError(
            f"{folder}: networks that predict {config['prediction_type']} are not supported, only epsilon"
        )
    schedule = DDPMScheduler.from_config(config, timestep_spacing="trailing")
    assert isinstance(schedule, DDPMScheduler)
    return schedule


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
    fill_buffers(network, next(iter(state.values())).device, source)
    return network.requires_grad_(False).eval()


def fill_buffers(network: nn.Module, device: torch.device, source: Path) -> None:
    """Gives a value to every buffer that no file holds: position numbers, and timm's window indices and masks.

    Raises:
        WeightsError: a buffer is left that nothing fills; it would hold whatever was in memory.
    """
    owners: list[Any] = []
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name == "position_ids":
                setattr(
                    module, name, torch.arange(buffer.shape[-1], device=device, dtype=buffer.dtype).expand(buffer.shape)
                )
            elif name in BY_TIMM and hasattr(module, "init_non_persistent_buffers"):
                setattr(module, name, torch.empty_like(buffer, device=device))
                owners.append(module)
            else:
                raise WeightsError(f"{source}: nothing fills the buffer {name} of {type(module).__name__}")
    for module in owners:
        module.init_non_persistent_buffers()
