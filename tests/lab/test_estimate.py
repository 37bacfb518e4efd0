"""Accuracy of the time left on real images, see lab.speed.estimate."""

from __future__ import annotations

import pytest

from lab.speed import estimate
from seesr import Engine
from seesr.networks import weights
from seesr.runtime.estimate import Speed


@pytest.mark.slow
def test_twenty_images_of_mixed_sizes_are_within_20_percent_at_half_time() -> None:
    """Needs a machine that does nothing else."""
    with Engine.load(weights.POCKET, "cpu") as engine:
        first = Speed()
        first.totals = dict(engine.speed.totals)
        images = [estimate.record(engine, size, settings) for size, settings in estimate.cases()]
    result = estimate.errors(images, first)
    assert len(result) >= 12 and max(result) <= 0.2, result
