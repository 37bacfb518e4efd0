"""The queue of a gateway, on real Redis and a folder as object store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.exceptions import OperationalError
from redis.exceptions import ConnectionError as RedisConnectionError
from serve.test_background import until  # type: ignore[import-not-found]
from serving import sharp

from seesr.config import Configuration
from seesr.engine.rates import Quote, Rates
from seesr.fleet import jobs as fleet_jobs
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import CHANGES, HOOKS, PROBE, RUNNING, TIMES, WAITING
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.redis_client import RedisClient
from seesr.pipeline.work import Outline
from seesr.serving.job import DONE, LATER, NORMAL, URGENT, Job, Late, QueueFull, Unavailable
from seesr.settings import Settings

VERSION, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def make(configuration: Configuration, redis: RedisClient, objects: FileStore) -> Iterator[Callable[..., FleetJobs]]:
    """Makes the jobs of a gateway with these values of the configuration."""
    created: list[FleetJobs] = []

    def made(*others: str, **values: Any) -> FleetJobs:
        created.append(FleetJobs(configuration.model_copy(update=values), redis, objects, VERSION, others))
        return created[-1]

    yield made
    for jobs in created:
        jobs.close()


@pytest.fixture
def jobs(make: Callable[..., FleetJobs]) -> FleetJobs:
    return make()


def sent(jobs: FleetJobs, folder: Path, mask: bool = False, **values: Any) -> Job:
    for name in ("image", "mask"):
        (folder / name).write_bytes(sharp())
    job = Job.of(values.pop("owner", "ann"), Settings(seed=1), masked=mask, **values)
    jobs.submit(job, folder / "image", folder / "mask" if mask else None)
    return job


def messages(jobs: FleetJobs) -> int:
    client = jobs.redis.client
    return sum(client.llen(name) for name in client.keys("seesr-*") if client.type(name) == "list")


def quote(seconds: float | None, at_most: float | None = None, images: int = 9) -> Quote:
    return Quote("1x1", 1, seconds, seconds if at_most is None else at_most, 1, {}, None, images)


def test_a_gateway_is_ready_when_a_worker_of_its_version_is(jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.ready() == "no worker of this version is alive"
    jobs.registry.update("other@here", state="idle", version=OTHER)
    assert jobs.ready() == "no worker of this version is alive"
    jobs.registry.update("first@here", state="loading", version=VERSION)
    assert jobs.ready() == "the weights are loading"
    for state, reason in (("idle", None), ("busy", None), ("unloaded", "the weights are loading")):
        jobs.registry.update("second@here", state=state, version=VERSION)
        assert jobs.ready() == reason
    assert jobs.redis.client.exists(PROBE), "a Redis that takes no writes takes no jobs"
    jobs.registry.update("second@here", state="idle")
    monkeypatch.setattr(jobs.objects, "unavailable", lambda: "the object store is unavailable")
    assert jobs.ready() == "the object store is unavailable"
    monkeypatch.setattr(jobs.redis, "retry_at", time.monotonic() + 60)
    assert jobs.ready() == "the queue is unavailable: Redis does not answer"
    monkeypatch.setattr(jobs.redis, "retry_at", 0.0)
    jobs.stop()
    assert jobs.ready() == "the server is shutting down"


def test_workers_are_known_by_their_version(make: Callable[..., FleetJobs]) -> None:
    jobs = make(VERSION, OTHER)
    assert jobs.versions == [VERSION, OTHER]
    for name, version in (("a@here", VERSION), ("b@here", OTHER)):
        jobs.registry.update(name, version=version)
    assert [*jobs.workers_of()] == [*jobs.workers_of(VERSION)] == ["a@here"]
    assert [*jobs.workers_of(OTHER)] == ["b@here"]


def test_a_submitted_job_is_stored_with_its_files_and_published(jobs: FleetJobs, tmp_path: Path) -> None:
    plain, masked = sent(jobs, tmp_path), sent(jobs, tmp_path, mask=True, version=OTHER)
    assert [job.version for job in (plain, masked)] == [VERSION, OTHER]
    assert jobs.objects.read(f"in/{plain.id}") == jobs.objects.read(f"in/{masked.id}-mask") == sharp()
    assert not jobs.objects.exists(f"in/{plain.id}-mask")
    assert messages(jobs) == 2 and jobs.find(plain.id) == plain
    jobs.submit(plain, tmp_path / "image")  # sent again with its Idempotency-Key
    assert messages(jobs) == 2 and jobs.records.count_waiting() == 2
    jobs.stop()
    with pytest.raises(Unavailable, match="shutting down"):
        sent(jobs, tmp_path)


def test_a_job_that_cannot_be_published_leaves_nothing(
    jobs: FleetJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*values: Any, **more: Any) -> None:
        raise OperationalError("connection\n lost")

    monkeypatch.setattr(jobs.app, "send_task", fail)
    job = Job.of("ann", Settings(seed=1), masked=True)
    for name in ("image", "mask"):
        (tmp_path / name).write_bytes(sharp())
    with pytest.raises(Unavailable, match="the queue is unavailable: connection lost"):
        jobs.submit(job, tmp_path / "image", tmp_path / "mask")
    assert jobs.find(job.id) is None and not jobs.records.count_waiting()
    assert not any(jobs.objects.exists(f"in/{job.id}{kind}") for kind in ("", "-mask"))


def test_a_deadline_that_cannot_be_met_is_not_queued(jobs: FleetJobs, tmp_path: Path) -> None:
    values = {"output_size": "1x1", "tiles": 1, "seconds": 5.0, "seconds_at_most": 5.0, "bytes": 1,
              "peak_memory_mb": {}, "price": None, "images": 9}  # fmt: skip
    with pytest.raises(Late):
        sent(jobs, tmp_path, deadline=4.0, quote=values)
    assert not messages(jobs)
    sent(jobs, tmp_path, deadline=5.0, quote=values)
    assert messages(jobs) == 1


def test_the_queue_has_a_limit_and_a_key_its_share(make: Callable[..., FleetJobs], tmp_path: Path) -> None:
    jobs = make(max_queue=4, queue_share=0.5)
    jobs.redis.client.rpush(TIMES, 10, 20, 30)
    for name in ("a@here", "b@here"):
        jobs.registry.update(name, version=VERSION)
    for _ in range(4):
        sent(jobs, tmp_path)  # alone, it may fill the queue
    with pytest.raises(QueueFull) as full:
        sent(jobs, tmp_path)
    assert full.value.seconds == 4 * 20 / 2  # of the median image, on two workers
    sent(jobs, tmp_path, owner="bob")
    sent(jobs, tmp_path, owner="bob")
    for owner in ("bob", "ann"):
        with pytest.raises(QueueFull):
            sent(jobs, tmp_path, owner=owner)
    with pytest.raises(QueueFull):
        sent(jobs, tmp_path, owner="eve", share=0.0)


def test_the_time_to_come_again_is_known_without_images_or_workers(jobs: FleetJobs) -> None:
    few, many = jobs.expected_seconds(0), jobs.expected_seconds(10)
    assert 1 <= few <= many and many == 10 * jobs.expected_seconds(1)
    jobs.redis.client.rpush(TIMES, 2)
    assert jobs.expected_seconds(10) == 20 and jobs.median_seconds() == 2
    jobs.registry.update("a@here", version=OTHER)
    assert jobs.expected_seconds(10) == 20
    for name in ("a@here", "b@here"):
        jobs.registry.update(name, version=VERSION)
    assert jobs.expected_seconds(10) == 10


def test_a_quote_is_that_of_the_slowest_worker_of_the_version(
    make: Callable[..., FleetJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make(price_per_hour=7.0)
    outlines = [Outline(side, 3, 64, 1, (64,), 8, 256, 256) for side in range(4)]
    seconds = {outlines[0]: 2.0, outlines[1]: 3.0, outlines[2]: None}
    asked: list[tuple[Any, ...]] = []

    def make_quote(outline: Outline, rates: Rates, *values: Any) -> Quote:
        asked.append(values)
        return quote(seconds[outline])

    monkeypatch.setattr(fleet_jobs, "make_quote", make_quote)
    (tmp_path / "image").write_bytes(sharp(24, 18))
    job = Job.of("ann", Settings(seed=1))
    assert jobs.quote(job, tmp_path / "image") is None
    for number, name in enumerate(("a@here", "b@here", "c@here")):
        rates = Rates()
        rates.begin({"host": 1}, outlines[number])
        jobs.registry.update(name, version=VERSION, rates=rates.state())
    jobs.registry.update("d@here", version=VERSION, rates=Rates().state())  # it has not loaded yet
    jobs.registry.update("e@here", version=OTHER)
    result = jobs.quote(job, tmp_path / "image")
    assert result is not None and (result.seconds, result.wait) == (3.0, 0.0)
    assert asked == [(Settings(seed=job.settings["seed"]), (24, 18), 7.0)] * 3
    for number in range(5):
        jobs.redis.client.zadd(RUNNING, {f"running{number}": time.time() - 1})
    result = jobs.quote(job, tmp_path / "image")
    assert result is not None and result.wait == pytest.approx(5 * (3 - 1) / 4, abs=0.1)  # on four workers
    assert jobs.quote(Job.of("ann", Settings(seed=1), version=OTHER), tmp_path / "image") is None


def test_the_wait_counts_what_is_as_urgent_and_what_runs(jobs: FleetJobs, tmp_path: Path) -> None:
    for priority in (URGENT, NORMAL, LATER):
        sent(jobs, tmp_path, priority=priority)
    jobs.redis.client.zadd(RUNNING, {"young": time.time() - 1, "overdue": time.time() - 100})
    jobs.redis.client.rpush(TIMES, 4)
    for priority, ahead in ((URGENT, 1), (NORMAL, 2), (LATER, 3)):
        job = Job.of("ann", Settings(seed=1), priority=priority)
        assert jobs.wait_for(job, 2, 99.0) == pytest.approx((ahead * 4 + 3) / 2, abs=0.05)
    job = Job.of("ann", Settings(seed=1), priority=NORMAL)
    assert jobs.wait_for(job, 5, 99.0) == 0.0 and jobs.wait_for(job, 4, 99.0) > 0
    jobs.redis.client.delete(TIMES)
    assert jobs.wait_for(job, 2, 10.0) == pytest.approx((2 * 10 + 9) / 2, abs=0.05)
    exact = jobs.wait_for(job, 3, 10.0)
    assert exact == round(exact, 3)


def test_a_waiting_job_is_canceled_at_once_and_a_running_one_is_told(jobs: FleetJobs, tmp_path: Path) -> None:
    waiting, running = (sent(jobs, tmp_path, webhook="https://a.test/") for _ in range(2))
    jobs.records.begin(running.id)
    assert jobs.ahead([waiting.id, running.id]) == {waiting.id: 1}
    for job in (waiting, running):
        jobs.cancel(job.id)
    first, second = jobs.find(waiting.id), jobs.find(running.id)
    assert first and second and (first.status, second.status, second.cancel) == ("canceled", "processing", True)
    assert jobs.redis.client.zrange(HOOKS, 0, -1) == [f"{waiting.id} completed"]
    assert not jobs.objects.exists(f"in/{waiting.id}") and jobs.objects.exists(f"in/{running.id}")


def test_a_batch_belongs_to_its_owner(jobs: FleetJobs, tmp_path: Path) -> None:
    ids = [sent(jobs, tmp_path, batch="c" * 32).id for _ in range(3)]
    assert [job.id for job in jobs.batch("ann", "c" * 32)] == ids and jobs.batch("bob", "c" * 32) == []
    assert [job.id for job in jobs.recent("ann", 2)] == ids[:0:-1]


def test_the_status_of_a_gateway(jobs: FleetJobs, tmp_path: Path) -> None:
    empty = jobs.status()
    assert (empty["queue_length"], empty["oldest_wait_seconds"], empty["running"]) == (0, 0.0, None)
    assert abs(empty["since"] - time.time()) < 60 and empty["engine"] is None and empty["loaded"] == []
    old, young = (sent(jobs, tmp_path) for _ in range(2))
    jobs.redis.client.zadd(WAITING, {old.id: time.time() - 100})
    jobs.records.begin(young.id)
    jobs.registry.update("w@here", version=VERSION)
    status = jobs.status()
    assert status["queue_length"] == 1 and status["oldest_wait_seconds"] == pytest.approx(100, abs=5)
    (running,) = status["running"]
    assert running["id"] == young.id and abs(running["since"] - time.time()) < 5
    assert status["loaded"] == [VERSION] and status["workers"] == {"w@here": {"version": VERSION}}
    assert jobs.quotes_every_job is False, "only jobs with a deadline need the rates of the workers"


def test_a_result_is_fetched_from_the_store(jobs: FleetJobs) -> None:
    jobs.objects.put("out/x.png", b"result")
    assert jobs.result(Job("ann", {}, output="x.png", status=DONE)).read_bytes() == b"result"


def test_changes_wake_those_who_wait_also_after_redis_was_away(
    jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    woken: list[str] = []
    pauses: list[float] = []
    client = jobs.redis.client
    monkeypatch.setattr(jobs.listeners, "wake", woken.append)
    monkeypatch.setattr(jobs.listeners, "wake_all", lambda: woken.append("all"))
    monkeypatch.setattr(fleet_jobs, "time", SimpleNamespace(sleep=pauses.append, time=time.time))

    def heard() -> bool:
        return dict(client.pubsub_numsub(CHANGES)).get(CHANGES, 0) == 1

    thread = threading.Thread(target=jobs.listen, daemon=True)
    thread.start()
    until(heard)
    client.publish(CHANGES, "one")
    until(lambda: woken == ["all", "one"])
    client.client_kill_filter(_type="pubsub")
    until(lambda: pauses and heard())
    client.publish(CHANGES, "two")
    until(lambda: woken == ["all", "one", "all", "two"])
    assert pauses == [1]
    jobs.stop()
    thread.join(5)
    assert not thread.is_alive() and woken[-1] == "all", "a stopping gateway lets all of them go"


def test_an_error_of_redis_is_told_in_one_line(jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(owner: str) -> int:
        raise RedisConnectionError("a\nb")

    monkeypatch.setattr(jobs.records, "lane", fail)
    with pytest.raises(Unavailable, match="the queue is unavailable: a b"):
        jobs.publish(Job("ann", {}))
