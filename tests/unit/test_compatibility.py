"""Inputs of other SeeSR containers: a one-line error for each difference, and the page that lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from seesr.settings.parsing import settings_of

UPSTREAM = {  # the defaults of cswry/SeeSR's predict.py
    "user_prompt": "",
    "positive_prompt": "clean, high-resolution, 8k",
    "negative_prompt": "dotted, noise, blur, lowres, smooth",
    "cfg_scale": 5.5,
    "num_inference_steps": 50,
    "sample_times": 1,
    "latent_tiled_size": 320,
    "latent_tiled_overlap": 4,
    "scale_factor": 4,
    "seed": 231,
}


def test_a_foreign_request_gets_one_line_that_names_each_difference() -> None:
    with pytest.raises(ValueError) as error:
        settings_of(UPSTREAM)
    assert str(error.value) == (
        "there is no input 'sample_times'; send one request for each sample, with its own seed; "
        "num_inference_steps is 50; it must be from 1 to 8; cfg_scale is 5.5; it must be from 1 to 2"
    )


def test_upstream_inputs_with_the_same_meaning_are_accepted() -> None:
    remaining = {name: value for name, value in UPSTREAM.items() if name not in ("cfg_scale", "sample_times")}
    settings = settings_of(remaining | {"num_inference_steps": 4})
    assert (settings.latent_tiled_size, settings.latent_tiled_overlap, settings.seed) == (320, 4, 231)


def test_the_page_lists_every_input() -> None:
    page = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
    assert [name for name in UPSTREAM if f"`{name}`" not in page] == []
