"""The guarantees of docs/fleet.md, with an engine that sleeps; `python -m lab.fleet` writes the same to results."""

from __future__ import annotations

import pytest

from lab.fleet.figures import measure


@pytest.mark.long
def test_nothing_is_lost_when_a_worker_and_redis_are_killed() -> None:
    figures = measure("kill")
    assert (figures["results"], figures["lost"], figures["duplicates"]) == (200, 0, 0)
    assert figures["runs"] <= 203 and figures["seconds"] < 90


@pytest.mark.slow
def test_two_gateways_and_four_workers_keep_up() -> None:
    """Half of what was measured tells a broken fleet from a slow machine."""
    figures = measure("load")
    assert (figures["results"], figures["lost"], figures["duplicates"], figures["runs"]) == (2000, 0, 0, 2000)
    assert figures["jobs_per_second"] > 50 and figures["gateway_p99_ms"] < 200
    for before, after in figures["gateway_memory_mb"].values():
        assert before < 300 and after - before < 60


@pytest.mark.slow
def test_a_job_longer_than_its_lease_runs_once_through_sigterm_too() -> None:
    figures = measure("lease")
    assert (figures["runs"], figures["runs_with_sigterm"], figures["exit_code"], figures["results"]) == (1, 1, 0, 2)


@pytest.mark.long
def test_a_killed_child_is_replaced_and_a_canceled_job_costs_no_child() -> None:
    figures = measure("child")
    assert figures["results"] == 2 and figures["new_child"] and figures["same_child_after_cancel"]
    assert figures["cancel_seconds"] < 2 and figures["served_after_seconds"] < 30


@pytest.mark.long
def test_an_image_that_kills_its_worker_fails_after_three_runs() -> None:
    figures = measure("poison")
    assert (figures["status"], figures["other"]) == ("failed", "succeeded")
    assert figures["error"] == "the worker died 3 times on this image"


@pytest.mark.long
def test_an_urgent_job_is_next() -> None:
    figures = measure("priority")
    assert figures["others_before_the_urgent"] <= 1 and figures["ended"] == 101  # the one that ran already


@pytest.mark.long
def test_a_frozen_or_full_redis_is_reported_and_loses_no_job() -> None:
    figures = measure("freeze")
    assert all(status == 503 and seconds < 5 for status, seconds in figures["frozen"])
    assert figures["live"] == 200 and figures["full"] == [
        503,
        "the queue is unavailable: Redis has reached its memory limit (maxmemory)",
    ]
    assert (figures["results"], figures["lost"], figures["runs"]) == (21, 0, 21)


@pytest.mark.slow
def test_warm_restarts_under_load_run_nothing_twice() -> None:
    figures = measure("drain")
    assert (figures["results"], figures["runs"], figures["exit_codes"]) == (200, 200, [0] * 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["readonly", "hang", "tail", "upgrade"])
def test_no_job_is_lost_or_mixed_up_under_a_fault(name: str) -> None:
    figures = measure(name, jobs=40)
    assert (figures["lost"], figures["misreported"], figures["mixed"], figures["left"]) == (0, 0, 0, 0), figures
    assert figures["live_ms"]["p99"] < 100
    if name == "readonly":
        assert figures["while_read_only"] == {"ready": 503, "live": 200, "post": 503}
    if name == "upgrade":
        assert figures["versions"] == 2 and figures["exit_codes"] == [0, 0]
    if name == "tail":
        assert figures["lost_ends"] > 0
    if name == "hang":
        assert figures["job_asked_ms"] < 1000


@pytest.mark.long
def test_nothing_is_left_of_any_job_after_a_chaotic_run() -> None:
    """No key of Redis, object of the store, or file of a gateway or worker names a job once all have expired."""
    figures = measure("chaos", jobs=24, workers=2)
    assert figures["left"] == 0, figures["left_at"]
    assert (figures["lost"], figures["misreported"], figures["mixed"]) == (0, 0, 0), figures


@pytest.mark.long
def test_a_message_that_the_broker_lost_comes_back() -> None:
    figures = measure("lost")
    assert figures["removed"] and (figures["results"], figures["runs"]) == (3, 3)
