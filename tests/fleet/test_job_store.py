"""Records of jobs in a real Redis."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from seesr.fleet import job_store
from seesr.fleet.job_store import EXEMPLARS, EXPIRY, HOOKS, RUNNING, TIMES, WAITING, JobStore
from seesr.fleet.redis_client import RedisClient
from seesr.serving.job import CANCELED, DONE, FAILED, LATER, NORMAL, URGENT, Job
from seesr.serving.job_counts import JobCounts
from seesr.settings import Settings

METRICS = {
    "seconds": {"denoise": 0.5}, "tiles": 3, "steps": 2, "out_of_memory_retries": 1, "float32_retries": 2,
    "output_size": "2000x1000",
}  # fmt: skip


@pytest.fixture
def store(redis: RedisClient) -> JobStore:
    return JobStore(redis, 3600)


def added(store: JobStore, **values: Any) -> Job:
    job = Job.of(values.pop("owner", "ann"), Settings(seed=1), **values)
    assert store.add(job)
    return job


def found(store: JobStore, job: Job) -> Job:
    result = store.find(job.id)
    assert result is not None
    return result


def test_a_new_job_waits_and_a_second_one_of_its_id_is_not_taken(store: JobStore) -> None:
    job = added(store, batch="b" * 32, created=1000.0)
    client = store.redis.client
    assert store.find(job.id) == job and store.find("0" * 32) is None
    assert not store.add(dataclasses.replace(job, name="other")) and found(store, job).name == job.name
    assert client.zscore(WAITING, job.id) == client.zscore("seesr:owner:ann", job.id) == 1000.0
    assert client.zscore(EXPIRY, f"job:{job.id}") == 4600.0
    assert [each.id for each in store.batch("b" * 32)] == [job.id] and not client.exists("seesr:batch-jobs:None")
    added(store)
    assert client.llen(f"seesr:batch-jobs:{'b' * 32}") == 1 and store.count_waiting() == 2


def test_a_job_is_begun_once_more_at_each_attempt_until_it_has_ended(store: JobStore) -> None:
    job, client = added(store), store.redis.client
    assert [store.begin(job.id) for _ in range(2)] == ["1", "2"]
    begun = found(store, job)
    assert begun.status == "processing" and begun.attempts == 2 and begun.revision == 2
    assert begun.started and abs(begun.started - time.time()) < 5
    assert not store.count_waiting() and store.running_since() == [pytest.approx(begun.started, abs=1e-3)]
    ended = store.end(job.id, DONE, output="x.png")
    assert ended and (ended.status, ended.output, ended.revision) == (DONE, "x.png", 3)
    assert ended.completed and abs(ended.completed - time.time()) < 5 and not client.zcard(RUNNING)
    assert store.end(job.id, FAILED) is None and found(store, job).status == DONE
    assert (store.begin(job.id), store.begin("gone")) == ("ended", "gone")


def test_a_cancellation_ends_what_waits_and_marks_what_runs(store: JobStore) -> None:
    waiting, running = added(store), added(store)
    store.begin(running.id)
    canceled = store.cancel(waiting.id)
    assert canceled and canceled.status == CANCELED and store.cancel(running.id) is None
    assert found(store, running).cancel and found(store, running).status == "processing"
    job = found(store, waiting)
    store.report(running, stage="denoise", done=3)
    assert running.cancel and (found(store, running).stage, found(store, running).done) == ("denoise", 3)
    fresh = added(store)
    store.report(fresh, done=1)
    assert not fresh.cancel and found(store, fresh).revision == 1 and not found(store, fresh).cancel
    assert job.cancel and store.update("gone", done=1) == "gone" and store.find("gone") is None


def test_an_owner_reads_its_jobs_page_by_page_newest_first(store: JobStore) -> None:
    jobs = [added(store, created=float(number)) for number in range(5)]
    added(store, owner="bob", created=9.0)
    ids = [job.id for job in jobs][::-1]
    assert [job.id for job in store.recent("ann", 2, None)] == ids[:2]
    assert [job.id for job in store.recent("ann", 2, 3.0)] == ids[2:4]
    store.redis.client.delete(f"seesr:job:{ids[0]}")
    assert [job.id for job in store.recent("ann", 2, None)] == ids[1:2]
    assert store.many([]) == []


def test_the_jobs_before_one_are_those_that_are_as_urgent(store: JobStore) -> None:
    for priority in (URGENT, NORMAL, NORMAL, LATER):
        added(store, priority=priority)
    store.redis.client.zadd(WAITING, {"gone": 1})
    assert [store.count_ahead(priority) for priority in (URGENT, NORMAL, LATER)] == [1, 3, 4]
    added(store, owner="bob")
    assert sorted(store.waiting_owners()) == ["ann"] * 4 + ["bob"]


def test_ended_jobs_add_up_as_on_one_server(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_store, "MAX_KEYS", 2)
    monkeypatch.setattr("seesr.serving.job_counts.MAX_KEYS", 2)
    alone = JobCounts()
    for owner in ("ann", "bob", "eve", "ann"):
        job = added(store, owner=owner)
        store.begin(job.id)
        ended = store.end(job.id, DONE, metrics=METRICS)
        assert ended
        alone.add(ended)
    failed = store.end(added(store).id, FAILED, error="x")
    assert failed
    alone.add(failed)
    counts, seen = store.counts()
    expected, exemplars = alone.snapshot()
    assert counts == pytest.approx(expected) and ("key_jobs", "(other)", DONE) in counts and seen == exemplars
    assert 3590 < store.redis.client.ttl(EXEMPLARS) <= 3600, "no id of a job outlives the last job"


def test_the_seconds_of_the_last_fifty_images_are_kept(store: JobStore) -> None:
    for number in range(53):
        store.count(Job("ann", {}, status=DONE, metrics=METRICS, started=10.0, completed=10.0 + number))
    store.count(Job("ann", {}, status=FAILED, metrics=METRICS, started=10.0, completed=999.0))
    store.count(Job("ann", {}, status=DONE, started=10.0, completed=999.0))  # found after a crash
    assert [float(text) for text in store.redis.client.lrange(TIMES, 0, -1)] == [*range(52, 2, -1)]


def test_a_job_is_forgotten_with_its_places_in_every_list(store: JobStore) -> None:
    job, other = (added(store, batch="b" * 32) for _ in range(2))
    store.begin(job.id)
    forgotten = store.forget(job.id)
    assert forgotten and forgotten.id == job.id and store.find(job.id) is None
    assert [each.id for each in store.batch("b" * 32)] == [each.id for each in store.recent("ann", 9, None)]
    assert [each.id for each in store.batch("b" * 32)] == [other.id] and not store.redis.client.zcard(RUNNING)
    store.forget(other.id)
    assert not store.count_waiting() and store.forget("gone") is None
    assert not store.redis.client.exists("seesr:owner:ann", f"seesr:batch-jobs:{'b' * 32}")
    plain = added(store)
    store.forget(plain.id)
    assert not store.recent("ann", 9, None)


def test_a_webhook_is_claimed_by_one_gateway_for_as_long_as_it_renews(store: JobStore) -> None:
    client = store.redis.client
    for job, event in (
        (Job("ann", {}, id="a", webhook="https://a.test/"), "start"),
        (Job("ann", {}, id="b", webhook="https://a.test/", events=["completed"]), "completed"),
        (Job("ann", {}, id="c", webhook="https://a.test/", events=["completed"]), "start"),
        (Job("ann", {}, id="d"), "completed"),
    ):
        store.hook(job, event)
    client.zadd(HOOKS, {"a start": time.time() - 9, "b completed": time.time() - 8})
    assert [store.claim_hook(100) for _ in range(3)] == [("a", "start"), ("b", "completed"), None]
    store.drop_hook("a", "start")
    store.renew_hooks([("a", "start"), ("b", "completed")], 500)
    store.renew_hooks([], 500)
    hooks = client.zrange(HOOKS, 0, -1, withscores=True)
    assert hooks == [("b completed", pytest.approx(time.time() + 500, abs=5))], "a message that was sent stays removed"


def test_owners_have_lanes_of_their_own(store: JobStore) -> None:
    lanes = [store.lane(f"owner {number}") for number in range(job_store.LANES + 2)]
    assert lanes == [*range(job_store.LANES), 0, 1] and store.lane("owner 3") == 3


def test_a_piece_of_a_record_is_no_job() -> None:
    assert job_store.decoded({}) is None and job_store.decoded({"stage": '"denoise"'}) is None
