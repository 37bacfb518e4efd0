"""RAM with DAPE (Zhang et al. 2023; Wu et al. 2024): computes tags and image tokens from the input image."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.swin import SwinTransformer

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet


def preprocess(pixels: Tensor, size: int) -> Tensor:
    """[1, 3, H, W] in [0, 1] -> [1, 3, size, size], ImageNet-normalised; the aspect ratio is not kept.

    Bilinear without antialiasing, as RAM was run; antialiasing would change tags of images above `size`.
    """
    pixels = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False)
    mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


class CrossAttention(nn.Module):
    """Tag queries look at image tokens."""

    def __init__(self, width: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(token_width, width)
        self.value = nn.Linear(token_width, width)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(queries), self.key(tokens), self.value(tokens))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class HeadLayer(nn.Module):
    """Cross-attention and feed-forward, each with a residual and a LayerNorm after it (eps 1e-12, as in BERT)."""

    def __init__(self, width: int, inner: int, token_width: int, heads: int) -> None:
        super().__init__()
        self.attention = CrossAttention(width, token_width, heads)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        x = self.attention_norm(self.attention_out(self.attention(queries, tokens)) + queries)
        return self.norm(self.down(F.gelu(self.up(x))) + x)


class Tagger(nn.Module):
    """Swin encoder, image projection and tagging head.

    Args:
        image_size: side of the square input, pixels.
        swin: arguments of SwinTransformer (embed_dim, depths, num_heads, window_size, patch_size).
        token_width: width of the image tokens (512 in the public weights).
        label_width: width of the stored label embeddings.
        head: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads.
        tags: names, in the order of the logits.
        thresholds: per tag; on if sigmoid(logit) is above it.
    """

    def __init__(
        self,
        image_size: int,
        swin: dict[str, Any],
        token_width: int,
        label_width: int,
        head: dict[str, int],
        tags: list[str],
        thresholds: list[float],
    ) -> None:
        super().__init__()
        self.image_size, self.tags, self.thresholds = image_size, tags, thresholds
        self.visual_encoder = SwinTransformer(image_size, **swin)
        self.image_proj = nn.Linear(self.visual_encoder.num_features, token_width)
        self.label_embed = nn.Parameter(torch.zeros(len(tags), label_width))
        self.wordvec_proj = nn.Linear(label_width, head["hidden_size"])
        layer = (head["hidden_size"], head["intermediate_size"], token_width, head["num_attention_heads"])
        self.tagging_head = nn.ModuleList(HeadLayer(*layer) for _ in range(head["num_hidden_layers"]))
        self.fc = nn.Linear(head["hidden_size"], 1)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Output of `preprocess` [B, 3, S, S] -> image tokens [B, 1 + n, token_width]: the mean, then row by row."""
        grid = self.visual_encoder.forward_features(pixels).flatten(1, 2)
        return self.image_proj(torch.cat([grid.mean(1, keepdim=True), grid], dim=1))

    def logits(self, tokens: Tensor) -> Tensor:
        """Image tokens -> one logit per tag, [B, number of tags]."""
        queries = F.relu(self.wordvec_proj(self.label_embed)).expand(len(tokens), -1, -1)
        for layer in self.tagging_head:
            queries = layer(queries, tokens)
        return self.fc(queries).squeeze(-1)

    def names(self, logits: Tensor) -> list[str]:
        """[1, number of tags] -> the tags that are on, in list order."""
        probabilities = logits[0].float().sigmoid().cpu()
        on = probabilities > torch.tensor(self.thresholds)
        return [self.tags[i] for i in on.nonzero().flatten().tolist()]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[list[str], Tensor]:
        """The original small image, [1, 3, H, W] in [0, 1] -> (tags, image tokens [1, 1 + n, token_width])."""
        weight = self.image_proj.weight
        tokens = self.tokens(preprocess(pixels.float(), self.image_size).to(weight))
        return self.names(self.logits(tokens)), tokens
