from __future__ import annotations

import dataclasses

import pytest

from seesr import Settings
from seesr.settings import LARGEST_OUTPUT


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("scale_factor", 0.5, "from 1 to 8"),
        ("scale_factor", float("nan"), "must be a float"),
        ("scale_factor", "4", "must be a float"),
        ("num_inference_steps", 9, "from 1 to 8"),
        ("num_inference_steps", 2.5, "must be an int"),
        ("num_inference_steps", True, "must be an int"),
        ("cfg_scale", 2.1, "from 1 to 2"),
        ("color_fix", "lab", "wavelet, adain, none"),
        ("output_format", "gif", "png, webp, jpg"),
        ("output_quality", 0, "from 1 to 100"),
        ("seed", -1, "from 0 to 4294967295"),
        ("seed", 2**32, "from 0 to 4294967295"),
        ("user_prompt", "x" * 2001, "at most 2000"),
        ("user_prompt", "a\0b", "NUL"),
        ("user_prompt", "\ud800", "surrogate"),
        ("user_prompt", 3, "must be a str"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_and_limit(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Settings(**{field: value})
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_whole_floats_are_good_integers() -> None:
    assert Settings(seed=1.0).seed == 1  # JSON clients send 1.0
    assert isinstance(Settings(seed=1.0).seed, int)
    assert isinstance(Settings(scale_factor=2).scale_factor, float)


def test_every_field_describes_itself() -> None:
    for field in dataclasses.fields(Settings):
        assert field.metadata["description"].endswith(".")


@pytest.mark.parametrize(
    ("size", "scale", "expected"), [((1, 1), 1, (1, 1)), ((101, 67), 1.5, (152, 100)), ((3, 5), 2.5, (8, 12))]
)
def test_output_size_is_rounded(size: tuple[int, int], scale: float, expected: tuple[int, int]) -> None:
    assert Settings(scale_factor=scale).output_size(*size) == expected


def test_too_large_a_result_is_refused_with_the_largest_scale_that_fits() -> None:
    with pytest.raises(
        ValueError, match=r"asks for 216.0 MP; the limit is 67.1 MP; the largest scale .* 3.34"
    ) as caught:
        Settings(scale_factor=6).output_size(3000, 2000)
    largest = float(str(caught.value).split()[-1])
    width, height = Settings(scale_factor=largest).output_size(3000, 2000)
    assert width * height <= LARGEST_OUTPUT


def test_too_large_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="the limit is 67.1 MP"):
        Settings(scale_factor=1).output_size(9000, 9000)
