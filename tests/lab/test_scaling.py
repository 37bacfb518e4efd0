"""The fleet simulation against cases with a closed form, and its scaling rule against the manifest."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from lab.report import RESULTS, read
from lab.scaling.__main__ import patterns, row_of
from lab.scaling.simulation import DAY, SCRAPE, TICK, WINDOW, Keda, Simulation


def test_random_arrivals_wait_as_long_as_the_formula_of_one_server_says() -> None:
    rate, service, images = 0.5, 0.8, 60_000  # M/M/1: the mean wait is share / (1 - share) / service
    draw = random.Random(1)
    arrivals = list(itertools.accumulate(draw.expovariate(rate) for _ in range(images)))
    share = rate / service
    done = Simulation(arrivals, lambda: draw.expovariate(service), 0.0, workers=1).run()
    assert sum(done.waits) / images == pytest.approx(share / (1 - share) / service, rel=0.05)
    assert done.used / done.billed == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize(("workers", "last"), [(1, 5.0 * 9), (2, 0.0), (10, 0.0)])
def test_regular_arrivals_wait_exactly(workers: int, last: float) -> None:
    arrivals = [5.0 * number for number in range(10)]  # D/D/n with 10 s an image, one each 5 s
    done = Simulation(arrivals, lambda: 10.0, 0.0, workers=workers).run()
    assert done.waits[-1] == last and done.used == 100.0 and done.billed == workers * DAY


def test_the_first_image_after_a_pause_waits_for_a_start() -> None:
    done = Simulation([1.0], lambda: 10.0, 140.0, Keda.read()).run()
    assert done.waits == [SCRAPE + 140.0 - 1.0], "its arrival is seen at the next scrape"
    rule = Keda.read()
    latest = SCRAPE + 140.0 + 10.0 + SCRAPE + rule.cooldown + TICK  # then the worker ends
    assert 150.0 + rule.cooldown <= done.billed + SCRAPE <= latest


@pytest.mark.parametrize(
    ("waiting", "busy", "workers", "wanted"),
    [(0, 0, 0, 0), (1, 0, 0, 1), (100, 0, 0, 1), (100, 1, 1, 5), (0, 1, 1, 1), (1, 1, 1, 2), (8, 2, 2, 4),
     (1, 4, 4, 4), (500, 4, 4, 8)],
)  # fmt: skip
def test_the_rule_adds_workers(waiting: int, busy: int, workers: int, wanted: int) -> None:
    assert Keda.read()(0.0, waiting, busy, workers) == wanted


def test_the_rule_removes_workers_late_and_the_last_after_the_cooldown() -> None:
    rule = Keda.read()
    counts, workers = [], 8
    for now in range(0, 2 * int(rule.cooldown) + 60, TICK):
        workers = rule(float(now), 40 if now == 0 else 0, 0, workers)
        counts.append((now, workers))
    assert all(count == 8 for now, count in counts if now < WINDOW), counts
    assert counts[-1][1] == 0 and min(now for now, count in counts if count == 0) >= rule.cooldown


def test_images_of_preempted_workers_are_processed_once() -> None:
    arrivals = [float(number) for number in range(500)]
    done = Simulation(arrivals, lambda: 10.0, 20.0, workers=8, lifetime=200.0, seed=1).run()
    calm = Simulation(arrivals, lambda: 10.0, 20.0, workers=8).run()
    assert done.left == calm.left == 0 and done.used == calm.used == 5000.0
    assert sum(done.waits) > sum(calm.waits)


def test_a_row_of_the_results_is_simulated_again() -> None:
    name, arrivals = list(patterns())[-1]
    rows = [row for row in read(RESULTS / "scaling.json") if row["arrivals"] == name]
    assert rows[0] == row_of(name, arrivals, None), "run python -m lab.scaling"
    assert rows[1] == row_of(name, arrivals, 1)
    assert not math.isnan(rows[0]["p95_wait_s"])
