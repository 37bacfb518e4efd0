"""Configuration: SEESR_* variables, their defaults and their errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.cog_server import ROOT
from seesr.config import WEIGHTS_SCRIPT, Configuration, variable


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEESR_DEADLINE", "soon", "SEESR_DEADLINE is 'soon'"),
        ("SEESR_DEADLINE", "0", "greater than 0"),
        ("SEESR_CUDA_GRAPHS", "perhaps", "SEESR_CUDA_GRAPHS is 'perhaps'"),
        ("LOG_FORMAT", "xml", "LOG_FORMAT is 'xml': Input should be 'console' or 'json'"),
        ("SEESR_DEADLNE", "5", "SEESR_DEADLNE is not a known variable; the variables are .*SEESR_DEADLINE"),
    ],
)
def test_a_bad_variable_is_one_line_that_names_it(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as caught:
        Configuration.read()
    assert "\n" not in str(caught.value)


DEFAULTS = {  # what operators rely on
    "attention": "auto", "bundles": "", "cuda_graphs": True, "precision": "auto", "tile_workers": 1, "cache_mb": 512,
    "c2pa_algorithm": "es256", "data": Path("seesr-data"), "local_webhooks": False, "max_queue": 100,
    "queue_share": 0.5, "keep": 24, "rate": 600, "shutdown": 600, "allow_urls": "", "lease": 60, "store_retry": 60,
    "share_tiles": False, "log_format": "console",
}  # fmt: skip


def test_defaults() -> None:
    values = {name: field.default for name, field in Configuration.model_fields.items()}
    secrets = {"api_keys", "metrics_token"}
    assert {name: value for name, value in values.items() if value is not None and name not in secrets} == DEFAULTS
    assert not any(values[name].get_secret_value() for name in secrets)


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("tile_workers", 1, 0), ("cache_mb", 0, -1), ("deadline", 0.001, 0), ("price_per_hour", 0, -0.001),
        ("max_queue", 1, 0), ("queue_share", 0.001, 0), ("queue_share", 1, 1.001), ("keep", 0.001, 0), ("rate", 1, 0),
        ("shutdown", 0.001, 0), ("lease", 2, 1), ("store_retry", 0, -0.001),
    ],
)  # fmt: skip
def test_limits(name: str, allowed: float, refused: float) -> None:
    assert getattr(Configuration(**{name: allowed}), name) == allowed  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=name):
        Configuration(**{name: refused})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url",
    [
        "redis://:7Xq/Zw9@host:6379/0", "redis://:7Xq#Zw9@host/0", "redis://:7Xq?Zw9@host:1/0", "7Xq Zw9",
        "http://:7XqZw9@host/0", "redis://:7XqZw9@host:66666/0", "redis://:7XqZw9@/0", "redis://[7XqZw9",
        "redis://:7XqZw9@host:port/0", "redis://:77#Zw9@host/0", "redis://host:6379/7XqZw9",
        "redis://:7XqZw9@host:0/0", "redis://77#Zw9@host/0",
    ],
)  # fmt: skip
def test_a_bad_queue_is_refused_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESR_REDIS", url)
    with pytest.raises(ValueError, match="SEESR_REDIS cannot be used: it must be redis://") as caught:
        Configuration.read()
    assert not any(part in str(caught.value) for part in ("7X", "Zw9", "77"))


@pytest.mark.parametrize(
    "url", ["redis://127.0.0.1:6379/0", "rediss://user:p%23ss@redis.example:6380", "redis://:a+b=@[::1]:1/15"]
)
def test_a_good_queue_is_taken_and_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESR_REDIS", url)
    assert Configuration.read().redis == url and url not in repr(Configuration.read())


def test_variables_are_typed_and_empty_ones_are_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WEIGHTS": "a/b", "DEADLINE": "2.5", "CUDA_GRAPHS": "1", "DEVICE": ""}.items():
        monkeypatch.setenv(f"SEESR_{name}", value)
    monkeypatch.setenv("LOG_FORMAT", "json")
    configuration = Configuration.read()
    assert (configuration.weights, configuration.deadline, configuration.cuda_graphs, configuration.device) == (
        Path("a/b"),
        2.5,
        True,
        None,
    )
    assert configuration.log_format == "json" and variable("log_format") == "LOG_FORMAT"


def test_the_variables_of_the_weights_script_may_stay_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WEIGHTS_SCRIPT:
        monkeypatch.setenv(name, "value")
    assert Configuration.read().weights is None
    sources = "".join(path.read_text() for path in (ROOT / "seesr").rglob("*.py"))
    read = re.findall(r'environ(?:\.get\(|\[)"(SEESR_\w+)"(?!\] =)', sources)
    assert set(read) == WEIGHTS_SCRIPT  # all others are fields of Configuration


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Configuration().rate = 1  # type: ignore[misc]


def test_every_variable_says_what_it_does() -> None:
    assert all(field.description for field in Configuration.model_fields.values())
