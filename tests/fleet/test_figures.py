"""What docs/fleet.md promises, with an engine that sleeps: `python -m lab.fleet` writes the same to results."""

from __future__ import annotations

import pytest

from lab.fleet.figures import measure


@pytest.mark.long
def test_nothing_is_lost_when_a_worker_and_redis_are_killed() -> None:
    found = measure("kill")
    assert (found["results"], found["lost"], found["duplicates"]) == (200, 0, 0)
    assert found["runs"] <= 203 and found["seconds"] < 90


@pytest.mark.slow
def test_two_gateways_and_four_workers_keep_up() -> None:
    """Half of what was measured tells a broken fleet from a slow machine."""
    found = measure("load")
    assert (found["results"], found["lost"], found["duplicates"], found["runs"]) == (2000, 0, 0, 2000)
    assert found["jobs_per_second"] > 50 and found["gateway_p99_ms"] < 200
    for before, after in found["gateway_memory_mb"].values():
        assert before < 300 and after - before < 60


@pytest.mark.slow
def test_a_job_longer_than_its_lease_runs_once_through_sigterm_too() -> None:
    found = measure("lease")
    assert (found["runs"], found["runs_with_sigterm"], found["exit_code"], found["results"]) == (1, 1, 0, 2)


@pytest.mark.long
def test_a_killed_child_is_replaced_and_a_canceled_job_costs_no_child() -> None:
    found = measure("child")
    assert found["results"] == 2 and found["new_child"] and found["same_child_after_cancel"]
    assert found["cancel_seconds"] < 2 and found["served_after_seconds"] < 30


@pytest.mark.long
def test_an_image_that_kills_its_worker_fails_after_three_runs() -> None:
    found = measure("poison")
    assert (found["status"], found["other"]) == ("failed", "succeeded")
    assert found["error"] == "the worker died 3 times on this image"


@pytest.mark.long
def test_the_urgent_one_is_next() -> None:
    found = measure("priority")
    assert found["others_before_the_urgent"] <= 1 and found["ended"] == 101  # the one that ran already


@pytest.mark.long
def test_a_frozen_or_full_redis_is_reported_and_loses_no_job() -> None:
    found = measure("freeze")
    assert all(status == 503 and seconds < 5 for status, seconds in found["frozen"])
    assert found["live"] == 200 and found["full"] == [503, "the queue takes no more: Redis is full"]
    assert (found["results"], found["lost"], found["runs"]) == (21, 0, 21)


@pytest.mark.slow
def test_warm_restarts_under_load_run_nothing_twice() -> None:
    found = measure("drain")
    assert (found["results"], found["runs"], found["exit_codes"]) == (200, 200, [0] * 6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["readonly", "hang", "tail", "upgrade"])
def test_a_fault_loses_mixes_and_leaves_nothing(name: str) -> None:
    found = measure(name, jobs=40)
    assert (found["lost"], found["misreported"], found["mixed"], found["left"]) == (0, 0, 0, 0), found
    assert found["live_ms"]["p99"] < 100
    if name == "readonly":
        assert found["while_read_only"] == {"ready": 503, "live": 200, "post": 503}
    if name == "upgrade":
        assert found["versions"] == 2 and found["exit_codes"] == [0, 0]
    if name == "tail":
        assert found["lost_ends"] > 0
    if name == "hang":
        assert found["job_asked_ms"] < 1000


@pytest.mark.long
def test_nothing_is_left_of_any_job_after_a_chaotic_run() -> None:
    """No key of Redis, object of the store, or file of a gateway or worker names a job once all have expired."""
    found = measure("chaos", jobs=24, workers=2)
    assert found["left"] == 0, found["left_at"]
    assert (found["lost"], found["misreported"], found["mixed"]) == (0, 0, 0), found


@pytest.mark.long
def test_a_message_that_the_broker_lost_comes_back() -> None:
    found = measure("lost")
    assert found["removed"] and (found["results"], found["runs"]) == (3, 3)
