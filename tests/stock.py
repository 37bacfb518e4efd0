"""diffusers', transformers' and timm's classes on the same configs and weights, to compare ours with."""

from __future__ import annotations

from typing import Any

from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn


class TextThenImage(nn.Module):
    """diffusers' text transformer, and a second one for the image tokens after it."""

    def __init__(self, text: Transformer2DModel, image_width: int) -> None:
        super().__init__()
        self.text = text
        names = ("num_attention_heads", "attention_head_dim", "in_channels", "norm_num_groups")
        self.image = Transformer2DModel(
            **{name: text.config[name] for name in names}, cross_attention_dim=image_width, use_linear_projection=True
        )

    def forward(self, x: Tensor, encoder_hidden_states: tuple[Tensor, Tensor], **options: Any) -> tuple[Tensor]:
        text, image = encoder_hidden_states
        x = self.text(x, encoder_hidden_states=text, **options)[0]
        return (self.image(x, encoder_hidden_states=image, return_dict=False)[0],)


def diffusion_network(cls: type[UNet2DConditionModel | ControlNetModel], config: dict[str, Any]) -> Any:
    """A UNet or ControlNet of diffusers with SeeSR's second transformers put into it."""
    config = dict(config)
    width = config.pop("image_cross_attention_dim", 512)
    network = cls(**config)
    for block in (*network.down_blocks, network.mid_block, *getattr(network, "up_blocks", [])):
        attentions = getattr(block, "attentions", None) or []
        for index, text in enumerate(attentions):
            attentions[index] = TextThenImage(text, width)
    return network.eval()
