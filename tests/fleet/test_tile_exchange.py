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


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    running = Fleet(tmp_path_factory.mktemp("redis"))
    try:
        running.start_redis()
        yield running.environment["SEESR_REDIS"]
    finally:
        running.close()


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
