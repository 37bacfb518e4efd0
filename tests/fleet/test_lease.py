"""The threads of a worker's parent: the lease on its jobs, and its entry in the registry."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from seesr.config import Configuration
from seesr.fleet import lease
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.transport import UNACKED_INDEX
from seesr.fleet.worker_registry import ALIVE, WorkerRegistry
from seesr.networks import weights
from seesr.serving.identity import version_of
from seesr.serving.job import Unavailable
from seesr.serving.supervisor import Supervisor


def test_jobs_that_were_taken_count_as_taken_just_now(redis: RedisClient, monkeypatch: pytest.MonkeyPatch) -> None:
    redis.client.zadd(UNACKED_INDEX, {"mine": 1, "theirs": 2})
    monkeypatch.setattr(lease, "taken_tags", lambda: ["mine", "acknowledged"])
    lease.renew(redis)
    tags = dict(redis.client.zrange(UNACKED_INDEX, 0, -1, withscores=True))
    assert tags == {"mine": pytest.approx(time.time(), abs=5), "theirs": 2.0}
    monkeypatch.setattr(lease, "taken_tags", list)
    lease.renew(redis)
    assert redis.client.zcard(UNACKED_INDEX) == 2


def test_work_is_repeated_until_the_end_also_while_redis_is_away(caplog: pytest.LogCaptureFixture) -> None:
    calls, waited = list[int](), list[float]()

    def work() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise Unavailable("Redis does not answer")

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        return len(waited) == 3

    with caplog.at_level(logging.WARNING):
        lease.every(7.0, SimpleNamespace(wait=wait), work)  # type: ignore[arg-type]
    assert len(calls) == 3 and waited == [7.0] * 3 and "Redis does not answer" in caplog.text


@pytest.mark.parametrize(("seconds", "lease_pause", "registry_pause"), [(60, 10, 10), (600, 100, 10), (6, 1, 1)])
def test_leases_and_entries_are_renewed_well_before_they_end(
    seconds: int, lease_pause: float, registry_pause: float, configuration: Configuration, redis: RedisClient,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pauses: dict[str, float] = {}
    renewed: list[str] = []

    def thread(supervisor: Supervisor, name: str, work: Callable[[], None]) -> None:
        def every(pause: float, stopping: threading.Event, work: Callable[[], None]) -> None:
            pauses[name] = pause
            work()

        monkeypatch.setattr(lease, "every", every)
        work()

    def usage() -> Any:
        return {"used": 1, "total": 2}

    monkeypatch.setattr(Supervisor, "thread", thread)
    monkeypatch.setattr(lease, "renew", lambda redis: renewed.append(redis.url))
    monkeypatch.setattr(lease, "gpu_usage", usage)
    lease.start_threads(configuration.model_copy(update={"lease": seconds}))
    assert pauses == {"lease": lease_pause, "registry": registry_pause} and renewed == [configuration.redis]
    assert registry_pause * 3 <= ALIVE
    assert WorkerRegistry(redis).workers() == {
        "w@here": {
            "version": version_of(weights.POCKET), "parent": os.getpid(), "gpu": usage(), "failures": {},
        }
    }  # fmt: skip


def test_the_threads_start_once_with_the_first_connection(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery starts the step again each time that it connects again."""
    started: list[Any] = []
    monkeypatch.setattr(lease.Lease, "supervisor", None)
    monkeypatch.setattr(lease, "start_threads", lambda configuration: started.append(configuration) or Supervisor())
    step = object.__new__(lease.Lease)
    step.start(None)
    step.start(None)
    assert len(started) == 1 and isinstance(lease.Lease.supervisor, Supervisor)
