"""Settings and images from JSON, query strings and forms; views and presets that settings name."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from seesr import Settings
from seesr.settings.parsing import from_data_uri, mask_of, settings_of
from seesr.settings.presets import PRESETS
from seesr.settings.validation import FieldError

DATA = bytes(range(250, 256)) + b"\xfb\xff~"  # whose base64 has both letters that the URL-safe alphabet replaces


@pytest.mark.parametrize(
    ("value", "expected"),
    [("true", True), ("ON", True), ("1", True), ("false", False), ("Off", False), ("0", False), (True, True)],
)
def test_words_for_yes_and_no(value: Any, expected: bool) -> None:
    assert settings_of({"use_kds": value}).use_kds is expected
    assert settings_of({"keep_exif": value}).keep_exif is expected


@pytest.mark.parametrize("value", ["yes", "2", "none"])
def test_other_words_are_no_booleans(value: str) -> None:
    with pytest.raises(FieldError, match=f"use_kds is '{value}'; it must be a bool"):
        settings_of({"use_kds": value})


@pytest.mark.parametrize("empty", ["", None])
def test_empty_fields_have_their_defaults(empty: str | None) -> None:
    names = ("scale_factor", "seed", "use_kds", "output_format", "color_fix", "num_inference_steps")
    assert settings_of(dict.fromkeys(names, empty)) == Settings()
    prompts = settings_of({"positive_prompt": empty, "user_prompt": empty})
    assert prompts.positive_prompt == ("" if empty == "" else Settings().positive_prompt)


def test_numbers_in_words_are_numbers() -> None:
    settings = settings_of({"scale_factor": "2.5", "seed": "7", "user_prompt": "7", "mask": "x"}, frozenset({"mask"}))
    assert (settings.scale_factor, settings.seed, settings.user_prompt) == (2.5, 7, "7")
    with pytest.raises(FieldError, match="seed is 'seven'; it must be an int"):
        settings_of({"seed": "seven"})


def test_every_problem_is_named_with_the_first_field() -> None:
    inputs = {
        "sample_times": 2,
        "fidelity": 3,
        "a": 1,
        "b": 1,
        "c": 1,
        "d": 1,
        "e" * 99: 1,
        "f": 1,
        "output_quality": 0,
    }
    with pytest.raises(FieldError) as caught:
        settings_of(inputs)
    message = str(caught.value)
    assert message.startswith("there is no input 'sample_times'; send one request for each sample, with its own seed; ")
    assert f"there is no input 'a', 'b', 'c', 'd', '{'e' * 60}'; there are image, scale_factor" in message
    assert "'f'" not in message and "fidelity is 3" in message and "output_quality is 0" in message
    assert caught.value.field == "sample_times"
    with pytest.raises(FieldError) as caught:
        settings_of({"z" * 99: 1})
    assert caught.value.field == "z" * 60


@pytest.mark.parametrize(
    "uri",
    [
        base64.b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        "data:image/png;base64," + base64.b64encode(DATA).decode(),
        " DATA:;charset=x; BASE64 ," + base64.b64encode(DATA).decode().replace("/", "%2F"),
        "data:;base64,\n" + "\n ".join(base64.b64encode(DATA).decode()),
        "data:image/png," + "".join(f"%{value:02x}" for value in DATA),
    ],
)
def test_forms_of_a_data_uri(uri: str) -> None:
    assert from_data_uri(uri) == DATA and mask_of({"mask": uri}) == DATA


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_missing_padding(padding: int) -> None:
    data = bytes(6 - padding)
    assert from_data_uri(base64.b64encode(data).decode().rstrip("=")) == data


@pytest.mark.parametrize(
    ("uri", "message"),
    [("data:image/png;base64", "the data URI has no data"), ("a!b", "not valid base64"), ("abcde", "not valid base64"),
     ("data:;base64,a\u00e9", "not valid base64")],
)  # fmt: skip
def test_what_is_no_image_in_base64(uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_data_uri(uri)


def test_a_mask_is_optional_text() -> None:
    assert mask_of({}) is mask_of({"mask": None}) is mask_of({"mask": ""}) is None
    with pytest.raises(ValueError, match="mask must be base64 or a data URI"):
        mask_of({"mask": 3})


def test_presets_are_settings_that_differ() -> None:
    settings = {name: Settings(**values) for name, values in PRESETS.items()}
    assert len({*settings.values()}) == len(settings) == 3
    assert settings["balanced"] == Settings() and settings["fast"].num_inference_steps == 1
    assert 0 < settings["careful"].fidelity < 0.5
