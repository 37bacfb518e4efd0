from __future__ import annotations

from pathlib import Path

import pytest

from seesr.config import Configuration, variable


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SEESR_DEADLINE", "soon", "SEESR_DEADLINE is 'soon'"),
        ("SEESR_DEADLINE", "0", "greater than 0"),
        ("SEESR_CUDA_GRAPHS", "perhaps", "SEESR_CUDA_GRAPHS is 'perhaps'"),
        ("LOG_FORMAT", "xml", "LOG_FORMAT is 'xml': Input should be 'console' or 'json'"),
        ("SEESR_DEADLNE", "5", "SEESR_DEADLNE is no variable of this program; there are .*SEESR_DEADLINE"),
    ],
)
def test_a_bad_variable_is_one_line_that_names_it(
    name: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words) as caught:
        Configuration.read()
    assert "\n" not in str(caught.value)


def test_variables_are_typed_and_empty_ones_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WEIGHTS": "a/b", "DEADLINE": "2.5", "CUDA_GRAPHS": "1", "DEVICE": ""}.items():
        monkeypatch.setenv(f"SEESR_{name}", value)
    monkeypatch.setenv("LOG_FORMAT", "json")
    found = Configuration.read()
    assert (found.weights, found.deadline, found.cuda_graphs, found.device) == (Path("a/b"), 2.5, True, None)
    assert found.log_format == "json" and variable("log_format") == "LOG_FORMAT"


def test_every_variable_says_what_it_does() -> None:
    assert all(field.description for field in Configuration.model_fields.values())
