"""Helpers for tests: tiny networks of the real classes with random weights, written as a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from seesr.networks import models, weights
from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.tagger import Tagger
from seesr.networks.text_encoder import TextEncoder
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel

BLOCKS = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 2),
    "cross_attention_dim": 16,
    "use_linear_projection": True,
    "image_cross_attention_dim": 24,
}
UNET = {
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    **BLOCKS,
}
CONTROLNET = {
    "down_block_types": UNET["down_block_types"],
    "conditioning_embedding_out_channels": (8, 16, 16, 16),
    **BLOCKS,
}
KL = {
    "block_out_channels": (16, 16, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.5,
}
TEXT = {
    "vocab_size": 1000,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TAGGER = {
    "image_size": 96,
    "swin": {"patch_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 12},
    "token_width": 24,
    "label_width": 12,
    "head": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
}
TAGS = {"tags": ["cat", "dog", "sky", "tree"], "thresholds": [0.5, 0.5, 0.5, 0.5]}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "timestep_spacing": "trailing",
}


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Non-zero values everywhere, so that zero-initialised convolutions do not hide a missing branch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.parameters():
            spread = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            value.add_(torch.randn(value.shape, generator=generator) * spread)
    return network


def write(folder: Path, config: dict, network: nn.Module, name: str = models.DIFFUSION_FILE) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / name)


def build(path: Path) -> Path:
    """Writes a whole bundle to `path`."""
    torch.manual_seed(0)
    write(path / "unet", UNET, randomise(UNet2DConditionModel(**UNET), 1))
    write(path / "controlnet", CONTROLNET, randomise(ControlNetModel(**CONTROLNET), 2))
    vae_config = {**KL, "_class_name": "AutoencoderKL"}
    write(path / "vae", vae_config, randomise(AutoencoderKL(**KL), 3))
    text = randomise(TextEncoder(**TEXT), 4)
    write(path / "text_encoder", TEXT, text, "model.safetensors")
    tagger = randomise(Tagger(**TAGGER, **TAGS), 5)
    write(path / "tagger", TAGGER, tagger, "model.safetensors")
    (path / "tagger/tags.json").write_text(json.dumps(TAGS))
    (path / "scheduler").mkdir()
    (path / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER))
    shutil.copytree(weights.POCKET / "tokenizer", path / "tokenizer")
    weights.write_manifest(path, "tiny", "test", "none")
    return path
