"""Quotes from rates that are given, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seesr.engine import quote
from seesr.engine.quote import make_quote, quote_unloaded, size_of
from seesr.engine.rates import Quote
from seesr.pipeline.work import Outline
from seesr.settings import Settings

OUTLINE = Outline(4, 2, 64, 1, (64, 72), 24, 512, 512)
SETTINGS = Settings(scale_factor=2, num_inference_steps=1)


def rates(seconds: float | None = 1.23456) -> Any:
    return SimpleNamespace(
        seconds=lambda terms: seconds,
        margin=1.5,
        length=lambda suffix, megapixels: 100,
        peak=lambda megapixels: {"host": round(megapixels * 1e6)},
        images=4,
        outline=OUTLINE,
    )


def test_a_quote_is_rounded() -> None:
    result = make_quote(OUTLINE, rates(), SETTINGS, (30, 40), 36.0)
    assert result == Quote("60x80", result.tiles, 1.235, 1.852, 100, {"host": 4800}, 0.012346, 4)
    assert result.tiles > 0


def test_a_quote_without_a_price_or_a_measured_image() -> None:
    assert make_quote(OUTLINE, rates(), SETTINGS, (30, 40), None).price is None
    unknown = make_quote(OUTLINE, rates(None), SETTINGS, (30, 40), 36.0)
    assert unknown.seconds is unknown.seconds_at_most is unknown.price is None


def test_stages_that_are_there_already_cost_nothing() -> None:
    asked: list[Any] = []
    known = rates()
    known.seconds = lambda terms: asked.append(terms) or 1.0
    assert make_quote(OUTLINE, known, SETTINGS, (30, 40), None, {"denoise", "tags"}).tiles == 0
    assert make_quote(OUTLINE, known, SETTINGS, (30, 40), None, {"tags"}).tiles > 0
    assert asked[1].keys() - asked[0].keys() == {"denoise"} and "tags" not in asked[1]


def test_the_size_of_every_kind_of_source() -> None:
    for shape in ((30, 40), (30, 40, 3)):
        assert size_of(np.zeros(shape, np.uint8)) == (40, 30)
    assert size_of(Image.new("RGB", (40, 30))) == (40, 30)


@pytest.mark.parametrize(("device", "asked"), [("cuda", "cuda"), (None, "cpu")])
def test_a_quote_without_the_weights_is_for_the_device_of_the_caller_or_the_environment(
    device: str | None, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEESR_DEVICE", "cpu")
    monkeypatch.setenv("SEESR_PRICE_PER_HOUR", "36")
    known: list[Any] = [None, SimpleNamespace(outline=None), rates()]
    monkeypatch.setattr(quote, "latest_rates", lambda digest, name: known.pop(0) if name == asked else None)
    results = [quote_unloaded("digest", device, SETTINGS, (30, 40)) for _ in range(3)]
    assert results[:2] == [None, None] and results[2] is not None and results[2].price == 0.012346
