"""Miniatures of the public checkpoints: names, wrapping and keys as published, with generated weights.

SEEN says for every file where its place was seen, or that it is an assumption.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from lab.parity import cases
from seesr.checkpoints import sources

GOLDEN = Path(__file__).parent / "data/golden"
TINY = GOLDEN / "tiny_bundle"
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
TURBO, SEESR, OTHER_SEESR = "models/stabilityai/sd-turbo", "models/CSWRY/SeeSR", "models/alexnasa/SEESR"
RAM, RAM_SPACE = "models/xinyu1205/recognize_anything_model", "spaces/xinyu1205/recognize-anything"
FP16 = (
    "a downloader that lists stabilityai/sd-turbo at b261bac6fd2cf515557d5d0707481eafa0485ec2 with sizes and sums of "
    "unet 40ec4008..., text_encoder bc1827c4..., vae 3e4c0899..., vocab.json 1,059,962 and merges.txt 524,619 bytes"
)
SEESR_LIST = "a downloader of baselines with https://huggingface.co/CSWRY/SeeSR/resolve/main/ and this path"
SNAPSHOT = "not listed publicly: assumed like CSWRY/SeeSR, as a predictor takes snapshot_download('alexnasa/SEESR')"
TAGS = "recognize-anything's README and inference code name ram/data; sizes 41,904 and 22,016 bytes on the hub's pages"
SEEN = {
    f"{TURBO}/unet/config.json": FP16,
    f"{TURBO}/unet/diffusion_pytorch_model.fp16.safetensors": FP16,
    f"{TURBO}/vae/config.json": FP16,
    f"{TURBO}/vae/diffusion_pytorch_model.fp16.safetensors": FP16,
    f"{TURBO}/text_encoder/config.json": FP16,
    f"{TURBO}/text_encoder/model.fp16.safetensors": FP16,
    f"{TURBO}/scheduler/scheduler_config.json": FP16,
    f"{TURBO}/tokenizer/vocab.json": FP16,
    f"{TURBO}/tokenizer/merges.txt": FP16,
    "models/openai/clip-vit-large-patch14/vocab.json": "https://huggingface.co/openai/clip-vit-large-patch14",
    "models/openai/clip-vit-large-patch14/merges.txt": "https://huggingface.co/openai/clip-vit-large-patch14",
    f"{SEESR}/DAPE.pth": SEESR_LIST,
    f"{SEESR}/seesr/unet/config.json": SEESR_LIST,
    f"{SEESR}/seesr/unet/diffusion_pytorch_model.safetensors": SEESR_LIST,
    f"{SEESR}/seesr/controlnet/config.json": SEESR_LIST,
    f"{SEESR}/seesr/controlnet/diffusion_pytorch_model.safetensors": SEESR_LIST,
    f"{OTHER_SEESR}/DAPE.pth": "https://huggingface.co/alexnasa/SEESR/resolve/4059ae02.../DAPE.pth in a README",
    f"{OTHER_SEESR}/seesr/unet/config.json": SNAPSHOT,
    f"{OTHER_SEESR}/seesr/unet/diffusion_pytorch_model.safetensors": SNAPSHOT,
    f"{OTHER_SEESR}/seesr/controlnet/config.json": SNAPSHOT,
    f"{OTHER_SEESR}/seesr/controlnet/diffusion_pytorch_model.safetensors": SNAPSHOT,
    f"{RAM}/ram_swin_large_14m.pth": "resolve/main/ram_swin_large_14m.pth of this repository in set-up scripts",
    f"{RAM_SPACE}/ram_swin_large_14m.pth": "spaces/xinyu1205/recognize-anything/resolve/main/ in set-up scripts",
    "github/cswry/SeeSR/ram/data/ram_tag_list.txt": "assumed: as in recognize-anything",
    "github/cswry/SeeSR/ram/data/ram_tag_list_threshold.txt": "as the tag list",
    "github/xinyu1205/recognize-anything/ram/data/ram_tag_list.txt": TAGS,
    "github/xinyu1205/recognize-anything/ram/data/ram_tag_list_threshold.txt": TAGS,
    "models/CannotFindObject/RAM_ONNX/ram_tag_list.txt": "the model card of a copy lists both with sizes and sums",
    "models/CannotFindObject/RAM_ONNX/ram_tag_list_threshold.txt": "the model card of a copy lists both",
}


def old_vae_name(key: str) -> str:
    for new, old in OLD_VAE.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.half() for key, value in state.items()}


def put(path: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
    path.parent.mkdir(parents=True)
    (path.parent / "config.json").write_text(json.dumps(config))
    save_file(state, path)


def publish(root: Path) -> None:
    """Writes the replica's repositories below `root`."""
    pipeline = cases.read_case(GOLDEN / "pipe_plain_s1_g1.0", None)
    merge = cases.read_case(GOLDEN / "unet_turbo_merge", None)
    ram = cases.read_case(GOLDEN / "ram_small", None)
    turbo, seesr = root / TURBO, root / SEESR

    unet = merge.config("unet")
    stock = {key: value for key, value in unet.items() if key != "use_image_cross_attention"}
    stock["_class_name"] = "UNet2DConditionModel"
    put(turbo / "unet/diffusion_pytorch_model.fp16.safetensors", stock, half(merge.state("sd")))
    put(seesr / "seesr/unet/diffusion_pytorch_model.safetensors", unet, merge.state("seesr"))
    control = pipeline.config("controlnet"), pipeline.state("controlnet")
    put(seesr / "seesr/controlnet/diffusion_pytorch_model.safetensors", *control)
    vae = {old_vae_name(key): value for key, value in half(pipeline.state("vae")).items()}
    config = {**pipeline.config("vae"), "_class_name": "AutoencoderKL"}
    put(turbo / "vae/diffusion_pytorch_model.fp16.safetensors", config, vae)
    text = half(pipeline.state("text_encoder"))
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    put(turbo / "text_encoder/model.fp16.safetensors", pipeline.config("text_encoder"), text)
    clip = root / "models/openai/clip-vit-large-patch14"
    for folder in (turbo / "tokenizer", clip):
        folder.mkdir(parents=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(TINY / "tokenizer" / name, folder)
    shutil.copytree(TINY / "scheduler", turbo / "scheduler")
    dape = ram.state("dape")
    for key, value in ram.state("dape_unused").items():
        dape[key] = torch.zeros_like(value) if key.endswith("lora_B") else value
    torch.save(dape, seesr / "DAPE.pth")
    shutil.copytree(seesr, root / OTHER_SEESR)
    base = {key.replace("tagging_head", "vision_multi"): value for key, value in ram.state("base").items()}
    base["visual_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(144, 144, dtype=torch.long)
    base["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 144, 144)
    base["text_decoder.bert.embeddings.position_ids"] = torch.zeros(1, 4)
    for name in (RAM, RAM_SPACE):
        (root / name).mkdir(parents=True)
        torch.save({"model": base}, root / name / "ram_swin_large_14m.pth")
    thresholds = "\n".join(str(x) for x in ram.inputs["class_threshold"].tolist()) + "\n"
    for name in (
        "github/cswry/SeeSR/ram/data",
        "github/xinyu1205/recognize-anything/ram/data",
        "models/CannotFindObject/RAM_ONNX",
    ):
        (root / name).mkdir(parents=True)
        (root / name / "ram_tag_list.txt").write_text("\n".join(ram.options["tags"]))  # no end of the last line
        (root / name / "ram_tag_list_threshold.txt").write_text(thresholds)


def sums(root: Path) -> dict[str, dict[str, str | int]]:
    """What published.json would hold for the miniatures."""
    results: dict[str, dict[str, str | int]] = {}
    for target in sources.published():
        name = target.partition("/")[2]
        for place in (TURBO, SEESR, RAM, "models/CannotFindObject/RAM_ONNX"):
            if (root / place / name).is_file():
                data = (root / place / name).read_bytes()
                results[target] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return results
