"""The registry of workers in a real Redis."""

from __future__ import annotations

import time

from seesr.fleet.redis_client import TIMEOUT, RedisClient
from seesr.fleet.worker_registry import ALIVE, ORDER_EXPIRY, WORKERS, WorkerRegistry


def test_a_worker_that_is_silent_leaves_the_registry(redis: RedisClient) -> None:
    registry, client = WorkerRegistry(redis), redis.client
    for name in ("b@here", "a@here", "gone@here"):
        registry.update(name, state="idle", rates={"images": 1})
    assert ALIVE - 1 <= client.ttl("seesr:worker:a@here") <= ALIVE
    client.delete("seesr:worker:gone@here")
    assert list(registry.workers()) == ["a@here", "b@here"] and client.scard(WORKERS) == 2
    assert registry.workers()["a@here"] == {"state": "idle"}
    registry.update("c@here", state="loading")
    assert registry.rates(["a@here", "c@here", "gone@here"]) == [{"images": 1}]


def test_orders_are_taken_one_by_one_and_forgotten_after_a_day(redis: RedisClient) -> None:
    registry = WorkerRegistry(redis)
    registry.send("a@here", "unload")
    registry.send("a@here", "load")
    assert 0 <= ORDER_EXPIRY - redis.client.ttl("seesr:orders:a@here") <= 1 and ORDER_EXPIRY == 24 * 60 * 60
    assert [registry.order("a@here") for _ in range(2)] == ["unload", "load"]
    started = time.monotonic()
    assert registry.order("a@here") is None and time.monotonic() - started < TIMEOUT
