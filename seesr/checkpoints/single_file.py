"""SD-Turbo as one file, sd_turbo.safetensors: Stability's names -> those of diffusers and transformers.

Names are made from our own networks' keys, so every one of them must be in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.text_encoder import TextEncoder
from seesr.networks.unet import UNet2DConditionModel
from seesr.networks.weights import WeightsError

State = dict[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = ("conditioner.embedders.0.model.", "cond_stage_model.model.")  # as Stability saved it, and as other tools do
CHANNELS, LAYERS = (320, 640, 1280, 1280), 2
CONFIGS: Mapping[str, dict[str, Any]] = {  # of the public repository; the single file has none
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 64,
        "block_out_channels": list(CHANNELS),
        "layers_per_block": LAYERS,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
    "scheduler": {
        "_class_name": "EulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
    },
}
NETWORKS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": TextEncoder}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
         "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip


def unet_name(key: str, layers: int, attention: tuple[bool, ...]) -> str:
    """diffusers' name of a UNet tensor -> Stability's.

    Args:
        layers: residual layers of a block.
        attention: whether each block on the way up has attention.
    """
    fixed = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
    place, _, kind = key.rpartition(".")
    if place in fixed:
        return f"{fixed[place]}.{kind}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
        direction, block, module, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        position = 1 + block * (layers + 1) + index if direction == "down" else block * (layers + 1) + index
        start = f"{'input' if direction == 'down' else 'output'}_blocks.{position}"
        return f"{start}.1.{rest}" if module == "attentions" else f"{start}.0.{_resnet(rest)}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{_resnet(match[3])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", key):
        return f"input_blocks.{(int(match[1]) + 1) * (layers + 1)}.0.op.{match[2]}"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", key):
        block = int(match[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attention[block] else 1}.conv.{match[2]}"
    raise WeightsError(f"the UNet has a key that the single file cannot hold: {key}")


def _resnet(rest: str) -> str:
    place, _, kind = rest.rpartition(".")
    return f"{RESNET[place]}.{kind}"


def vae_name(key: str, blocks: int) -> str:
    """diffusers' name of a VAE tensor -> Stability's, for `blocks` levels."""
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
    key = key.replace("mid_block.attentions.0", "mid.attn_1")
    for new, old in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        key = key.replace(f"attn_1.{new}.", f"attn_1.{old}.")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key)


def text_tensor(key: str, state: Mapping[str, Tensor], prefix: str) -> Tensor:
    """The tensor of a transformers name, from OpenCLIP's, which has queries, keys and values in one.

    Raises:
        KeyError: the file has none.
    """
    fixed = {"embeddings.token_embedding.weight": "token_embedding.weight",
             "embeddings.position_embedding.weight": "positional_embedding",
             "final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}  # fmt: skip
    if key in fixed:
        return state[prefix + fixed[key]]
    match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key)
    assert match is not None, key
    block, place, kind = f"{prefix}transformer.resblocks.{match[1]}", match[2], match[3]
    if place in LAYER:
        return state[f"{block}.{LAYER[place]}.{kind}"]
    index = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj").index(place)
    return state[f"{block}.attn.in_proj_{kind}"].chunk(3)[index]


def networks(state: Mapping[str, Tensor]) -> dict[str, State]:
    """UNet, VAE and text encoder under the names of diffusers and transformers.

    Args:
        state: every tensor of the file.

    Raises:
        WeightsError: it is not SD-Turbo; the message has the first key that is missing.
    """
    prefix = next((prefix for prefix in TEXT if prefix + "ln_final.weight" in state), "")
    attention = tuple("CrossAttn" in kind for kind in CONFIGS["unet"]["up_block_types"])
    layers, levels = CONFIGS["unet"]["layers_per_block"], len(CONFIGS["vae"]["block_out_channels"])
    try:
        unet = {key: state[UNET + unet_name(key, layers, attention)] for key in unet_keys()}
        vae = {key: _matrix(state[VAE + vae_name(key, levels)], key) for key in shapes("vae")}
        text = {f"text_model.{key}": text_tensor(key, state, prefix) for key in shapes("text_encoder")}
    except KeyError as error:
        raise WeightsError(
            f"sd_turbo.safetensors has no {error}: it is not SD-Turbo; name another file with "
            "./scripts/weights --source sd-turbo=FOLDER"
        ) from None
    return {"unet": unet, "vae": vae, "text_encoder": text}


def _matrix(value: Tensor, key: str) -> Tensor:
    """1x1 convolutions of the VAE's attention as matrices."""
    return value.flatten(1) if ".attentions.0.to_" in key and value.ndim == 4 else value


def shapes(name: str) -> dict[str, torch.Size]:
    """The shapes of the tensors of one of our networks, by their keys."""
    config = {key: value for key, value in CONFIGS[name].items() if not key.startswith("_")}
    with torch.device("meta"):
        return {key: value.shape for key, value in NETWORKS[name](**config).state_dict().items()}


def unet_keys() -> Iterable[str]:
    """diffusers' keys of the UNet: ours without the image attentions."""
    for key in shapes("unet"):
        if not re.search(r"attentions\.\d+\.image\.", key):
            yield re.sub(r"(attentions\.\d+)\.text\.", r"\1.", key)
