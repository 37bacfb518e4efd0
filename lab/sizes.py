"""The full-size networks with generated weights, for benchmarks and tests without the public weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seesr.networks import models, weights
from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.schedule import NoiseSchedule
from seesr.networks.tagger import Tagger
from seesr.networks.text_encoder import ClipTokenizer, TextEncoder
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel

BLOCKS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
UNET = {"sample_size": 64, **BLOCKS}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
TAGGER = {
    "image_size": 384,
    "swin": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "window_size": 12},
    "token_width": 512,
    "label_width": 512,
    "head": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 4},
}
TAGS = 4585


def filled(build: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A network built on the meta device with weights of the usual size: matrices 1/sqrt(fan-in), norms 1, biases 0."""
    with torch.device("meta"):
        network: nn.Module = build()
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for key, value in network.state_dict().items():
        if value.ndim == 1:
            state[key] = torch.full(value.shape, float(key.endswith("weight")), device=device, dtype=dtype)
        else:
            tensor = torch.empty(value.shape, device=device, dtype=dtype)
            state[key] = tensor.normal_(0, max(1, value[0].numel()) ** -0.5, generator=generator)
    return models.fill(network, state, Path("made-up weights"))


def build(
    device: torch.device, dtype: torch.dtype, filled: Callable[[Any, int, torch.device, torch.dtype], Any] = filled
) -> models.Models:
    """All networks of the full bundle. The tokenizer and the noise schedule's file come from the pocket bundle."""
    target = (device, dtype)
    tags = {"tags": [str(n) for n in range(TAGS)], "thresholds": [0.9999] * TAGS}
    schedule = models.read_config(weights.POCKET / "scheduler", "scheduler_config.json")
    schedule |= {"beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
    return models.Models(
        bundle=weights.Bundle(Path(), "made-up", "full", "none", {}, weights.DEFAULTS["full"]),
        unet=filled(lambda: UNet2DConditionModel(**UNET), 1, *target),
        controlnet=filled(lambda: ControlNetModel(**BLOCKS), 2, *target),
        vae=filled(lambda: AutoencoderKL(**VAE), 3, *target),
        text_encoder=filled(lambda: TextEncoder(**TEXT), 4, *target),
        tokenizer=ClipTokenizer(weights.POCKET / "tokenizer"),
        scheduler=NoiseSchedule(schedule),
        tagger=filled(lambda: Tagger(**TAGGER, **tags), 5, *target),
        device=device,
        dtype=dtype,
    )
