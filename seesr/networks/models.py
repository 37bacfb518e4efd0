"""Builds every network of a bundle: on the meta device, with strict loading, from safetensors files only."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seesr.networks import weights
from seesr.networks.autoencoders import AutoencoderKL, AutoencoderTiny
from seesr.networks.schedule import NoiseSchedule
from seesr.networks.tagger import Tagger
from seesr.networks.text_encoder import ClipTokenizer, TextEncoder
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.networks.weights import WeightsError

DIFFUSION_FILE = "diffusion_pytorch_model.safetensors"
VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of one bundle, on one device, in one dtype, in evaluation mode."""

    bundle: weights.Bundle
    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    vae: AutoencoderKL | AutoencoderTiny
    text_encoder: TextEncoder
    tokenizer: ClipTokenizer
    scheduler: NoiseSchedule
    tagger: Tagger
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"  # name of the kernel

    @property
    def factor(self) -> int:
        """Pixels per latent pixel, each way."""
        return 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    def parts(self) -> list[tuple[nn.Module, str]]:
        """The methods that take one tensor and give one, and can be run as a whole; the step is the denoiser's."""
        vae: Any = self.vae
        forward = [(network, "forward") for network in (vae.encoder, vae.decoder)]
        return [*forward, (self.tagger, "tokens"), (self.tagger, "logits"), (self.text_encoder, "hidden")]

    @property
    def size(self) -> int:
        """Bytes of all parameters."""
        parts = (self.unet, self.controlnet, self.vae, self.tagger, self.text_encoder)
        return sum(value.nbytes for part in parts for value in part.parameters())

    @property
    def tile(self) -> int:
        """Side of the latent square that the UNet was trained at, latent pixels."""
        return self.unet.config["sample_size"]


def load(path: Path, device: torch.device, dtype: torch.dtype) -> Models:
    """Verifies the bundle in `path` and builds its networks.

    Raises:
        WeightsError: the bundle is missing or damaged, or a key is missing, extra or misshapen.
    """
    bundle = weights.verify(path)
    target: dict[str, Any] = {"device": device, "dtype": dtype}
    return Models(
        bundle=bundle,
        unet=diffusion_network(UNet2DConditionModel, path / "unet", **target),
        controlnet=diffusion_network(ControlNetModel, path / "controlnet", **target),
        vae=autoencoder(path / "vae", **target),
        text_encoder=text_encoder(path / "text_encoder", **target),
        tokenizer=ClipTokenizer(path / "tokenizer"),
        scheduler=scheduler(path / "scheduler"),
        tagger=tagger(path / "tagger", **target),
        device=device,
        dtype=dtype,
    )


class Uninitialised(TorchFunctionMode):
    """Leaves the weights of new modules as they are: those of the file replace them, and on the meta device drawing
    normal numbers would import torch's compiler.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A config without the underscored notes that libraries leave in it."""
    return {k: v for k, v in json.loads((folder / name).read_text()).items() if not k.startswith("_")}


def diffusion_network(cls: type[nn.Module], folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """A UNet, ControlNet or autoencoder from its folder."""
    with torch.device("meta"), Uninitialised():
        network = cls(**read_config(folder))
    return fill(network, read(folder / DIFFUSION_FILE, device, dtype), folder)


def autoencoder(folder: Path, device: torch.device, dtype: torch.dtype) -> Any:
    name = json.loads((folder / "config.json").read_text())["_class_name"]
    return diffusion_network(VAES[name], folder, device, dtype)


def text_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    with torch.device("meta"), Uninitialised():
        network = TextEncoder(**read_config(folder))
    state = read(folder / "model.safetensors", device, dtype)
    state.pop("text_model.embeddings.position_ids", None)  # an old integer buffer
    return fill(network, {key.removeprefix("text_model."): value for key, value in state.items()}, folder)


def scheduler(folder: Path) -> NoiseSchedule:
    """The bundle's noise schedule.

    Raises:
        WeightsError: the networks were trained to predict something else than the noise.
    """
    try:
        return NoiseSchedule(read_config(folder, "scheduler_config.json"))
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error}") from None


def tagger(folder: Path, device: torch.device, dtype: torch.dtype) -> Tagger:
    with torch.device("meta"), Uninitialised():
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
    like = next(iter(state.values()))
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):  # computed by the networks, in no file
            setattr(module, name, buffer.to(like.device, like.dtype if buffer.is_floating_point() else None))
    return network.requires_grad_(False).eval()
