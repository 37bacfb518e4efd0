"""Converts public checkpoints to one full bundle: the only module that knows foreign key names or reads .pth files."""

from __future__ import annotations

import collections
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from seesr.checkpoints import single_file, sources
from seesr.networks import models, weights
from seesr.networks.weights import WeightsError

log = logging.getLogger(__name__)
State = dict[str, Tensor]
LORA_RANK = 8  # alpha is 1, so merged updates are scaled by 1/8
USED = (
    "visual_encoder",
    "tagging_head",
    "image_proj",
    "wordvec_proj",
    "fc",
    "label_embed",
)  # first words of RAM's keys
TOKENIZER = {  # Stable Diffusion 2 pads with "!"
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": 77,
    "pad_token": "!",
    "unk_token": "<|endoftext|>",
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
}
UNUSED = ("tag_encoder.", "text_decoder.")  # parts of RAM that tagging does not run
PATCH, WINDOW, HEAD_HEADS = 4, 12, 4  # of RAM's Swin and tagging head: sizes that no tensor's shape contains
IMAGE_SIZE, HEAD_LAYERS = 384, 2
HEAD_PARTS = {
    "crossattention.self.query": "attention.query",
    "crossattention.self.key": "attention.key",
    "crossattention.self.value": "attention.value",
    "crossattention.output.dense": "attention_out",
    "crossattention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}
VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def diffusion_keys(state: State) -> State:
    """SeeSR's UNet or ControlNet names -> ours: attentions.i -> attentions.i.text, image_attentions.i -> .image."""
    renamed = {}
    for key, value in state.items():
        new = re.sub(r"(?<!\w)attentions\.(\d+)\.", r"attentions.\1.text.", key)
        renamed[re.sub(r"image_attentions\.(\d+)\.", r"attentions.\1.image.", new)] = value
    return renamed


def merge_turbo(turbo: State, seesr: State) -> State:
    """SD-Turbo's whole UNet with SeeSR's image attention; the rest of SeeSR's UNet is not used."""
    image = {key: value for key, value in seesr.items() if "image_attentions" in key}
    if not image:
        raise WeightsError("the SeeSR UNet holds no image_attentions keys; is it a stock UNet?")
    extra = [key for key in turbo if "image_attentions" in key]
    if extra:
        raise WeightsError(f"the SD-Turbo UNet already holds {extra[0]}")
    return turbo | image


def vae_keys(state: State) -> State:
    """Old attention names (query, key, value, proj_attn) -> the present ones; 1x1 convolutions become matrices."""
    renamed = {}
    for key, value in state.items():
        match = re.fullmatch(r"(.*attentions\.0)\.(query|key|value|proj_attn)\.(weight|bias)", key)
        if match:
            place, old, part = match.groups()
            key = f"{place}.{VAE_ATTENTION[old]}.{part}"
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[key] = value
    return renamed


def tagger_keys(state: State) -> State:
    """RAM's names -> ours. Position indices and masks are dropped (they are rebuilt), and parts that never run.

    RAM stores the tagging head as vision_multi; a layer's downsampling belongs to the next layer in timm. Keys with an
    unknown first word are dropped with a warning, as the reference does.

    Raises:
        WeightsError: a key of the tagging head is unknown.
    """
    renamed: State = {}
    unknown: collections.Counter[str] = collections.Counter()
    for key, value in state.items():
        if key.startswith(UNUSED) or key.endswith(("relative_position_index", "attn_mask")):
            continue
        key = key.replace("vision_multi", "tagging_head")
        first = key.partition(".")[0]
        if first not in USED:
            unknown[first] += 1
            continue
        head = re.fullmatch(r"tagging_head\.encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", key)
        if head and head[2] in HEAD_PARTS:
            key = f"tagging_head.{head[1]}.{HEAD_PARTS[head[2]]}.{head[3]}"
        elif first == "tagging_head":
            raise WeightsError(f"RAM holds an unknown key: {key}")
        elif first == "visual_encoder":
            key = re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", key)
        renamed[key] = value
    for first, count in unknown.items():
        log.warning("RAM: %d keys of %s are not known and not used", count, first)
    return renamed


def merge_lora(base: State, lora: State, parts: Iterable[str] = ("visual_encoder", "tagging_head")) -> State:
    """RAM with DAPE's low-rank updates merged in, under RAM's names, float32.

    Swin: queries and values only, of a fused qkv: rows 0:8 of lora_A and the first half of lora_B are for queries.
    Tagging head: query and key.

    Raises:
        WeightsError: an update without its weight or its other half; or updates of RAM's unused tag encoder that are
            not zero although the reference shares those weights with the tagging head.
    """
    base = {key.replace("vision_multi", "tagging_head"): value for key, value in base.items()}
    lora = {key.replace("vision_multi", "tagging_head"): value for key, value in lora.items()}
    merged = dict(base)
    for key, down in lora.items():
        place, _, half = key.rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise WeightsError(f"DAPE holds an unknown key: {key}")
        other = f"{place}.{'lora_B' if half == 'lora_A' else 'lora_A'}"
        if other not in lora:
            raise WeightsError(f"DAPE lacks {other}")
        if half == "lora_B":
            continue
        up = lora[other]
        if key.startswith(UNUSED):
            tied = re.fullmatch(r"tag_encoder\.encoder\.layer\.[01]\.crossattention\.self\.(query|key)\.lora_A", key)
            if tied and up.any():
                raise WeightsError(f"{other} is not zero, although these weights are shared with the tagging head")
            continue
        target = f"{place}.weight"
        if target not in base:
            raise WeightsError(f"DAPE updates {target}, which RAM does not hold")
        if not key.startswith(tuple(parts)):
            continue
        weight, down, up = base[target].float().clone(), down.float(), up.float()
        if key.startswith("visual_encoder.") and place.endswith(".qkv"):
            width = weight.shape[1]
            weight[:width] += up[:width] @ down[:LORA_RANK] / LORA_RANK
            weight[2 * width :] += up[width:] @ down[LORA_RANK:] / LORA_RANK
        elif re.fullmatch(r"tagging_head\.encoder\.layer\.\d+\.crossattention\.self\.(query|key)", place):
            weight += up @ down / LORA_RANK
        else:
            raise WeightsError(f"DAPE updates an unexpected tensor: {place}")
        merged[target] = weight
    return merged


def read_pickle(path: Path) -> Mapping[str, Any]:
    """A .pth or .bin file, tensors only: code in it is refused, not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise WeightsError(f"{path} is not a file of plain tensors ({type(error).__name__})") from error


def read_safetensors(path: Path) -> State:
    """All tensors of a safetensors file.

    Raises:
        WeightsError: it is damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read ({error})") from error


def read_network(folder: Path) -> State:
    """The weights of a diffusers-style folder: safetensors, half precision if there is a choice, else .bin."""
    for pattern in ("*.fp16.safetensors", "*.safetensors", "*.fp16.bin", "*.bin"):
        for path in sorted(folder.glob(pattern)):
            return read_safetensors(path) if path.suffix == ".safetensors" else dict(read_pickle(path))
    raise WeightsError(f"no weights in {folder}: fetch them with {weights.FETCH}")


def save(state: State, config: dict[str, Any], folder: Path, name: str = models.DIFFUSION_FILE) -> None:
    folder.mkdir(parents=True)
    write_json(config, folder / "config.json")
    half = {key: (value.half() if value.is_floating_point() else value).contiguous() for key, value in state.items()}
    save_file(half, folder / name)
    log.info("%s: %d tensors", folder, len(half))


def write_json(value: Any, path: Path) -> None:
    """Writes a config as every conversion writes it: the bundle's sums depend on its bytes."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tagger_config(base: State) -> dict[str, Any]:
    """Sizes of a RAM tagger, read from its shapes."""
    table = re.compile(r"visual_encoder\.layers\.(?P<level>\d+)\.blocks\.\d+\.attn\.relative_position_bias_table")
    blocks: dict[int, list[int]] = {}  # level -> heads of each block
    for key, value in base.items():
        if match := table.match(key):
            _, heads = value.shape
            blocks.setdefault(int(match["level"]), []).append(heads)
    embed, *_ = base["visual_encoder.patch_embed.proj.weight"].shape
    levels = sorted(blocks)
    swin = {
        "patch_size": PATCH,
        "embed_dim": embed,
        "depths": [len(blocks[level]) for level in levels],
        "num_heads": [max(blocks[level]) for level in levels],
        "window_size": WINDOW,
    }
    prefix = "tagging_head.encoder.layer.0."
    hidden, _ = base[f"{prefix}crossattention.self.query.weight"].shape
    inner, _ = base[f"{prefix}intermediate.dense.weight"].shape
    head = {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": HEAD_LAYERS,
        "num_attention_heads": HEAD_HEADS,
    }
    width, _ = base["image_proj.weight"].shape
    _, label = base["label_embed"].shape
    return {"image_size": IMAGE_SIZE, "swin": swin, "token_width": width, "label_width": label, "head": head}


def convert(source: Path, target: Path, licences: str) -> None:
    """Converts the downloads in `source`, a folder for each part, to a bundle at `target`, whole or not at all.

    Every key and shape is checked. The files are readable for all users (mode 0644).

    Raises:
        WeightsError: something is missing, extra or of the wrong shape; `target` is as it was.
    """
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        write(source, part)
        weights.write_manifest(part, target.name, "full", licences)
        readable(part)
        models.load(part, torch.device("cpu"), torch.float16)  # every key, every shape
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def write(source: Path, part: Path) -> None:
    """Writes all files of the bundle but its manifest."""
    networks = turbo(source / "sd-turbo")
    seesr = source / "seesr"
    unet, config = networks.pop("unet")
    save(diffusion_keys(merge_turbo(unet, read_network(seesr / "unet"))), config, part / "unet")
    del unet
    save(diffusion_keys(read_network(seesr / "controlnet")), config_of(seesr / "controlnet"), part / "controlnet")
    vae, config = networks.pop("vae")
    save(vae_keys(vae), config, part / "vae")
    text, config = networks.pop("text_encoder")
    text.pop("text_model.embeddings.position_ids", None)
    save(text, config, part / "text_encoder", "model.safetensors")
    (part / "scheduler").mkdir()
    write_json(scheduler(source / "sd-turbo"), part / "scheduler/scheduler_config.json")
    shutil.copytree(source / "tokenizer", part / "tokenizer", ignore=shutil.ignore_patterns("*.part"))
    write_json(TOKENIZER, part / "tokenizer/tokenizer_config.json")
    path = source / "ram/ram_swin_large_14m.pth"
    checkpoint = read_pickle(path)
    if "model" not in checkpoint:
        raise WeightsError(f'{path} has no entry "model": it is not RAM\'s checkpoint')
    merged = merge_lora(dict(checkpoint["model"]), dict(read_pickle(source / "dape/DAPE.pth")))
    try:
        config = tagger_config(merged)
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error}: it is not RAM's checkpoint with Swin-L") from None
    save(tagger_keys(merged), config, part / "tagger", "model.safetensors")
    lists = source / "tags"
    tags, thresholds = lines(lists / "ram_tag_list.txt"), lines(lists / "ram_tag_list_threshold.txt")
    if not len(tags) == len(thresholds) == len(merged["label_embed"]):
        raise WeightsError(
            f"{len(tags)} tags, {len(thresholds)} thresholds, {len(merged['label_embed'])} label embeddings"
        )
    (part / "tagger/tags.json").write_text(
        json.dumps({"tags": tags, "thresholds": [float(x) for x in thresholds]}) + "\n"
    )


def turbo(folder: Path) -> dict[str, tuple[State, dict[str, Any]]]:
    """SD-Turbo's UNet, VAE and text encoder with their configs, from folders or from the single file."""
    if (folder / "unet").exists():
        names = ("unet", "vae", "text_encoder")
        return {name: (read_network(folder / name), config_of(folder / name)) for name in names}
    named = single_file.networks(read_safetensors(folder / sources.SINGLE_FILE))
    return {name: (state, single_file.CONFIGS[name]) for name, state in named.items()}


def scheduler(folder: Path) -> Mapping[str, Any]:
    """The config of SD-Turbo's noise schedule."""
    path = folder / "scheduler/scheduler_config.json"
    return json.loads(path.read_text()) if path.exists() else single_file.CONFIGS["scheduler"]


def readable(folder: Path) -> None:
    """Makes files readable for all users; safetensors writes them for its own user."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def listing(bundle: Path) -> Iterable[str]:
    """One line per tensor: file, key, shape, dtype."""
    for path in sorted(bundle.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in sorted(file.keys()):
                view = file.get_slice(key)
                yield f"{path.relative_to(bundle)} {key} {view.get_shape()} {view.get_dtype()}"
