"""SD-Turbo as one file: its configs, which the file does not have, at their full size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from published import GOLDEN
from torch import nn

from seesr.checkpoints import convert, single_file, sources


def file_size(shapes: dict[str, tuple[int, ...]]) -> int:
    """Bytes of a safetensors file of these tensors in half precision."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for key, shape in sorted(shapes.items()):
        end = place + torch.half.itemsize * math.prod(shape)
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [place, end]}
        place = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + math.ceil(length / 8) * 8 + place


def test_the_configs_are_those_of_the_reference() -> None:
    reference = json.loads((GOLDEN / "full/case.json").read_text())["configs"]
    reference["scheduler"] = json.loads((GOLDEN / "tiny_bundle/scheduler/scheduler_config.json").read_text())
    configs = {name: single_file.CONFIGS[name] for name in ("unet", "vae")}
    configs["scheduler"] = convert.scheduler(Path("nowhere"))  # type: ignore[assignment]
    for name, config in configs.items():
        for key, value in config.items():
            assert value == reference[name].get(key, value), (name, key)
        assert len(config.keys() - reference[name].keys()) <= 1  # _class_name


def test_the_text_encoder_has_the_size_of_the_published_file() -> None:
    config = single_file.CONFIGS["text_encoder"]
    shapes = {f"text_model.{key}": tuple(shape) for key, shape in single_file.shapes("text_encoder").items()}
    assert file_size(shapes) == sources.published()["sd-turbo/text_encoder/model.fp16.safetensors"]["bytes"]
    assert config["hidden_size"] == 64 * config["num_attention_heads"]  # as in all of OpenCLIP's models
    assert config["layer_norm_eps"] == nn.LayerNorm(1).eps
