"""Background work of a gateway on real Redis: what expires, what is published again, and which webhooks are sent."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from seesr.config import Configuration
from seesr.fleet import maintenance
from seesr.fleet.broker import queue_of
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import EXPIRY, HOOKS, RUNNING, WAITING
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.maintenance import Maintenance, record_key
from seesr.fleet.metadata_store import FleetMetadataStore
from seesr.fleet.redis_client import RedisClient
from seesr.serving.job import DONE, FAILED, Job, Unavailable
from seesr.settings import Settings

sleep = asyncio.sleep  # also where a test replaces it
VERSION, OTHER = "a" * 64, "b" * 64
HOOK = "https://a.test/"


@pytest.fixture
def jobs(configuration: Configuration, redis: RedisClient, objects: FileStore) -> Iterator[FleetJobs]:
    jobs = FleetJobs(configuration, redis, objects, VERSION)
    yield jobs
    jobs.close()


@pytest.fixture
def metadata(jobs: FleetJobs, tmp_path: Path) -> FleetMetadataStore:
    return FleetMetadataStore(jobs.redis, jobs.objects, tmp_path / "data", 3600)


def sent(jobs: FleetJobs, folder: Path, **values: Any) -> Job:
    image = folder / "image"
    image.write_bytes(b"image")
    job = Job.of("ann", Settings(seed=1), **values)
    jobs.submit(job, image)
    return job


def maintain(jobs: FleetJobs, send_once: Any = None, lease: int = 2) -> Maintenance:
    return Maintenance(jobs, lease, send_once)


def uploaded(metadata: FleetMetadataStore, folder: Path, owner: str = "ann") -> str:
    """The id of a new upload."""
    id = os.urandom(16).hex()
    (folder / id).write_bytes(b"upload")
    metadata.keep_upload(owner, {"id": id}, folder / id)
    return id


def test_every_record_that_is_due_is_handled_in_one_turn(
    jobs: FleetJobs, metadata: FleetMetadataStore, tmp_path: Path
) -> None:
    """In any order: those that stay do not keep those behind them."""
    client = jobs.redis.client
    jobs.registry.update("w@here", version=VERSION, state="idle")
    waiting, ended, failed = (sent(jobs, tmp_path) for _ in range(3))
    jobs.records.end(ended.id, DONE, output=f"{ended.id}.png")
    jobs.objects.put(f"out/{ended.id}.png", b"result")
    jobs.records.end(failed.id, FAILED, error="x")
    kept, over = "c" * 32, "d" * 32
    member = Job.of("ann", Settings(seed=1), batch=kept, status=DONE)
    jobs.records.add(member)
    for batch in (kept, over):
        metadata.keep_note(batch, {"refused": [], "owner": "ann"})
    upload, other = uploaded(metadata, tmp_path), uploaded(metadata, tmp_path, "bob")
    due = [f"job:{waiting.id}", f"batch:{kept}", f"job:{ended.id}", f"batch:{over}", f"upload:{upload}", "job:gone",
           f"job:{failed.id}", f"upload:{'e' * 32}"]  # fmt: skip
    client.zadd(EXPIRY, {name: number for number, name in enumerate(due)})
    before = time.time()
    maintain(jobs, lease=60).expire()
    assert [job.id for job in jobs.recent("ann", 9)] == [member.id, waiting.id]
    assert jobs.objects.exists(f"in/{waiting.id}")
    assert not any(jobs.objects.exists(name) for name in (f"in/{ended.id}", f"out/{ended.id}.png", f"uploads/{upload}"))
    assert metadata.note(kept) and not metadata.note(over)
    assert not metadata.uploads("ann") and not client.zcard("seesr:uploads:ann")
    assert [record["id"] for record in metadata.uploads("bob")] == [other] and jobs.objects.exists(f"uploads/{other}")
    later = dict(client.zrange(EXPIRY, 0, -1, withscores=True))
    assert set(later) == {f"job:{waiting.id}", f"batch:{kept}", f"job:{member.id}", f"upload:{other}"}
    assert later[f"job:{waiting.id}"] == pytest.approx(before + jobs.records.keep, abs=5)
    assert later[f"batch:{kept}"] == pytest.approx(before + 60, abs=5)


def test_one_turn_removes_a_limited_number_of_records(jobs: FleetJobs) -> None:
    """The next turn goes on, so that a gateway does not hold Redis for long."""
    client = jobs.redis.client
    client.zadd(EXPIRY, {f"job:{number}": number for number in range(1003)})
    maintain(jobs).expire()
    assert client.zcard(EXPIRY) == 3
    maintain(jobs).expire()
    assert client.zcard(EXPIRY) == 0


def test_a_job_that_nobody_can_run_fails_with_a_webhook_and_the_next_is_looked_at(
    jobs: FleetJobs, tmp_path: Path
) -> None:
    jobs.registry.update("w@here", version=OTHER, state="idle")
    first, second = (sent(jobs, tmp_path, webhook=HOOK) for _ in range(2))
    ended = sent(jobs, tmp_path, webhook=HOOK)
    for job in (first, second, ended):
        jobs.redis.client.zadd(EXPIRY, {f"job:{job.id}": 1})
    work = maintain(jobs)
    work.expire()
    for job in (first, second):
        stored = jobs.find(job.id)
        assert stored and stored.status == FAILED and not jobs.objects.exists(f"in/{job.id}")
        hours = f"no worker of version {VERSION[:12]} has taken the image for 24 hours; send it again"
        assert stored.error == hours
    assert jobs.redis.client.zcard(HOOKS) == 3
    jobs.redis.client.delete(HOOKS)
    work.fail_without_worker(first)
    assert not jobs.redis.client.exists(HOOKS), "it had ended"


def test_turns_are_for_each_version_and_last_for_half_a_lease(configuration: Configuration, jobs: FleetJobs) -> None:
    both = FleetJobs(configuration, jobs.redis, jobs.objects, VERSION, [OTHER])
    first, second = maintain(jobs, lease=60), maintain(both, lease=60)
    assert first.claim_turn() == [VERSION] and first.claim_turn() == []
    assert second.claim_turn() == [OTHER] and second.claim_turn() == []
    assert 28 <= jobs.redis.client.ttl(f"seesr:upkeep:{VERSION[:12]}") <= 30
    both.close()


def published(jobs: FleetJobs) -> list[str]:
    """The lists of messages, without that of a job that was published when it was sent."""
    return [name for name in jobs.redis.client.keys("seesr-*") if jobs.redis.client.type(name) == "list"]


def lost(jobs: FleetJobs, key: str, *ids: str) -> None:
    """The broker has lost these jobs a long time ago."""
    for name in published(jobs):
        jobs.redis.client.delete(name)
    for id in ids:
        jobs.redis.client.zadd(key, {id: time.time() - 100})


@pytest.mark.parametrize("key", [WAITING, RUNNING])
def test_all_lost_jobs_are_published_once_when_they_are_missing_for_the_second_time(
    jobs: FleetJobs, tmp_path: Path, key: str
) -> None:
    created = [sent(jobs, tmp_path) for _ in range(3)]
    ended = sent(jobs, tmp_path)
    jobs.records.end(ended.id, FAILED)
    foreign = sent(jobs, tmp_path, version=OTHER)
    lost(jobs, key, *(job.id for job in created), ended.id, foreign.id, "gone")
    queue, work = queue_of(VERSION, 0), maintain(jobs)
    counts = []
    for _ in range(4):
        work.reconcile([VERSION])
        counts.append([jobs.redis.client.llen(name) for name in published(jobs)])
    assert counts == [[], [3], [3], [3]], "a published job is known again"
    assert all(name.startswith(queue) for name in published(jobs))
    assert jobs.redis.client.zscore(key, "gone") is None, "a record that is gone is forgotten"


def test_a_job_that_is_queued_taken_or_young_is_not_published_again(jobs: FleetJobs, tmp_path: Path) -> None:
    work, young = maintain(jobs, lease=50), sent(jobs, tmp_path)
    for _ in range(3):
        work.reconcile([VERSION])
    lost(jobs, WAITING)  # its message is gone, but it is younger than a lease
    for _ in range(3):
        work.reconcile([VERSION])
    assert not published(jobs) and jobs.find(young.id)
    known = sent(jobs, tmp_path)
    jobs.redis.client.zadd(WAITING, {known.id: time.time() - 100})
    for _ in range(3):
        work.reconcile([VERSION])
    assert sum(jobs.redis.client.llen(name) for name in published(jobs)) == 1


@pytest.mark.parametrize(("hours", "seconds"), [(24.0, 3600), (1.0, 900), (1 / 3600, 1)])
def test_one_gateway_sweeps_an_hour_or_a_quarter_of_the_time_that_files_are_kept(
    hours: float, seconds: int, configuration: Configuration, redis: RedisClient, objects: FileStore
) -> None:
    jobs = FleetJobs(configuration.model_copy(update={"keep": hours}), redis, objects, VERSION)
    ages: list[float] = []
    jobs.objects.older = lambda age: ages.append(age) or iter(())  # type: ignore[method-assign, func-returns-value]
    work = maintain(jobs, lease=7)
    work.sweep()
    assert 0 <= seconds - redis.client.ttl("seesr:sweep") <= 1 and ages == [hours * 3600 + 7]
    work.sweep()
    assert len(ages) == 1
    jobs.close()


@pytest.mark.parametrize(
    ("name", "key"),
    [("in/ab", "seesr:job:ab"), ("in/ab-mask", "seesr:job:ab"), ("out/ab.png", "seesr:job:ab"),
     ("tiles/ab-cd-3r", "seesr:job:ab"), ("uploads/ab", "seesr:upload:ab")],
)  # fmt: skip
def test_the_record_of_a_file(name: str, key: str) -> None:
    assert record_key(name) == key


def test_a_gateway_cleans_up_in_turns_and_goes_on_after_an_error(
    jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    work, done = maintain(jobs, lease=60), list[Any]()
    answers = iter([Unavailable("Redis does not answer"), [], [VERSION]])
    pauses: list[float] = []

    def claim_turn() -> list[str]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[return-value]

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            raise asyncio.CancelledError

    monkeypatch.setattr(work, "claim_turn", claim_turn)
    monkeypatch.setattr(work, "reconcile", done.append)
    for name in ("expire", "sweep"):
        monkeypatch.setattr(work, name, lambda name=name: done.append(name))
    monkeypatch.setattr(maintenance.asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError), caplog.at_level(logging.WARNING):
        asyncio.run(work.clean())
    assert done == [[VERSION], "expire", "sweep"] and pauses == [30.0] * 3
    assert "Redis does not answer" in caplog.text


class Receiver:
    """Takes webhooks, some of them late."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.running, self.most = 0, 0
        self.seconds = 0.0

    async def __call__(self, job: Job, event: str) -> bool:
        self.running += 1
        self.most = max(self.most, self.running)
        await sleep(self.seconds)
        self.running -= 1
        self.got.append((job.webhook or "", event))
        return True


def send(work: Maintenance, done: Callable[[], Any]) -> None:
    """Sends webhooks until something is true."""

    async def run() -> None:
        task = asyncio.ensure_future(work.send_webhooks())
        end = time.monotonic() + 5
        while not done() and time.monotonic() < end:
            await sleep(0.01)
        assert not task.done(), task
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(run())
    assert done()


def hooked(jobs: FleetJobs, number: int, event: str = "completed") -> Job:
    """An ended job with a webhook that waits, to a receiver of its own."""
    job = Job.of("ann", Settings(seed=1), webhook=f"https://{number}.test/", status=DONE)
    jobs.records.add(job)
    jobs.records.hook(job, event)
    return job


def test_a_message_of_a_job_that_is_gone_is_dropped_and_the_next_is_sent(jobs: FleetJobs) -> None:
    jobs.redis.client.zadd(HOOKS, {"gone completed": 1, "gone start": 2})
    receiver = Receiver()
    hooked(jobs, 1)
    send(maintain(jobs, receiver), lambda: receiver.got and not jobs.redis.client.zcard(HOOKS))
    assert receiver.got == [("https://1.test/", "completed")]


def test_a_limited_number_of_messages_is_tried_at_once(jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "MAX_HOOKS", 2)
    receiver = Receiver()
    receiver.seconds = 0.05
    for number in range(4):
        hooked(jobs, number)
    send(maintain(jobs, receiver), lambda: len(receiver.got) == 4)
    assert receiver.most == 2


def test_what_a_gateway_tries_stays_claimed(jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "HOOK_LEASE", 0.4)
    monkeypatch.setattr(maintenance.asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
    receiver = Receiver()
    receiver.seconds = 1.0
    hooked(jobs, 1)
    due: list[float] = []

    def look() -> bool:
        due.extend(score - time.time() for _, score in jobs.redis.client.zrange(HOOKS, 0, -1, withscores=True))
        return bool(receiver.got)

    send(maintain(jobs, receiver), look)
    assert len(receiver.got) == 1 and min(due[9:]) > 0, "no other gateway could take it"


def test_redis_that_is_away_delays_webhooks_and_loses_none(
    jobs: FleetJobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the message was sent, and cannot be removed: it is sent again."""
    receiver, failures = Receiver(), {"claim_hook": 1, "drop_hook": 1}
    real = {name: getattr(jobs.records, name) for name in failures}
    monkeypatch.setattr(maintenance.asyncio, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    monkeypatch.setattr(maintenance, "HOOK_LEASE", 0.2)

    def failing(name: str) -> Callable[..., Any]:
        def work(*values: Any) -> Any:
            failures[name] -= 1
            if failures[name] >= 0:
                raise Unavailable(f"{name}: Redis does not answer")
            return real[name](*values)

        return work

    for name in failures:
        monkeypatch.setattr(jobs.records, name, failing(name))
    hooked(jobs, 1)
    with caplog.at_level(logging.WARNING):
        send(maintain(jobs, receiver), lambda: not jobs.redis.client.zcard(HOOKS))
    assert len(receiver.got) == 2 and "claim_hook" in caplog.text and "drop_hook" in caplog.text
