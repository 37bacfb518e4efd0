"""A recorded case of the SeeSR reference: its description, inputs and outputs, and networks with its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lab.parity import recipe, reference
from seesr.checkpoints import convert
from seesr.networks import models
from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.text_encoder import TextEncoder
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel

State = dict[str, Tensor]
SMALL = {  # class and recipe salt of the small bundle's networks
    "unet": (UNet2DConditionModel, ""),
    "controlnet": (ControlNetModel, "controlnet:"),
    "vae": (AutoencoderKL, "vae:"),
    "text_encoder": (TextEncoder, "text:"),
}


HALVED = ("unet", "vae", "unet_merge", "tagger")  # kinds whose inputs may be half floats


@dataclasses.dataclass
class Case:
    """One folder: its description, inputs as the reference saw them, recorded outputs, and where weights come from."""

    folder: Path
    about: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    bundle: Path
    device: torch.device
    dtype: torch.dtype

    def place(self, network: Any) -> Any:
        return network.to(self.device, self.dtype)

    @property
    def options(self) -> dict[str, Any]:
        return self.about["options"]

    def state(self, network: str) -> State:
        """Weights of one network under the reference's names."""
        source = self.about["weights"]
        if "recipe" in source:
            result = json.loads((self.folder / source["recipe"]).read_text())[network]
            return {k: torch.from_numpy(v) for k, v in recipe.state_dict(result["shapes"], result["salt"]).items()}
        files = sorted((self.bundle / network).glob("*.safetensors"))
        return load_file(files[0]) if files else self.generated(network)

    def generated(self, network: str) -> State:
        """Weights of the small bundle, which are the recipe's, but for the VAE's quieter posterior."""
        cls, salt = SMALL[network]
        with torch.device("meta"):
            module = cls(**self.config(network))
        names = reference.foreign_keys(module.state_dict())
        if cls is TextEncoder:
            names = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in names.items()}
        result = recipe.state_dict({key: tuple(value.shape) for key, value in names.items()}, salt)
        if cls is AutoencoderKL:
            result["quant_conv.weight"] /= 2
            result["quant_conv.bias"][4:] -= 2
        return {key: torch.from_numpy(value) for key, value in result.items()}

    def config(self, network: str) -> dict[str, Any]:
        configs = self.about.get("configs", {})
        if network in configs:
            return configs[network]
        return models.read_config(self.bundle / network)

    def unet(self, state: State | None = None) -> UNet2DConditionModel:
        return self.diffusion(UNet2DConditionModel, "unet", state)

    def controlnet(self) -> ControlNetModel:
        return self.diffusion(ControlNetModel, "controlnet")

    def diffusion(self, cls: type, name: str, state: State | None = None) -> Any:
        with torch.device("meta"):
            network = cls(**self.config(name))
        return self.place(models.fill(network, convert.diffusion_keys(state or self.state(name)), self.folder))

    def text_encoder(self) -> TextEncoder:
        with torch.device("meta"):
            network = TextEncoder(**self.config("text_encoder"))
        state = {key.removeprefix("text_model."): value for key, value in self.state("text_encoder").items()}
        state.pop("embeddings.position_ids", None)
        return self.place(models.fill(network, state, self.folder))

    def vae(self) -> AutoencoderKL:
        with torch.device("meta"):
            network = AutoencoderKL(**self.config("vae"))
        return self.place(models.fill(network, convert.vae_keys(self.state("vae")), self.folder))


def read_case(folder: Path, bundle: Path | None, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    about = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors") if about["inputs"] else {}
    for name, entry in about["inputs"].items():
        if "divide_by" in entry:
            inputs[name] = inputs[name].float() / entry["divide_by"]
        if "mean" in entry:
            mean, std = (torch.tensor(entry[k], dtype=torch.float32).view(1, 3, 1, 1) for k in ("mean", "std"))
            inputs[name] = (inputs[name] - mean) / std
    where = bundle or folder.parent / (about["weights"] or {}).get("bundle", "tiny_bundle")
    if about["kind"] in (*HALVED, "pipeline"):
        halved = dtype if about["kind"] in HALVED else None  # the pipeline casts where the product does
        inputs = {k: v.to(device, halved if v.is_floating_point() else None) for k, v in inputs.items()}
    return Case(folder, about, inputs, load_file(folder / "outputs.safetensors"), where, torch.device(device), dtype)
