"""Recovery of jobs in Redis and files in the store: what is published again, and what expires."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import redis.exceptions
from serve.test_background import until  # type: ignore[import-not-found]

from seesr.config import Configuration
from seesr.fleet import worker
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import EXPIRY, WAITING, JobStore
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.maintenance import Maintenance
from seesr.fleet.metadata_store import FleetMetadataStore
from seesr.fleet.redis_client import RedisClient
from seesr.object_store import Store
from seesr.serving.job import DONE, FAILED, Job, Unavailable
from seesr.serving.metadata_store import remove_older
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def gateways(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> dict[str, FleetJobs]:
    """One of each version, on an empty Redis."""
    redis = RedisClient(configuration.redis or "")
    redis.client.flushall()
    objects = FileStore(Store.configured(), configuration.data / "fetched")
    return {version: FleetJobs(configuration, redis, objects, version) for version in (OLD, NEW)}


def sent(jobs: FleetJobs, folder: Path) -> Job:
    image = folder / "image"
    image.write_bytes(b"image")
    job = Job.of("ann", Settings(seed=1))
    jobs.submit(job, image)
    return job


def test_a_lost_job_is_published_again_by_its_version_alone(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    job = sent(gateways[OLD], tmp_path)
    redis = gateways[OLD].redis
    for name in redis.client.keys("seesr-*"):
        redis.client.delete(name)  # the message is lost
    redis.client.zadd(WAITING, {job.id: time.time() - 100})
    for version, published in ((NEW, 0), (OLD, 1)):
        maintenance = Maintenance(gateways[version], 2, None)  # type: ignore[arg-type]
        versions = maintenance.claim_turn()
        assert versions
        for _ in range(2):
            maintenance.reconcile(versions)
        lists = [name for name in redis.client.keys("seesr-*") if redis.client.type(name) == "list"]
        assert sum(redis.client.llen(name) for name in lists) == published
        assert all(name.startswith(f"seesr-{OLD[:12]}") for name in lists)


def test_a_waiting_job_knows_how_many_run_or_wait_before_it(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    jobs = gateways[OLD]
    ids = [sent(jobs, tmp_path).id for _ in range(3)]
    assert jobs.ahead(ids) == {ids[0]: 0, ids[1]: 1, ids[2]: 2}
    jobs.records.begin(ids[0])
    assert jobs.ahead([*ids, "unknown"]) == {ids[1]: 1, ids[2]: 2}


def test_only_ended_jobs_expire(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    jobs = gateways[OLD]
    job = sent(jobs, tmp_path)
    maintenance = Maintenance(jobs, 2, None)  # type: ignore[arg-type]
    jobs.redis.client.zadd(EXPIRY, {f"job:{job.id}": 1})
    jobs.registry.update("w@here", version=OLD, state="unloaded")
    maintenance.expire()
    assert jobs.find(job.id) and jobs.objects.exists(f"in/{job.id}")
    assert jobs.records.end(job.id, FAILED)
    assert jobs.redis.client.zscore(EXPIRY, f"job:{job.id}") > time.time() + 3600
    jobs.redis.client.zadd(EXPIRY, {f"job:{job.id}": 1})
    maintenance.expire()
    assert not jobs.find(job.id) and not jobs.objects.exists(f"in/{job.id}")
    assert not jobs.redis.client.zcard(EXPIRY)


def test_a_job_whose_version_no_worker_has_fails_when_its_time_is_over(
    gateways: dict[str, FleetJobs], tmp_path: Path
) -> None:
    jobs = gateways[OLD]
    jobs.registry.update("w@here", version=NEW, state="idle")
    job = sent(jobs, tmp_path)
    jobs.redis.client.zadd(EXPIRY, {f"job:{job.id}": 1})
    maintenance = Maintenance(jobs, 2, None)  # type: ignore[arg-type]
    maintenance.expire()
    stored = jobs.find(job.id)
    assert stored and stored.status == FAILED and f"no worker of version {OLD[:12]}" in (stored.error or "")
    assert not jobs.objects.exists(f"in/{job.id}") and not jobs.redis.client.zcard(WAITING)


def test_files_without_a_record_are_removed_when_they_are_old(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    """Of a gateway that was killed, a worker whose job had ended, and a Redis that lost its last writes."""
    jobs, store = gateways[OLD], tmp_path / "store"
    job = sent(jobs, tmp_path)
    expected = [f"in/{job.id}", f"in/{job.id}-mask", f"out/{job.id}.png", "elsewhere/file", f"in/{'2' * 32}"]
    gone = [f"in/{'0' * 32}", f"in/{'0' * 32}-mask", f"out/{'1' * 32}.png", f"uploads/{'3' * 32}"]
    for name in [*expected, *gone]:
        jobs.objects.put(name, b"file")
        old = time.time() - jobs.records.keep - 60
        os.utime(store / name, None if name == expected[-1] else (old, old))
    Maintenance(jobs, 2, None).sweep()  # type: ignore[arg-type]
    results = {path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file()}
    assert results == set(expected)
    jobs.objects.put(gone[0], b"file")
    os.utime(store / gone[0], (1, 1))
    Maintenance(jobs, 2, None).sweep()  # type: ignore[arg-type]
    assert (store / gone[0]).exists()  # another gateway looked a moment ago


def test_a_late_worker_does_not_recreate_a_deleted_record(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    jobs = gateways[OLD]
    job = sent(jobs, tmp_path)
    jobs.records.forget(job.id)
    jobs.records.report(job, stage="denoise")
    assert job.cancel and not jobs.redis.client.exists(f"seesr:job:{job.id}")
    jobs.cancel(job.id)
    assert not jobs.redis.client.exists(f"seesr:job:{job.id}")


def test_files_of_killed_runs_are_removed_from_a_workers_disk(
    gateways: dict[str, FleetJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    child = object.__new__(worker.Child)
    child.objects, child.supervisor = gateways[OLD].objects, Supervisor()
    monkeypatch.setattr(worker, "configuration", worker.configuration.model_copy(update={"keep": 0.2 / 3600}))
    (child.objects.cache / "in-abc").write_bytes(b"of a killed run")
    child.supervisor.thread("cache", child.trim)
    until(lambda: not list(child.objects.cache.iterdir()))
    child.supervisor.stop()


@pytest.mark.parametrize(
    "error", ["BusyLoadingError", "ReadOnlyError", "ConnectionError", "TimeoutError", "OutOfMemoryError"]
)
def test_a_redis_that_cannot_be_used_counts_as_unavailable(configuration: Configuration, error: str) -> None:
    """BusyLoadingError: it reads its files (LOADING). ReadOnlyError: it was demoted."""

    def work(client: Any) -> None:
        raise getattr(redis.exceptions, error)("said by Redis")

    with pytest.raises(Unavailable, match="Redis does not answer|memory limit"):
        RedisClient(configuration.redis or "")(work)


def test_a_record_with_fields_of_a_newer_version_is_read(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    jobs = gateways[OLD]
    job = sent(jobs, tmp_path)
    settings = {**job.settings, "of_tomorrow": 1}
    fields = {"of_tomorrow": "[1]", "settings": json.dumps(settings)}
    jobs.redis.client.hset(f"seesr:job:{job.id}", mapping=fields)
    for result in (jobs.find(job.id), *jobs.recent("ann", 10)):
        assert result and result.id == job.id and result.suffix == "png"


def test_a_file_that_another_thread_removes_meanwhile_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"old")
        os.utime(tmp_path / name, (1, 1))
    real = Path.stat

    def stat(path: Path, **more: Any) -> os.stat_result:
        if path.name == "a":
            path.unlink(missing_ok=True)
        return real(path, **more)

    monkeypatch.setattr(Path, "stat", stat)
    remove_older(tmp_path, time.time())
    assert not list(tmp_path.iterdir())


def test_a_batch_is_there_for_as_long_as_one_of_its_jobs(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    jobs, batch = gateways[OLD], "b" * 32
    store, maintenance = FleetMetadataStore(jobs.redis, jobs.objects, tmp_path, 60), Maintenance(jobs, 2, None)  # type: ignore[arg-type]
    job = Job.of("ann", Settings(seed=1), batch=batch, status=DONE)
    jobs.records.add(job)
    store.keep_note(batch, {"refused": [], "owner": "ann"})
    jobs.redis.client.zadd(EXPIRY, {f"batch:{batch}": 1})
    maintenance.expire()
    assert store.note(batch)
    jobs.redis.client.zadd(EXPIRY, {f"batch:{batch}": 2, f"job:{job.id}": 1})
    maintenance.expire()
    assert not store.note(batch) and not jobs.redis.client.zcard(EXPIRY)


def test_a_redis_that_hangs_and_then_takes_the_record_keeps_its_file(
    gateways: dict[str, FleetJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, real, added = gateways[OLD], JobStore.add, []

    def late(records: JobStore, job: Job) -> bool:
        real(records, job)
        added.append(job)
        records.redis.retry_at = time.monotonic() + 1
        raise Unavailable("the queue is unavailable: Redis does not answer")

    monkeypatch.setattr(JobStore, "add", late)
    with pytest.raises(Unavailable):
        sent(jobs, tmp_path)
    jobs.redis.retry_at = 0.0
    assert jobs.find(added[0].id) and jobs.objects.exists(f"in/{added[0].id}")
    monkeypatch.undo()
    image = tmp_path / "image"
    image.write_bytes(b"image")
    jobs.submit(added[0], image)  # sent again with its Idempotency-Key: neither a second record nor a second message
    assert not [name for name in jobs.redis.client.keys("seesr-*") if jobs.redis.client.type(name) == "list"]


def test_an_order_that_no_worker_takes_is_forgotten(gateways: dict[str, FleetJobs]) -> None:
    gateways[OLD].registry.send("nobody@here", "load")
    assert 0 < gateways[OLD].redis.client.ttl("seesr:orders:nobody@here") <= 86400


def test_a_job_that_redis_did_not_take_leaves_no_file(
    gateways: dict[str, FleetJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: Any) -> None:
        raise Unavailable("the queue is unavailable")

    monkeypatch.setattr(JobStore, "add", away)
    with pytest.raises(Unavailable):
        sent(gateways[OLD], tmp_path)
    assert not list((tmp_path / "store" / "in").glob("*"))


def test_a_result_is_looked_for_before_a_job_fails(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    """Redis lost the end of the job; its input is removed already."""
    jobs = gateways[OLD]
    child = object.__new__(worker.Child)
    child.records, child.objects = jobs.records, jobs.objects
    ended = []
    for result in (True, False):
        job = sent(jobs, tmp_path)
        jobs.objects.drop_inputs(job)
        if result:
            jobs.objects.put(f"out/{job.id}.png", b"result")
        child.run(job)
        stored = jobs.find(job.id)
        assert stored
        ended.append((stored.status, stored.output))
    assert ended[0] == (DONE, f"{ended[0][1]}") and ended[0][1]
    assert ended[1] == (FAILED, None)


def test_a_worker_retries_the_store_and_then_names_it(
    gateways: dict[str, FleetJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, answers = (
        gateways[OLD],
        iter([Unavailable("the store is unavailable"), Unavailable("the store is unavailable"), "stored"]),
    )
    child = object.__new__(worker.Child)
    child.records, child.objects = jobs.records, jobs.objects

    def put() -> str:
        answer = next(answers)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    assert child.until_stored(put) == "stored"
    quick = worker.configuration.model_copy(update={"store_retry": 0.1, "store": "s3://images"})
    monkeypatch.setattr(worker, "configuration", quick)

    def away(name: str) -> Path:
        raise Unavailable("the object store is unavailable")

    job = sent(jobs, tmp_path)
    monkeypatch.setattr(child.objects, "get", away)
    child.run(job)
    stored = jobs.find(job.id)
    assert stored and stored.error and "s3://images" in stored.error and "SEESR_STORE_RETRY" in stored.error
