"""The corpus of bad and odd files and fields, without networks: the right pixels or a one-line error."""

from __future__ import annotations

import re

import corpus
import numpy as np
import pytest
from corpus import Case

from seesr.images.image_data import to_uint8
from seesr.images.mask import read_mask
from seesr.images.read import decode
from seesr.settings.parsing import mask_of, settings_of

CASES = [case for case in corpus.cases() if isinstance(case.inputs, dict) and case.name != "unknown field"]


def test_no_two_cases_have_one_name() -> None:
    assert len({case.name for case in corpus.cases()}) == len(corpus.cases())


def test_the_sample_is_in_the_corpus() -> None:
    assert {case.name for case in corpus.cases()} >= corpus.SAMPLE


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.image, bytes)], ids=lambda case: case.name)
def test_file_and_fields(case: Case) -> None:
    assert isinstance(case.image, bytes) and isinstance(case.inputs, dict)
    values = {"scale_factor": 2, **case.inputs}

    def read() -> tuple[np.ndarray, np.ndarray | None]:
        settings = settings_of(values, others=frozenset({"mask"}))
        image = decode(case.image, settings.output_size)  # type: ignore[arg-type]
        if (mask := mask_of(values)) is not None:
            read_mask(mask, image.size)
        return image.rgb, image.alpha

    if case.message is not None:
        with pytest.raises(ValueError) as caught:
            read()
        assert re.search(case.message, str(caught.value)) and "\n" not in str(caught.value)
        return
    rgb, alpha = read()
    if case.same_as is None:
        return
    plain = decode(corpus.file(case.same_as))
    np.testing.assert_array_equal(to_uint8(rgb), plain.rgb)
    assert (alpha is None) == (plain.alpha is None)
    if alpha is not None and plain.alpha is not None:
        np.testing.assert_array_equal(to_uint8(alpha), plain.alpha)
