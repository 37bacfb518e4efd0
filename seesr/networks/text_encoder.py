"""CLIP's text encoder and tokenizer, as Stable Diffusion uses them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import decoders as token_decoders
from tokenizers.models import BPE
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}
TOKENS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # as in CLIP
SUFFIX = "</w>"  # of the last token of a word


class Attention(nn.Module):
    """Self-attention that looks back only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = Attention(width, config["num_attention_heads"])
        self.mlp = FeedForward(width, config["intermediate_size"], config["hidden_act"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.position_embedding = nn.Embedding(config["max_position_embeddings"], config["hidden_size"])

    def forward(self, ids: Tensor) -> Tensor:
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEncoder(nn.Module):
    """CLIP's text encoder. Weights of transformers' CLIPTextModel load, without the prefix `text_model.`.

    Args:
        config_values: the keys of DEFAULTS that the config has; others have no effect here.
    """

    DEFAULTS: ClassVar = {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    }

    def __init__(self, **config_values: Any) -> None:
        super().__init__()
        config = {key: config_values.get(key, value) for key, value in self.DEFAULTS.items()}
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config["hidden_size"], config["layer_norm_eps"])

    @property
    def device(self) -> torch.device:
        return self.final_layer_norm.weight.device

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, 77] -> [B, 77, width]: the last hidden state after the final LayerNorm, no attention mask."""
        return self.final_layer_norm(self.encoder(self.embeddings(ids)))


class ClipTokenizer:
    """CLIP's byte pair encoding, equal to transformers' CLIPTokenizer.

    Args:
        folder: holds vocab.json, merges.txt and tokenizer_config.json.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        names = {"unk": "<|endoftext|>", "bos": "<|startoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}
        for kind, name in names.items():
            token = config.get(f"{kind}_token") or name
            names[kind] = token["content"] if isinstance(token, dict) else token
        self.model_max_length: int = config["model_max_length"]
        vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        model = BPE(vocabulary, merges, end_of_word_suffix=SUFFIX, unk_token=names["unk"])
        self.tokenizer = Tokenizer(model)
        lower = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        self.tokenizer.normalizer = normalizers.Sequence(lower)  # type: ignore[assignment]
        split = pre_tokenizers.Split(Regex(TOKENS), behavior="removed", invert=True)
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])  # type: ignore[assignment]
        self.tokenizer.decoder = token_decoders.ByteLevel()  # type: ignore[assignment]
        self.tokenizer.add_special_tokens(list(dict.fromkeys(names.values())))
        ids: dict[str, Any] = {kind: self.tokenizer.token_to_id(name) for kind, name in names.items()}
        self.tokenizer.post_processor = processors.RobertaProcessing(  # type: ignore[assignment]
            (names["eos"], ids["eos"]), (names["bos"], ids["bos"]), trim_offsets=False, add_prefix_space=False
        )
        self.end, self.filling = ids["eos"], ids["pad"]

    def encode(self, text: str) -> list[int]:
        """Ids with those of the start and the end, of any length."""
        return self.tokenizer.encode(text).ids

    def encode_batch(self, prompts: list[str]) -> Tensor:
        """Ids [B, 77]: prompts that are too long lose their end, others are filled up."""
        length = self.model_max_length
        rows = []
        for ids in map(self.encode, prompts):
            ids = ids if len(ids) <= length else [*ids[: length - 1], self.end]
            rows.append(ids + [self.filling] * (length - len(ids)))
        return torch.tensor(rows)

    def decode(self, ids: list[int]) -> str:
        """Decodes token ids to text."""
        return self.tokenizer.decode(ids, skip_special_tokens=False).replace(SUFFIX, " ").strip()
