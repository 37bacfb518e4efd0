"""Settings: limits, parsing, output sizes and errors."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seesr import Settings
from seesr.images.formats import FORMATS
from seesr.images.limits import LARGEST_INPUT, LARGEST_OUTPUT


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scale_factor", 0.5, "from 1 to 8"),
        ("scale_factor", float("nan"), "must be a float"),
        ("scale_factor", "4", "must be a float"),
        ("scale_factor", 10**400, "must be a float"),
        ("seed", 10**400, "must be an int"),
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
        ("user_prompt", "\udfff", "surrogate"),
        ("user_prompt", 3, "must be a str"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_and_limit(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Settings(**{field: value})
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


INTERFACE = {  # what callers rely on: default, least, most (of words: how many characters)
    "scale_factor": (4.0, 1, 8),
    "target_side": (None, 1, 32768),
    "target_megapixels": (None, 0.0001, 67.108864),
    "fidelity": (0.0, 0, 1),
    "user_prompt": ("", 0, 2000),
    "positive_prompt": ("clean, high-resolution, 8k", 0, 2000),
    "negative_prompt": ("dotted, noise, blur, lowres, smooth", 0, 2000),
    "num_inference_steps": (None, 1, 8),
    "cfg_scale": (1.0, 1, 2),
    "latent_tiled_size": (None, 16, 512),
    "latent_tiled_overlap": (6, 0, 128),
    "use_kds": (False, False, True),
    "num_particles": (4, 1, 16),
    "bandwidth": (0.0, 0, 10),
    "color_fix": ("wavelet",),
    "output_view": ("image",),
    "region": (None, 1, 60),
    "output_format": ("png",),
    "output_quality": (95, 1, 100),
    "keep_exif": (True, False, True),
    "dpi": (None, 1, 9600),
    "seed": (None, 0, 2**32 - 1),
}


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_defaults_and_both_ends_are_what_callers_rely_on(field: dataclasses.Field) -> None:
    default, *ends = INTERFACE[field.name]
    assert getattr(Settings(), field.name) == default
    choices = field.metadata.get("choices", ())
    if field.name == "region":
        return  # tests/pipeline/test_region.py
    for value in choices or (["x" * end for end in ends] if field.metadata["kind"] is str else ends):
        wide = {"latent_tiled_size": 256} if field.name == "latent_tiled_overlap" else {}
        steered = {"use_kds": True} if value in ("uncertainty", "confidence") else {}
        assert getattr(Settings(**{field.name: value}, **wide, **steered), field.name) == value
    if not choices and field.metadata["kind"] in (int, float):
        for beyond in (ends[0] - 1, ends[1] + 1):
            with pytest.raises(ValueError, match=f"{field.name} is .*; it must be from"):
                Settings(**{field.name: beyond})


def test_prompts_may_use_any_unicode_script() -> None:
    assert Settings(user_prompt="\ud7ff\ue000 猫 🐈").user_prompt == "\ud7ff\ue000 猫 🐈"


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
    with pytest.raises(ValueError, match=r"gives 216.0 MP; the limit is 67.1 MP; the largest scale .* 3.34") as caught:
        Settings(scale_factor=6).output_size(3000, 2000)
    largest = float(str(caught.value).split()[-1])
    width, height = Settings(scale_factor=largest).output_size(3000, 2000)
    assert width * height <= LARGEST_OUTPUT


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 2**15), st.integers(1, 2**15), st.floats(1, 8), st.sampled_from(list(FORMATS)),
    st.sampled_from(["image", "comparison", "all"]),
)  # fmt: skip
def test_the_scale_that_a_refusal_names_is_accepted(
    width: int, height: int, scale: float, output_format: str, view: str
) -> None:
    requested = Settings(scale_factor=scale, output_format=output_format, output_view=view)
    assume(width * height <= LARGEST_INPUT)
    try:
        requested.output_size(width, height)
        return
    except ValueError as error:
        message = str(error)
    if "largest scale" not in message:
        assert message.endswith("no scale of 1 or more fits")
        with pytest.raises(ValueError, match="no scale"):
            dataclasses.replace(requested, scale_factor=1).output_size(width, height)
        return
    largest = float(message.split()[-1])
    dataclasses.replace(requested, scale_factor=largest).output_size(width, height)
    if largest + 0.01 <= scale:
        with pytest.raises(ValueError, match="largest scale"):
            dataclasses.replace(requested, scale_factor=round(largest + 0.01, 2)).output_size(width, height)


@pytest.mark.parametrize("view", ["comparison", "all"])
@pytest.mark.parametrize(("output_format", "side"), [("webp", 8192), ("jpg", 16385)])
def test_the_sides_of_a_comparison_are_counted(output_format: str, side: int, view: str) -> None:
    requested = Settings(scale_factor=1, output_format=output_format, output_view=view)
    with pytest.raises(ValueError, match=f"gives {2 * side}x2 pixels in the comparison; a {output_format} may have"):
        requested.output_size(side, 2)
    assert requested.output_size(side - 1, 2) == (side - 1, 2)


def test_limits_themselves_are_allowed_and_what_is_beyond_is_named() -> None:
    assert Settings(target_side=800).output_size(100, 50) == (800, 400)
    assert Settings(target_side=100).output_size(100, 50) == (100, 50)
    assert Settings(scale_factor=8).output_size(1024, 1024) == (8192, 8192)
    with pytest.raises(ValueError, match=r"scale 8 of a 1024x1025 image gives 67.2 MP; the limit is 67.1 MP; the la"):
        Settings(scale_factor=8).output_size(1024, 1025)
    assert Settings(scale_factor=1.2).output_size(1, 1) == (1, 1)
    assert not Settings(use_kds=True, num_particles=1).steered and Settings(use_kds=True, num_particles=2).steered
    with pytest.raises(ValueError, match="gives 32769x1 pixels; a png may have 32768 on a side here"):
        Settings(scale_factor=1.00003).output_size(32768, 1)


def test_names_of_files_say_the_size() -> None:
    requested: list[dict[str, float]] = [{}, {"scale_factor": 1.5}, {"target_side": 4096}, {"target_megapixels": 12}]
    assert [Settings(**values).label for values in requested] == ["x4", "x1.5", "4096px", "12MP"]


def test_too_large_an_input_is_refused() -> None:
    with pytest.raises(ValueError, match="the limit is 67.1 MP"):
        Settings(scale_factor=1).output_size(9000, 9000)


def test_the_record_of_a_file_has_a_dpi_only_where_it_is_set() -> None:
    """The same seed gives the same bytes as before the setting existed."""
    assert set(dataclasses.asdict(Settings())) - set(Settings().recorded) == {"dpi"}
    assert Settings(dpi=300).recorded["dpi"] == 300 and Settings(**Settings(seed=1).recorded) == Settings(seed=1)


@pytest.mark.parametrize(("size", "side"), [(None, 64), (16, 16), (64, 64)])
def test_tiles_must_advance(size: int | None, side: int) -> None:
    """Of an unset size the smallest side of a bundle counts."""
    assert Settings(latent_tiled_size=size, latent_tiled_overlap=side - 1).latent_tiled_overlap == side - 1
    message = f"latent_tiled_overlap is {side} with latent_tiled_size {side}: tiles cannot advance"
    with pytest.raises(ValueError, match=message):
        Settings(latent_tiled_size=size, latent_tiled_overlap=side)


def test_a_drawn_seed_is_any_that_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda end: end - 1)
    assert Settings().seeded().seed == INTERFACE["seed"][2]
    assert Settings(seed=0).seeded() == Settings(seed=0)
