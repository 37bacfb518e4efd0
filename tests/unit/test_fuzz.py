"""Random settings and files: each works or raises a one-line ValueError."""

from __future__ import annotations

import dataclasses

import corpus
from hypothesis import given, settings
from hypothesis import strategies as st

from seesr import Settings
from seesr.images.read import decode

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.binary(max_size=9),
    st.lists(st.integers()),
)
NAMES = [field.name for field in dataclasses.fields(Settings)]
GOOD = [corpus.file(corpus.PHOTO, kind) for kind in ("PNG", "JPEG", "WEBP")]


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), ANYTHING))
def test_settings(values: dict) -> None:
    try:
        result = Settings(**values)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    for field in dataclasses.fields(result):
        value, limits = getattr(result, field.name), field.metadata
        assert value is None or "ge" not in limits or limits["ge"] <= value <= limits["le"]
        assert "choices" not in limits or value in limits["choices"]
    assert Settings(**dataclasses.asdict(result)) == result


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 2**15), st.integers(1, 2**15), st.floats(1, 8))
def test_output_size(width: int, height: int, scale: float) -> None:
    try:
        size = Settings(scale_factor=scale).output_size(width, height)
    except ValueError as error:
        assert "largest scale" in str(error) or "limit" in str(error)
        return
    assert size == (max(1, round(width * scale)), max(1, round(height * scale)))


def read(data: bytes) -> None:
    try:
        image = decode(data)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    assert image.rgb.shape[2] == 3 and image.rgb.shape[:2] == image.size[::-1]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(GOOD), st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=6)), max_size=5))
def test_files_with_wrong_bytes(data: bytes, changes: list[tuple[int, bytes]]) -> None:
    for place, wrong in changes:
        place %= len(data)
        data = data[:place] + wrong + data[place + len(wrong) :]
    read(data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([b"", corpus.SIGNATURE, b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBPVP8 "]), st.binary(max_size=300))
def test_files_of_noise(start: bytes, rest: bytes) -> None:
    read(start + rest)
