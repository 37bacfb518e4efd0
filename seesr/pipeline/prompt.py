"""Prompt composition and encoding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seesr.networks.text_encoder import ClipTokenizer, TextEncoder
from seesr.runtime.memory import Budget
from seesr.runtime.precision import check_finite, retry_in_float32


def compose(tags: list[str], user_prompt: str, positive_prompt: str) -> str:
    """SeeSR's prompt: tags, user prompt, quality words (no space after the last comma)."""
    return f"{', '.join(tags)}, {user_prompt},{positive_prompt}"


class Prompt(NamedTuple):
    """The prompt of the text encoder, and what did not fit.

    Attributes:
        text: the prompt.
        tags: those that are in it.
        left_out: tags that did not fit.
        cut: words at its end that did not fit; none of them has any effect.
    """

    text: str
    tags: list[str]
    left_out: list[str]
    cut: str


def fit(tokenizer: ClipTokenizer, tags: list[str], user_prompt: str, positive_prompt: str) -> Prompt:
    """The prompt with as many of the first tags as leave room for the user's and the quality words.

    The reference cuts the end of a long prompt instead, and with it what the user wrote.
    """
    limit = tokenizer.model_max_length
    for count in range(len(tags), -1, -1):
        text = compose(tags[:count], user_prompt, positive_prompt)
        ids = tokenizer.encode(text)
        if len(ids) <= limit or count == 0:
            cut = tokenizer.decode(ids[limit - 1 : -1]) if len(ids) > limit else ""
            return Prompt(text, tags[:count], tags[count:], cut)
    raise AssertionError


@torch.no_grad()
def encode(encoder: TextEncoder, tokenizer: ClipTokenizer, prompts: list[str], budget: Budget) -> Tensor:
    """Prompts -> tokens [B, 77, width].

    Raises:
        NotFinite: in single precision too.
    """
    ids = tokenizer.encode_batch(prompts).to(encoder.device)

    def work() -> Tensor:
        tokens = encoder.hidden(ids)
        check_finite(tokens, "text")
        return tokens

    return retry_in_float32(work, budget, encoder)
