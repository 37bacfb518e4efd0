"""Two workers of a fleet compute the tiles of one image."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import obstore
import pytest
import skimage.data
from PIL import Image

from lab.fleet.callers import PNG
from lab.fleet.servers import Fleet, fleet
from seesr import Engine, Settings
from seesr.fleet import tile_exchange
from seesr.fleet.file_store import FileStore
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.tile_exchange import FleetTiles, OpenStep, TileTaker, kind_of, lease_key, step_key, waiting_key
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.object_store import Store
from seesr.runtime.tile_batches import TileBatches
from seesr.serving.job import Unavailable
from seesr.serving.supervisor import Supervisor

QUICK: dict[str, Any] = {"num_inference_steps": 2, "latent_tiled_size": 16, "latent_tiled_overlap": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway and two workers with the pocket bundle that share tiles."""
    folder = tmp_path_factory.mktemp("pair")
    options: dict[str, Any] = {"SEESR_DEVICE": "cpu", "SEESR_SHARE_TILES": "1"}
    with fleet(folder, workers=2, worker="seesr worker", lease=20, **options) as running:
        yield running


def source(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()[60 : 60 + side, 100 : 100 + side]).save(buffer, "PNG")
    return buffer.getvalue()


def send(running: Fleet, data: bytes, seed: int) -> str:
    params = {**QUICK, "seed": seed, "wait": 0}
    return httpx.post(
        f"{running.addresses['gateway']}/upscale", content=data, headers=PNG, params=params, timeout=60
    ).json()["id"]


def ended(running: Fleet, id: str) -> dict[str, Any]:
    """The job, once it has ended."""
    job: dict[str, Any] = {}

    def look() -> bool:
        job.update(httpx.get(f"{running.addresses['gateway']}/jobs/{id}", timeout=60).json())
        return job["status"] in ("succeeded", "failed", "canceled")

    running.until(look, 120)
    assert job["status"] == "succeeded", job
    return job


def leased(running: Fleet) -> bool:
    return any(running.redis.scan_iter("seesr:tiles-lease:*"))


@pytest.mark.long
def test_two_workers_give_the_bytes_of_one(pair: Fleet, engine: Engine) -> None:
    data = source(128)
    job = ended(pair, send(pair, data, 1))
    assert 0 < job["metrics"]["tiles_shared"] < 128
    assert httpx.get(job["result"]).content == engine.run(data, Settings(**QUICK, seed=1)).data
    pair.until(lambda: not any(name.startswith("tiles/") for name in pair.stored()), 10)
    assert not list(pair.redis.scan_iter("seesr:tiles*"))


@pytest.mark.long
def test_a_helper_that_is_killed_in_the_middle_of_a_step(pair: Fleet, engine: Engine) -> None:
    data = source(192)
    id = send(pair, data, 2)
    pair.until(lambda: leased(pair), 60)
    jobs = {name: json.loads(pair.redis.hget(f"seesr:worker:{name}@here", "job") or "null") for name in pair.processes
            if name.startswith("worker")}  # fmt: skip
    (helper,) = [name for name, job in jobs.items() if job != id]
    os.kill(pair.child(helper), signal.SIGKILL)
    job = ended(pair, id)
    assert httpx.get(job["result"]).content == engine.run(data, Settings(**QUICK, seed=2)).data
    assert job["metrics"]["tiles_shared"] < 288


def test_workers_of_another_kind_do_not_share() -> None:
    kinds = {kind_of(version, machine) for version in ("1", "2") for machine in ("AVX2, 1 threads", "AVX2, 2 threads")}
    assert len(kinds) == 4


class Exchange:
    """A step of three batches that one worker offers to another one, without their engines."""

    def __init__(self, redis_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (folder / "store").mkdir()
        monkeypatch.setenv("SEESR_STORE", f"file://{folder}/store")
        self.redis, self.objects = RedisClient(redis_url), FileStore(Store.configured(), folder / "cache")
        self.redis(lambda client: client.flushdb())
        WorkerRegistry(self.redis).update("helper@here", state="idle", tiles="kind")
        self.supervisor = Supervisor()
        self.pool = FleetTiles(self.redis, self.objects, self.supervisor, "lead@here", "kind")
        self.batches = TileBatches("image", b"context", 3, lambda number: b"task %d" % number)
        self.step = OpenStep(self.pool, self.batches)
        self.step.look()
        self.step.post()

    def taker(self, result: Any) -> TileTaker:
        """The other worker, whose engine gives `result` or raises it."""

        def compute(image: str, context: Callable[[], bytes], task: bytes) -> Any:
            if isinstance(result, Exception):
                raise result
            assert context() == b"context"
            return None if result is None else task + result

        taker = object.__new__(TileTaker)
        taker.redis, taker.objects, taker.kind = self.redis, self.objects, "kind"
        taker.engine, taker.leased, taker.leasing = SimpleNamespace(compute_tiles=compute), set(), threading.Lock()
        return taker

    def files(self) -> list[str]:
        return sorted(entry["path"] for page in obstore.list(self.objects.store) for entry in page)


@pytest.fixture
def exchange(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Exchange:
    return Exchange(redis_url, tmp_path, monkeypatch)


def test_a_helper_computes_what_is_offered_and_nothing_is_left(exchange: Exchange) -> None:
    step, batches = exchange.step, exchange.batches
    assert list(step.posted) == [0, 1] and batches.take() == 2  # two for a helper
    assert exchange.taker(b" done").help()
    step.collect()
    assert batches.pop(0) == b"task 0 done" and batches.from_helpers == {0}
    batches.close()
    step.close()
    exchange.pool.end_job()
    assert exchange.files() == []
    assert exchange.redis(lambda client: client.keys("seesr:tiles*")) == []


def test_a_batch_whose_lease_is_not_renewed_goes_to_others(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tile_exchange, "POLL", 0.0)
    assert exchange.batches.take() == 2
    exchange.redis(lambda client: client.lpop(waiting_key("kind")))  # by a helper that then dies
    exchange.redis(lambda client: client.set(lease_key(exchange.step.id, 0), "1", px=100))
    for _ in range(3):
        exchange.step.look()
    assert exchange.batches.take() is None
    time.sleep(0.11)
    exchange.step.look()
    exchange.step.look()
    assert list(exchange.step.posted) == [1] and exchange.batches.take() == 0


def test_a_helper_with_an_image_of_its_own_gives_the_batch_back(exchange: Exchange) -> None:
    assert not exchange.taker(None).help()
    tasks = exchange.redis(lambda client: client.lrange(waiting_key("kind"), 0, -1))
    assert [json.loads(task)["number"] for task in tasks] == [0, 1]
    assert not exchange.redis(lambda client: client.exists(lease_key(exchange.step.id, 0)))


def test_a_step_whose_helpers_fail_is_not_shared_any_more(exchange: Exchange) -> None:
    taker = exchange.taker(RuntimeError("out of memory"))
    for _ in range(tile_exchange.MAX_FAULTS):
        assert taker.help()
        exchange.step.collect()
        exchange.step.post()
    exchange.step.post()
    assert exchange.step.faults == tile_exchange.MAX_FAULTS and len(exchange.step.posted) == 1
    assert exchange.batches.take() is not None


def test_a_task_of_a_step_that_has_ended_is_dropped(exchange: Exchange) -> None:
    exchange.redis(lambda client: client.delete(step_key(exchange.step.id)))
    assert exchange.taker(AssertionError("computed")).help()


def keys(exchange: Exchange) -> list[str]:
    return exchange.redis.client.keys("seesr:tiles*")


def test_idle_workers_of_the_same_kind_help(exchange: Exchange) -> None:
    registry = WorkerRegistry(exchange.redis)
    for name, state, kind in (("lead", "idle", "kind"), ("busy", "busy", "kind"), ("other", "idle", "another"),
                              ("second", "idle", "kind")):  # fmt: skip
        registry.update(f"{name}@here", state=state, tiles=kind)
    assert exchange.pool.idle() == 2
    exchange.step.polled = 0.0
    exchange.step.look()
    exchange.step.post()
    assert list(exchange.step.posted) == [0, 1, 2], "two for each, as long as there are batches"


def test_what_helpers_need_of_an_image_is_stored_once(exchange: Exchange) -> None:
    exchange.pool.job = "of the second image"
    second = OpenStep(exchange.pool, TileBatches("b", b"other context", 9, lambda number: b"task %d" % number))
    second.look()
    second.post()
    contexts = [name for name in exchange.files() if name.count("-") == 1]
    assert exchange.pool.contexts == set(contexts) == {"tiles/none-image", "tiles/of the second image-b"}
    third = OpenStep(exchange.pool, second.batches)
    exchange.objects.put(third.context, b"as it was")
    third.look()
    third.post()
    assert exchange.objects.read(third.context) == b"as it was"
    exchange.pool.end_job()
    assert not exchange.pool.contexts and not set(contexts) & set(exchange.files())


def test_an_image_ends_also_while_the_store_is_away(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(name: str) -> None:
        raise Unavailable("the object store is unavailable")

    monkeypatch.setattr(exchange.objects, "drop", away)
    exchange.pool.end_job()
    assert not exchange.pool.contexts


def test_a_step_is_looked_after_once_a_second_and_ends_by_itself(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, client = exchange.step, exchange.redis.client
    assert 0 <= tile_exchange.OPEN - client.ttl(step_key(step.id)) <= 1
    assert tile_exchange.LEASE + 2 * tile_exchange.POLL < tile_exchange.OPEN, "a lost helper is seen before"
    now = step.polled
    for seconds, polls in ((tile_exchange.POLL - 0.01, False), (tile_exchange.POLL, True)):
        client.delete(step_key(step.id))
        monkeypatch.setattr(tile_exchange, "time", SimpleNamespace(monotonic=lambda seconds=seconds: now + seconds))
        step.look()
        assert bool(client.exists(step_key(step.id))) is polls


def test_a_batch_that_was_just_taken_is_not_taken_back(exchange: Exchange) -> None:
    client = exchange.redis.client
    client.lpop(waiting_key("kind"))  # its helper has no lease yet
    for expected in ({0: True, 1: False}, {0: False, 1: False}):
        exchange.step.polled = 0.0
        exchange.step.look()
        assert exchange.step.posted == expected
        client.set(lease_key(exchange.step.id, 0), "1")
    foreign = {"step": "another", "number": 0}
    client.delete(lease_key(exchange.step.id, 0))
    client.rpush(waiting_key("kind"), json.dumps(foreign))
    exchange.step.polled = 0.0
    exchange.step.look()
    assert exchange.step.posted[0] is True, "a batch of another step has the same number"


def test_a_step_ends_with_its_tasks_files_and_results_alone(exchange: Exchange) -> None:
    client = exchange.redis.client
    other = json.dumps({"step": "another", "number": 0})
    client.rpush(waiting_key("kind"), other)
    client.rpush(tile_exchange.results_key(exchange.step.id), "x")
    exchange.step.close()
    assert client.lrange(waiting_key("kind"), 0, -1) == [other] and keys(exchange) == [waiting_key("kind")]
    assert exchange.files() == ["tiles/none-image"], "the context is needed by the next step"


def test_a_step_goes_on_alone_when_redis_is_away(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(step: OpenStep) -> None:
        raise Unavailable("Redis does not answer")

    closed: list[OpenStep] = []
    monkeypatch.setattr(OpenStep, "post", away)
    monkeypatch.setattr(OpenStep, "close", lambda step: closed.append(step))
    exchange.pool.serve(exchange.batches)
    assert len(closed) == 1 and "tiles are not shared in this step: Redis does not answer" in caplog.text


def test_batches_are_offered_on_a_thread_until_they_are_closed(
    exchange: Exchange, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def collect(step: OpenStep) -> None:
        calls.append("collect")
        if len(calls) == 2 * 3:
            exchange.batches.close()

    for name in ("look", "post", "close"):
        monkeypatch.setattr(OpenStep, name, lambda step, name=name: calls.append(name))
    monkeypatch.setattr(OpenStep, "collect", collect)
    exchange.pool.begin(exchange.batches)
    end = time.monotonic() + 5
    while "close" not in calls:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert calls == ["look", "post", "collect"] * 2 + ["close"] and list(exchange.supervisor.tasks) == ["shared tiles"]


def test_a_result_that_comes_twice_is_taken_once(exchange: Exchange) -> None:
    step, client = exchange.step, exchange.redis.client
    assert exchange.taker(b" done").help()
    result = client.lrange(tile_exchange.results_key(step.id), 0, -1)[0]
    assert json.loads(result) == {"number": 0, "error": ""}
    assert 0 < client.ttl(tile_exchange.results_key(step.id)) <= tile_exchange.OPEN
    step.collect()
    client.rpush(tile_exchange.results_key(step.id), result)
    step.collect()
    assert exchange.batches.pop(0) == b"task 0 done" and list(step.posted) == [1] and step.faults == 0
    assert not [name for name in exchange.files() if name.endswith(("-0", "-0r"))]
    started = time.monotonic()
    step.collect()
    assert time.monotonic() - started < 1, "it waits a moment only"


def test_a_helper_says_in_one_line_why_it_failed(exchange: Exchange) -> None:
    assert exchange.taker(RuntimeError("out of\nmemory")).help()
    (result,) = exchange.redis.client.lrange(tile_exchange.results_key(exchange.step.id), 0, -1)
    assert json.loads(result) == {"number": 0, "error": "out of memory"}
    exchange.step.collect()
    assert exchange.step.faults == 1 and exchange.batches.take() == 0, "somebody else computes it"


def test_a_helper_gives_no_result_of_a_step_that_has_ended(exchange: Exchange) -> None:
    def ends(image: str, context: Callable[[], bytes], task: bytes) -> bytes:
        exchange.redis.client.delete(step_key(exchange.step.id))
        return b"late"

    taker = exchange.taker(b"")
    taker.engine = SimpleNamespace(compute_tiles=ends)
    before = exchange.files()
    assert taker.help() and exchange.files() == before
    assert not exchange.redis.client.exists(tile_exchange.results_key(exchange.step.id))
    exchange.step.polled = 0.0
    exchange.step.look()
    exchange.objects.drop(exchange.step.name(1))
    assert exchange.taker(b"").help(), "its file is gone: the step has ended meanwhile"
    assert not exchange.redis.client.exists(tile_exchange.results_key(exchange.step.id))


def test_a_helper_holds_a_lease_while_it_computes(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    taker, client, ttls = exchange.taker(b""), exchange.redis.client, list[int]()
    key = lease_key(exchange.step.id, 0)
    waits = iter([False, True])

    def compute(*values: Any) -> bytes:
        assert taker.leased == {key}
        ttls.append(client.ttl(key))
        client.delete(key)
        paused: list[float] = []
        taker.renew(SimpleNamespace(wait=lambda seconds: paused.append(seconds) or next(waits)))  # type: ignore[arg-type]
        assert paused == [tile_exchange.LEASE / 3] * 2
        ttls.append(client.ttl(key))
        return b"done"

    taker.engine = SimpleNamespace(compute_tiles=compute)
    assert taker.help()
    assert all(0 <= tile_exchange.LEASE - ttl <= 1 for ttl in ttls) and len(ttls) == 2
    assert not taker.leased and not client.exists(key)


def test_a_worker_helps_while_it_has_no_image_of_its_own(exchange: Exchange) -> None:
    taker, busy, calls = exchange.taker(b""), iter([True, False, False, True]), list[str]()
    answers = iter([True, False])
    taker.help = lambda: calls.append("help") or next(answers)  # type: ignore[method-assign, func-returns-value]

    class Worker:
        @property
        def busy(self) -> bool:
            return next(busy)

    taker.engine = Worker()
    pauses: list[float] = []
    stopping = SimpleNamespace(wait=pauses.append, is_set=lambda: len(pauses) == 3)
    taker.run(stopping)  # type: ignore[arg-type]
    assert calls == ["help", "help"] and pauses == [tile_exchange.PAUSE] * 3 and 0 < tile_exchange.PAUSE <= 1


def test_a_worker_without_tasks_looks_again_after_a_moment(exchange: Exchange) -> None:
    exchange.redis.client.delete(waiting_key("kind"))
    started = time.monotonic()
    assert exchange.taker(AssertionError("computed")).help() and time.monotonic() - started < 2


def test_a_taker_has_a_thread_for_tasks_and_one_for_leases(exchange: Exchange, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(TileTaker, "run", lambda taker, stopping: ran.append(stopping))
    monkeypatch.setattr(TileTaker, "renew", lambda taker, stopping: ran.append(stopping))
    taker = TileTaker(exchange.redis, exchange.objects, exchange.supervisor, None, "kind")
    end = time.monotonic() + 5
    while len(ran) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ran == [exchange.supervisor.stopping] * 2 and taker.leased == set()
    assert set(exchange.supervisor.tasks) == {"tiles of others", "tile leases"}
