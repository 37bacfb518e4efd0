"""Measured rates of a machine: least-squares lines through measured costs, kept in a file."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seesr.engine.rates import (
    FIRST_MARGIN,
    MIN_IMAGES,
    CostLines,
    Measured,
    Quote,
    Rates,
    latest_rates,
    rates_file,
    user_folder,
)
from seesr.pipeline.work import Outline, Term

WORK = {
    "read": Term(("read",), 0.1),
    "denoise": Term(("denoise:1024", "denoise"), 1.0, 2.0),
    "file": Term(("file:png",), 1.0),
}
OUTLINE = Outline(4, 2, 64, 1, (64, 72), 24, 512, 512)
SECONDS = {"read": 0.01, "denoise": 1.0, "file": 0.1}


def measured(**changes: Any) -> Measured:
    """An image of one megapixel."""
    result = Measured(WORK, SECONDS, 1.11, "png", 1.0, 2_000_000, 1.0, {"host": 500}, {"host": 530})
    return result._replace(**changes)


def test_a_line_has_a_fixed_cost_and_a_slope(rng: np.random.Generator) -> None:
    lines = CostLines()
    for units in rng.uniform(0.1, 5, 50):
        lines.learn("decode", units, (0.2 + 0.7 * units) * rng.uniform(0.98, 1.02))
    for units in (0.1, 1.0, 5.0):
        assert lines.at("decode", units) == pytest.approx(0.2 + 0.7 * units, rel=0.03)
    assert lines.at("encode", 1.0) is None


def test_images_of_one_size_say_what_another_takes_in_proportion() -> None:
    lines = CostLines()
    for _ in range(5):
        lines.learn("decode", 2.0, 1.0)
    assert lines.at("decode", 6.0) == pytest.approx(3.0)
    assert CostLines({"tags": [4.0, 0.0, 0.0, 2.0, 0.0]}).at("tags", 1.0) == 0.5  # units are 0


def test_relative_errors_count_down_to_a_millisecond() -> None:
    lines = CostLines()
    for cost in (0.01, 0.04):
        lines.learn("file", 1.0, cost)
    expected = (0.9 * 0.01 / 0.01**2 + 0.04 / 0.04**2) / (0.9 / 0.01**2 + 1 / 0.04**2)
    assert lines.at("file", 1.0) == pytest.approx(expected)
    lines = CostLines()
    for cost in (0.0, 0.0005):  # too short to be measured well: they count alike
        lines.learn("file", 1.0, cost)
    assert lines.at("file", 1.0) == pytest.approx(0.0005 / 1.9)


def test_a_line_that_falls_slowly_is_level() -> None:
    lines = CostLines()
    for units, cost in ((1.0, 2.0), (2.0, 1.5)):
        lines.learn("x", units, cost)
    mean = (0.9 / 2.0 + 1 / 1.5) / (0.9 / 2.0**2 + 1 / 1.5**2)
    assert lines.at("x", 1.0) == lines.at("x", 100.0) == pytest.approx(mean)


def test_no_line_is_negative() -> None:
    falling, below = CostLines(), CostLines()
    for units, cost in ((1.0, 2.0), (2.0, 1.0)):
        falling.learn("x", units, cost)
    for units, cost in ((1.0, 0.5), (2.0, 1.5)):
        below.learn("x", units, cost)
    assert falling.at("x", 100.0) == falling.at("x", 1.0) > 0  # type: ignore[operator]
    by_size = (0.9 * 1.0 * 0.5 / 0.5**2 + 2.0 * 1.5 / 1.5**2) / (0.9 * 1.0**2 / 0.5**2 + 2.0**2 / 1.5**2)
    assert [below.at("x", units) for units in (0.01, 3.0)] == pytest.approx([0.01 * by_size, 3.0 * by_size])


def test_a_machine_that_became_slower_is_learnt() -> None:
    lines = CostLines()
    for cost in [1.0] * 50 + [2.0] * 60:
        lines.learn("denoise", 1.0, cost)
    assert lines.at("denoise", 1.0) == pytest.approx(2.0, rel=0.25)


def test_rates_outlive_the_process(tmp_path: Path) -> None:
    path = rates_file(tmp_path / "seesr/rates", "0123456789abcdef", "cpu", 4, 1)
    assert path.name == "0123456789ab-cpu-4.json"
    rates = Rates(path)
    rates.begin({"host": 400}, OUTLINE)
    for _ in range(MIN_IMAGES):
        rates.learn(measured())
    again = Rates(path)
    assert again.seconds(WORK) == rates.seconds(WORK) == pytest.approx(1.11)
    assert again.length("png", 2.0) == 4_000_000 and again.length("webp", 2.0) is None
    assert (
        again.peak(2.0) == {"host": 400 + 2 * 130}
        and again.images == MIN_IMAGES
        and again.margin == rates.margin == 1.0
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lines": 1, "memory": {}, "errors": [], "images": 1}'])
def test_a_damaged_file_is_measured_again(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    rates = Rates(path)
    assert rates.seconds(WORK) is None and rates.images == 0 and "cannot be used" in caplog.text
    rates.learn(measured())
    assert json.loads(path.read_text())["images"] == 1


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    rates = Rates(tmp_path / "file" / "rates.json")
    rates.learn(measured())
    assert rates.seconds(WORK) is not None and "were not saved" in caplog.text


def test_the_warm_up_gives_the_first_rates_only() -> None:
    rates = Rates()
    assert rates.seconds(WORK) is None
    rates.warm({"denoise": Term(("denoise:64", "denoise"), 1.0, 1.0)}, {"denoise": 2.0})
    assert rates.seconds(WORK) == pytest.approx(4.0) and rates.images == 0
    rates.learn(measured())
    before = rates.seconds(WORK)
    rates.warm(WORK, {"denoise": 100.0})
    assert rates.seconds(WORK) == before


def test_features_and_passes_of_a_tile_and_each_tile_size_have_their_rates() -> None:
    rates = Rates()
    for area, features, each in ((256, 0.1, 0.3), (1024, 1.0, 1.5)):
        for tiles, passes in ((1, 1), (4, 1), (3, 2), (9, 4)):
            term = Term((f"denoise:{area}", "denoise"), passes, tiles)
            rates.learn(measured(terms={"denoise": term}, seconds={"denoise": tiles * (features + each * passes)}))
    for area, expected in ((256, 5 * 0.7), (1024, 5 * 4.0)):
        assert rates.seconds({"denoise": Term((f"denoise:{area}", "denoise"), 2, 5)}) == pytest.approx(expected)
    other = rates.seconds({"denoise": Term(("denoise:4096", "denoise"), 2, 5)})
    assert other is not None and 3.5 < other < 20


def test_only_an_image_that_raised_the_peak_says_what_memory_it_took() -> None:
    rates = Rates()
    rates.begin({"host": 400}, OUTLINE)
    rates.learn(measured(after={"host": 530}))
    rates.learn(measured(megapixels=0.1, before={"host": 530}, after={"host": 530}))
    assert rates.peak(1.0) == {"host": 530}


def test_a_larger_image_that_took_less_memory_lowers_the_rate_by_a_tenth() -> None:
    rates = Rates()
    rates.begin({"host": 400}, OUTLINE)
    rates.learn(measured(after={"host": 530}))
    rates.learn(measured(megapixels=10.0, before={"host": 530}, after={"host": 540}))
    assert rates.peak(1.0) == {"host": 400 + round(0.9 * 130)}
    rates.begin({"host": 700}, OUTLINE)
    assert rates.peak(1.0) == {"host": 700 + round(0.9 * 130)}


def test_without_an_image_the_peak_is_what_the_process_holds() -> None:
    rates = Rates()
    rates.begin({"host": 400}, OUTLINE)
    assert rates.peak(100.0) == {"host": 400}
    rates = Rates()
    rates.learn(measured(after={"host": 530}))  # what it held before is unknown
    assert rates.peak(100.0) == {"host": 530}


def test_cached_and_masked_runs_do_not_update_quote_errors() -> None:
    rates = Rates()
    rates.learn(measured(quoted=None, seconds={"read": 0.01}))
    assert rates.images == 0 and not rates.errors and rates.seconds(WORK) is None


def test_an_image_is_forgotten_after_fifty_others() -> None:
    rates = Rates()
    rates.learn(measured(quoted=0.37))
    for _ in range(49):
        rates.learn(measured())
    assert rates.margin == pytest.approx(3.0)
    rates.learn(measured())
    assert rates.margin == pytest.approx(1.0)


def test_the_errors_of_quotes_are_kept_with_four_digits() -> None:
    rates = Rates()
    rates.learn(measured(quoted=1.11 / 1.23456))
    assert rates.state()["errors"] == [1.2346]


def test_the_margin_is_what_the_latest_images_needed() -> None:
    rates = Rates()
    assert rates.margin == FIRST_MARGIN == 1.5  # before three images
    for quoted in (1.0, 1.11, 2.0):
        rates.learn(measured(quoted=quoted))
    assert rates.margin == pytest.approx(1.11)
    rates = Rates()
    for _ in range(MIN_IMAGES):
        rates.learn(measured(quoted=2.0))
    assert rates.margin == 1.0  # an image that took less makes no quote shorter


@pytest.mark.parametrize(
    ("device", "workers", "name"),
    [
        ("cpu", 1, "0123456789ab-cpu-4.json"), ("cpu bfloat16", 2, "0123456789ab-cpu-bfloat16-4-x2.json"),
        ("NVIDIA H200", 1, "0123456789ab-NVIDIA-H200.json"), ("NVIDIA H200", 8, "0123456789ab-NVIDIA-H200-x8.json"),
    ],
)  # fmt: skip
def test_the_file_of_a_device(device: str, workers: int, name: str) -> None:
    assert rates_file(Path("rates"), "0123456789abcdef", device, 4, workers) == Path("rates") / name


def test_the_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_folder() == tmp_path / ".cache/seesr/rates"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert user_folder() == tmp_path / "cache/seesr/rates"


def test_the_latest_rates_are_those_of_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    digest = "0123456789abcdef"
    for number, device in enumerate(("NVIDIA H200", "cpu")):
        path = rates_file(user_folder(), digest, device, 2, 1)
        Rates(path).learn(measured())
        os.utime(path, (number, number))
    latest = [latest_rates(digest, device) for device in ("cpu", "cuda:1", None)]
    assert [rates.path.name for rates in latest if rates and rates.path] == [
        "0123456789ab-cpu-2.json", "0123456789ab-NVIDIA-H200.json", "0123456789ab-cpu-2.json",
    ]  # fmt: skip
    assert latest_rates("f" * 16, None) is None


def test_a_quote_promises_with_its_margin_once_enough_was_measured() -> None:
    quote = Quote("8x8", 1, 2.0, 3.0, 100, {"host": 300}, None, MIN_IMAGES, wait=4.0)
    assert quote.promised == 9.0 and MIN_IMAGES == 3
    assert dataclasses.replace(quote, images=MIN_IMAGES - 1).promised is None
    assert dataclasses.replace(quote, seconds=None, seconds_at_most=None).promised is None
    assert quote.short() == {"seconds": 2.0, "bytes": 100, "peak_memory_mb": 300}
    assert dataclasses.replace(quote, seconds=0.0, seconds_at_most=0.0).promised is None
    assert Quote("8x8", 1, 1.0, 1.23456, None, {}, None, MIN_IMAGES).promised == 1.235  # without a wait


def test_a_quote_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Quote("8x8", 1, None, None, None, {}, None, 0).tiles = 2  # type: ignore[misc]


def test_many_threads_learn(tmp_path: Path) -> None:
    rates = Rates(tmp_path / "rates.json")

    def work() -> None:
        for _ in range(20):
            rates.learn(measured())
            assert rates.seconds(WORK) == pytest.approx(1.11)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rates.images == 80 and json.loads((tmp_path / "rates.json").read_text())["images"] == 80
