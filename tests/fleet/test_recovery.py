"""Jobs in Redis and files in the store after a fault: what is published again, what expires, what a worker finds."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fleet.test_background import configuration, redis_url  # type: ignore[import-not-found]  # noqa: F401
from redis.exceptions import ReadOnlyError

from seesr.config import Configuration
from seesr.fleet import worker
from seesr.fleet.file_store import Objects
from seesr.fleet.job_store import EXPIRY, WAITING, Records
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.maintenance import Upkeep
from seesr.fleet.redis_client import Link
from seesr.fleet.transport import Transport
from seesr.object_store import Store
from seesr.serving.job import DONE, FAILED, Away, Job
from seesr.settings import Settings

OLD, NEW = "a" * 64, "b" * 64


@pytest.fixture
def gateways(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> dict[str, FleetJobs]:  # noqa: F811
    """One of each version, on an empty Redis."""
    link = Link(configuration.redis or "")
    link.redis.flushall()
    objects = Objects(Store.configured(), configuration.data / "fetched")
    return {version: FleetJobs(configuration, link, objects, version) for version in (OLD, NEW)}


def sent(jobs: FleetJobs, folder: Path) -> Job:
    image = folder / "image"
    image.write_bytes(b"image")
    job = Job.of("ann", Settings(seed=1))
    jobs.submit(job, image)
    return job


def test_a_lost_job_is_published_again_by_its_version_alone(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    job = sent(gateways[OLD], tmp_path)
    link = gateways[OLD].link
    for name in link.redis.keys("seesr-*"):
        link.redis.delete(name)  # the message is lost
    link.redis.zadd(WAITING, {job.id: time.time() - 100})
    for version, published in ((NEW, 0), (OLD, 1)):
        upkeep = Upkeep(gateways[version], 2, None)  # type: ignore[arg-type]
        assert upkeep.claim_turn()
        for _ in range(2):
            upkeep.reconcile()
        lists = [name for name in link.redis.keys("seesr-*") if link.redis.type(name) == "list"]
        assert sum(link.redis.llen(name) for name in lists) == published
        assert all(name.startswith(f"seesr-{OLD[:12]}") for name in lists)


def test_only_ended_jobs_expire(gateways: dict[str, FleetJobs], tmp_path: Path) -> None:
    jobs = gateways[OLD]
    job = sent(jobs, tmp_path)
    upkeep = Upkeep(jobs, 2, None)  # type: ignore[arg-type]
    jobs.link.redis.zadd(EXPIRY, {f"job:{job.id}": 1})
    upkeep.expire()
    assert jobs.find(job.id) and jobs.objects.exists(f"in/{job.id}")
    assert jobs.records.end(job.id, FAILED)
    assert jobs.link.redis.zscore(EXPIRY, f"job:{job.id}") > time.time() + 3600
    jobs.link.redis.zadd(EXPIRY, {f"job:{job.id}": 1})
    upkeep.expire()
    assert not jobs.find(job.id) and not jobs.objects.exists(f"in/{job.id}")
    assert not jobs.link.redis.zcard(EXPIRY)


def test_a_job_that_redis_did_not_take_leaves_no_file(
    gateways: dict[str, FleetJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*given: Any) -> int:
        raise Away("the queue is away")

    monkeypatch.setattr(Records, "add", away)
    with pytest.raises(Away):
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
        found = jobs.find(job.id)
        assert found
        ended.append((found.status, found.output))
    assert ended[0] == (DONE, f"{ended[0][1]}") and ended[0][1]
    assert ended[1] == (FAILED, None)


def test_a_worker_retries_the_store_and_then_names_it(
    gateways: dict[str, FleetJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs, answers = gateways[OLD], iter([Away("away"), Away("away"), "stored"])
    child = object.__new__(worker.Child)
    child.records, child.objects = jobs.records, jobs.objects

    def put() -> str:
        answer = next(answers)
        if isinstance(answer, Away):
            raise answer
        return answer

    assert child.until_stored(put) == "stored"
    quick = worker.configuration.model_copy(update={"store_retry": 0.1, "store": "s3://images"})
    monkeypatch.setattr(worker, "configuration", quick)

    def away(name: str) -> Path:
        raise Away("the object store is away")

    job = sent(jobs, tmp_path)
    monkeypatch.setattr(child.objects, "get", away)
    child.run(job)
    found = jobs.find(job.id)
    assert found and found.error and "s3://images" in found.error and "SEESR_STORE_RETRY" in found.error


def test_a_worker_connects_again_after_a_read_only_redis() -> None:
    assert ReadOnlyError in Transport.connection_errors
