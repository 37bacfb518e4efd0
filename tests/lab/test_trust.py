"""lab.quality.trust: the arithmetic of the calibration of the view `confidence`."""

from __future__ import annotations

import numpy as np
import pytest

from lab.quality import trust

INFINITE = np.inf


@pytest.mark.parametrize(
    ("limits", "level", "threshold"),
    [
        ([[1.0], [2.0], [3.0], [4.0]], 0.6, 2.0),  # weights of 1/5: the new photograph and one limit may fail
        ([[1.0], [2.0], [3.0], [4.0]], 0.8, 1.0),  # the new photograph uses up 1/5: no limit may fail
        ([[1.0], [2.0], [3.0], [4.0]], 0.4, 3.0),
        ([[1.0], [2.0], [3.0], [4.0]], 0.81, 0.0),  # four photographs cannot give it
        ([[4.0], [1.0], [3.0], [2.0]], 0.4, 3.0),
        ([[1.0, 9.0], [2.0, 8.0], [3.0, 7.0], [4.0, 6.0]], 0.6, 3.0),  # squares count 1/10 each
        ([[1.0, 1.0, 1.0, 1.0], [2.0], [3.0], [4.0]], 0.6, 2.0),  # four squares of one photograph count as one
        ([[INFINITE], [INFINITE], [INFINITE], [INFINITE]], 0.6, INFINITE),
        ([], 0.95, 0.0),
    ],
)
def test_the_threshold_of_a_small_example(limits: list[list[float]], level: float, threshold: float) -> None:
    assert trust.threshold_of(limits, level) == threshold


def test_nineteen_photographs_are_needed_for_95_percent() -> None:
    limits = [[float(n)] for n in range(1, 20)]
    assert trust.threshold_of(limits, 0.95) == 1.0
    assert trust.threshold_of(limits[1:], 0.95) == 0.0


def test_new_photographs_keep_the_level() -> None:
    """Photographs whose squares depend on each other: at least the level, and not much more."""
    rng, kept = np.random.default_rng(0), []
    for _ in range(4000):
        own = rng.normal(size=(40, 1))
        limits = np.exp(own + 0.1 * rng.normal(size=(40, 3)))
        threshold = trust.threshold_of(limits[1:].tolist(), 0.9)
        kept += (limits[0] >= threshold).tolist()
    assert 0.89 < np.mean(kept) < 0.94


def test_the_limit_of_a_square_is_where_the_error_is_first_too_large() -> None:
    disagreement = np.array([[1, 2], [3, 4]], np.float32)
    error = np.array([[5, 9], [20, 30]], np.float32)
    square = trust.Square("one", "clean", disagreement, error)
    assert square.limit(8) == 2 and square.limit(10) == 3 and square.limit(30) == INFINITE
    for bound in (8, 10, 20):
        trusted = disagreement < square.limit(bound)
        assert error[trusted].max() <= bound
    assert square.trusted(3) == 0.5
