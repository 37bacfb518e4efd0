"""The registry of workers: one hash per worker in Redis, kept alive by its parent, and commands to workers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from seesr.fleet.job_store import PREFIX
from seesr.fleet.redis_client import TIMEOUT, RedisClient

ALIVE = 30  # seconds without an update after which a worker counts as dead
ORDER_EXPIRY = 86400  # seconds after which an order that no worker has taken is dropped
WORKERS = PREFIX + "workers"
RATES = "rates"  # field of a worker: what images cost it, see seesr.engine.rates


class WorkerRegistry:
    """The entries of all workers."""

    def __init__(self, redis: RedisClient) -> None:
        self.redis = redis

    def update(self, name: str, **values: Any) -> None:
        """Writes fields of a worker's entry; the worker counts as alive for ALIVE seconds from now."""
        key = f"{PREFIX}worker:{name}"

        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.sadd(WORKERS, name)
                pipe.hset(key, mapping={field: json.dumps(value, default=str) for field, value in values.items()})
                pipe.expire(key, ALIVE)
                pipe.execute()

        self.redis(work)

    def leave(self, name: str) -> None:
        self.redis(lambda client: client.delete(f"{PREFIX}worker:{name}"))

    def workers(self) -> dict[str, dict[str, Any]]:
        """Live workers by name, without their rates; expired ones are removed."""
        workers = {}
        for name in sorted(self.redis(lambda client: client.smembers(WORKERS))):
            fields = self.redis(lambda client, name=name: client.hgetall(f"{PREFIX}worker:{name}"))
            if fields:
                workers[name] = {field: json.loads(value) for field, value in fields.items() if field != RATES}
            else:
                self.redis(lambda client, name=name: client.srem(WORKERS, name))
        return workers

    def rates(self, names: Iterable[str]) -> list[dict[str, Any]]:
        """The rates of those of these workers that have published them."""
        states = [self.redis(lambda client, name=name: client.hget(f"{PREFIX}worker:{name}", RATES)) for name in names]
        return [json.loads(state) for state in states if state]

    def send(self, name: str, order: str) -> None:
        """ "unload" or "load"; the worker's child obeys between two images."""
        key = f"{PREFIX}orders:{name}"

        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.rpush(key, order)
                pipe.expire(key, ORDER_EXPIRY)
                pipe.execute()

        self.redis(work)

    def order(self, name: str) -> str | None:
        """The next order to this worker, waited for at most half of TIMEOUT."""
        item = self.redis(lambda client: client.blpop([f"{PREFIX}orders:{name}"], timeout=TIMEOUT / 2))
        return item[1] if item else None
