"""SeeSR's image cross-attention, wrapped from outside around stock diffusers networks.

SeeSR (Wu et al., CVPR 2024) places beside every text transformer of the UNet and the ControlNet a second, complete
transformer that looks at the tagger's image tokens. Both run one after the other, text first.
"""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


class TextThenImage(nn.Module):
    """A text transformer and an image transformer in a row.

    Takes `encoder_hidden_states=(text, image)`, [B, tokens, width] each; diffusers passes the pair through untouched.
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

    def forward(self, hidden: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor]:
        """[B, C, H, W] -> ([B, C, H, W],)."""
        text, image = encoder_hidden_states
        hidden = self.text(hidden, encoder_hidden_states=text, **options)[0]
        return (self.image(hidden, encoder_hidden_states=image, return_dict=False)[0],)


def add_image_attention(model: UNet2DConditionModel | ControlNetModel, image_width: int) -> None:
    """Replaces every text transformer by a TextThenImage pair, in place."""
    blocks = [*model.down_blocks, model.mid_block, *getattr(model, "up_blocks", [])]
    for block in blocks:
        attentions = getattr(block, "attentions", None) or []
        for index, text in enumerate(attentions):
            attentions[index] = TextThenImage(text, image_width)
