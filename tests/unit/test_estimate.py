"""Progress and time left from counted work and measured speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.speed.estimate import errors
from seesr.runtime.estimate import Forecast, Speed

RECORDED = Path(__file__).parents[2] / "results" / "estimate.json"
WORK = {"encode": 2.0, "denoise": 10.0, "file:png": 1.0}


def trained() -> Speed:
    speed = Speed()
    speed.learn(WORK, {"encode": 1.0, "denoise": 8.0, "file": 1.0})
    return speed


def test_recorded_images_are_within_20_percent_at_half_time() -> None:
    recorded = json.loads(RECORDED.read_text())
    first = Speed()
    first.totals = {name: tuple(values) for name, values in recorded["first"].items()}
    result = errors(recorded["images"], first)
    assert len(result) >= 12 and max(result) <= 0.2, result


def test_work_of_another_size_takes_its_share() -> None:
    speed = trained()
    assert speed.seconds({"encode": 4.0, "denoise": 5.0}) == {"encode": 2.0, "denoise": 4.0}
    speed.learn({"denoise": 10.0}, {"denoise": 16.0})
    assert 12 < speed.seconds({"denoise": 10.0})["denoise"] < 16, "later images weigh more, none alone decides"


def test_an_image_at_the_expected_speed() -> None:
    forecast = Forecast(trained(), WORK)
    assert forecast.at("encode", 0, 1, 0.0) == (0.0, 10.0)
    assert forecast.at("denoise", 0, 4, 1.0) == (0.1, 9.0)
    assert forecast.at("denoise", 2, 4, 5.0) == (0.5, 5.0)
    assert forecast.at("file", 1, 1, 10.0) == (1.0, 0.0)


def test_a_machine_that_became_slower_counts_in_its_stage_and_those_after_it() -> None:
    forecast = Forecast(trained(), WORK)
    forecast.at("encode", 0, 1, 0.0)
    forecast.at("denoise", 0, 4, 2.0)
    share, left = forecast.at("denoise", 2, 4, 10.0)
    assert left is not None and 8 < left <= 10 and 0.49 < share < 0.56


@pytest.mark.parametrize("pace", [0.25, 1.0, 4.0])
def test_progress_never_falls_and_the_time_left_never_rises(pace: float) -> None:
    forecast = Forecast(trained(), WORK)
    seen = [forecast.at("denoise", done, 8, pace * (1 + done)) for done in (0, 1, 2, 2, 1, 3, 4, 5, 8)]
    seen += [forecast.at("file", done, 1, 9 * pace + done) for done in (0, 1)]
    shares, lefts = [share for share, _ in seen], [left for _, left in seen if left is not None]
    assert shares == sorted(shares) and lefts == sorted(lefts, reverse=True) and len(lefts) == len(seen)


def test_nothing_is_said_before_anything_was_measured() -> None:
    assert Forecast(Speed(), WORK).at("denoise", 1, 2, 5.0) == (0.0, None)
    assert Forecast(trained(), WORK).at("read", 0, 1, 0.1) == (0.0, None), "a stage without counted work"


def test_figures_have_the_digits_that_they_are_shown_with() -> None:
    """By hand: the pace is 6/5 so far and 24/19 in this stage; (1 + 3)/10 of the work are done."""
    forecast = Forecast(trained(), WORK)
    forecast.at("denoise", 0, 8, 1.0)
    left = 5 * 24 / 19 + 6 / 5
    share, seconds = forecast.at("denoise", 3, 8, 5.0)
    assert seconds == round(left, 2) == 7.52 and share == round(5 / (5 + left), 4) == 0.3995


def test_stages_without_work_or_time_are_not_learnt() -> None:
    speed = Speed()
    speed.learn({"encode": 0.0, "denoise": 5.0, "decode": 1.0}, {"encode": 3.0, "denoise": 5.0})
    assert speed.totals == {"denoise": (5.0, 5.0)}
    assert speed.seconds({"encode": 2.0, "denoise": 2.0}) == {"encode": 0.0, "denoise": 2.0}
    assert Forecast(trained(), WORK).at("file", 0, 0, 9.0)[0] == 0.9, "a stage without parts"
