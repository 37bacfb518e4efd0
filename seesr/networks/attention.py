"""SeeSR's image cross-attention, wrapped from outside around stock diffusers networks.

SeeSR (Wu et al., CVPR 2024) places beside every text transformer of the UNet and the ControlNet a second, complete
transformer that looks at the tagger's image tokens. Both run one after the other, text first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


class Tokens:
    """Context tokens of one picture, [B, n, width], and the keys and values that every cross-attention makes of them.

    They are the same for all tiles, steps and particles, so each is computed once. B is 1, or 2 with guidance.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.made: dict[Attention, tuple[Tensor, Tensor]] = {}

    def keys_values(self, attention: Attention, batch: int) -> tuple[Tensor, Tensor]:
        """For a batch that holds B groups of equal size: [batch, heads, n, head width] each."""
        if attention not in self.made:
            self.made[attention] = project(attention, self.values)
        keys, values = self.made[attention]
        if len(keys) == 1:
            return keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1)
        times = batch // len(keys)
        return keys.repeat_interleave(times, 0), values.repeat_interleave(times, 0)

    def become(self, others: Tokens) -> None:
        """Takes the values of another picture's tokens into the same memory, and what was made of them."""
        self.values.copy_(others.values)
        for attention, made in self.made.items():
            if attention not in others.made:
                others.made[attention] = project(attention, others.values)
            for mine, new in zip(made, others.made[attention], strict=True):
                mine.copy_(new)


def project(attention: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [B, n, width] -> keys and values [B, heads, n, head width]."""
    to_key, to_value = attention.to_k, attention.to_v
    assert to_key is not None and to_value is not None
    both = (to_key(tokens), to_value(tokens))
    keys, values = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in both)
    return keys, values


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values [B, heads, n, d] -> [B, heads, n, d]


class Attend:
    """A diffusers attention processor that takes Tokens, or a plain tensor as in training, or looks at itself."""

    kernel: Kernel = staticmethod(F.scaled_dot_product_attention)

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tokens | Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None
        queries = attn.to_q(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2)
        if isinstance(encoder_hidden_states, Tokens):
            keys, values = encoder_hidden_states.keys_values(attn, len(hidden_states))
        else:
            keys, values = project(attn, hidden_states if encoder_hidden_states is None else encoder_hidden_states)
        attended = self.kernel(queries, keys, values)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))  # type: ignore[index]


class HintEmbedding(ControlNetConditioningEmbedding):
    """Takes the hint, or its features where they are at hand already; the channels tell which."""

    def forward(self, conditioning: Tensor) -> Tensor:
        """[B, 3, f*h, f*w] -> [B, C, h, w]; [B, C, h, w] passes."""
        return super().forward(conditioning) if conditioning.shape[1] == self.conv_in.in_channels else conditioning


class TextThenImage(nn.Module):
    """A text transformer and an image transformer in a row.

    Takes `encoder_hidden_states=(text, image)`, Tokens or tensors [B, n, width]; diffusers passes the pair through
    untouched.
    """

    def __init__(self, text: Transformer2DModel, image_width: int) -> None:
        super().__init__()
        self.text = text
        config = text.config
        # Heads and head width explicitly: from_config of the text transformer would fall back to 16 heads of 88.
        self.image = Transformer2DModel(
            num_attention_heads=config["num_attention_heads"],
            attention_head_dim=config["attention_head_dim"],
            in_channels=config["in_channels"],
            norm_num_groups=config["norm_num_groups"],
            cross_attention_dim=image_width,
            use_linear_projection=True,
        )
        for transformer in (self.text, self.image):
            for block in transformer.transformer_blocks:
                block.attn1.set_processor(Attend())  # type: ignore[union-attr]
                block.attn2.set_processor(Attend())  # type: ignore[union-attr]

    def forward(self, hidden: Tensor, encoder_hidden_states: tuple[Any, Any], **options: Any) -> tuple[Tensor]:
        """[B, C, H, W] -> ([B, C, H, W],)."""
        text, image = encoder_hidden_states
        hidden = self.text(hidden, encoder_hidden_states=text, **options)[0]
        return (self.image(hidden, encoder_hidden_states=image, return_dict=False)[0],)


def set_kernel(network: nn.Module, kernel: Kernel) -> None:
    """Has every attention of a UNet or ControlNet computed by `kernel`."""
    for module in network.modules():
        if isinstance(module, Attention):
            module.processor.kernel = kernel  # type: ignore[union-attr]


def add_image_attention(model: UNet2DConditionModel | ControlNetModel, image_width: int) -> None:
    """Replaces every text transformer by a TextThenImage pair, and a ControlNet's hint embedding by ours, in place."""
    blocks = [*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", [])]
    for block in blocks:
        attentions = getattr(block, "attentions", None) or []
        for index, text in enumerate(attentions):
            attentions[index] = TextThenImage(text, image_width)
    if isinstance(model, ControlNetModel):
        config = model.config
        model.controlnet_cond_embedding = HintEmbedding(
            config["block_out_channels"][0],
            config["conditioning_channels"],
            config["conditioning_embedding_out_channels"],
        )
