"""`seesr fleet`: shows the workers and sends commands to single ones."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from seesr.config import Configuration
from seesr.fleet.broker import application, queues_of
from seesr.fleet.job_store import RUNNING, WAITING
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.networks import weights
from seesr.serving.identity import version_of

POLL = 0.2  # seconds between two looks


class Fleet:
    def __init__(self, configuration: Configuration) -> None:
        self.redis = RedisClient(configuration.redis or "")
        self.registry = WorkerRegistry(self.redis)
        self.app = application(configuration, [version_of(configuration.weights or weights.locate())], publishes=True)

    def status(self) -> dict[str, Any]:
        waiting, running = (self.redis(lambda client, key=key: client.zcard(key)) for key in (WAITING, RUNNING))
        return {"waiting": waiting, "running": running, "workers": self.registry.workers()}

    def worker(self, name: str) -> dict[str, Any]:
        """What is known of a worker.

        Raises:
            ValueError: there is none of this name.
        """
        workers = self.registry.workers()
        if name not in workers:
            raise ValueError(f"there is no worker {name!r}; alive: {', '.join(workers) or 'none'}")
        return workers[name]

    def wait_for(self, name: str, *states: str) -> None:
        while self.worker(name).get("state") not in states:
            time.sleep(POLL)

    def drain(self, name: str) -> None:
        for queue in queues_of(self.worker(name)["version"]):
            self.app.control.cancel_consumer(queue, destination=[name], reply=True, timeout=5)
        self.wait_for(name, "idle", "unloaded")
        time.sleep(1)  # one that was just taken may not have begun
        self.wait_for(name, "idle", "unloaded")

    def resume(self, name: str) -> None:
        for queue in queues_of(self.worker(name)["version"]):
            self.app.control.add_consumer(queue, destination=[name], reply=True, timeout=5)

    def unload(self, name: str) -> None:
        self.drain(name)
        self.registry.send(name, "unload")
        self.wait_for(name, "unloaded")

    def load(self, name: str) -> None:
        self.registry.update(name, state="loading")  # replaces the state of an earlier attempt
        self.registry.send(name, "load")
        self.wait_for(name, "idle", "failed")
        if self.worker(name)["state"] == "failed":
            raise ValueError(f"{name} cannot load the weights: {self.worker(name).get('error')}; see its log")
        self.resume(name)

    def restart(self, name: str) -> None:
        self.drain(name)
        self.app.control.shutdown(destination=[name])


def command(configuration: Configuration, name: str, worker: str | None) -> int:
    """Runs one of ORDERS; on every worker where none is named. Returns the exit code."""
    fleet = Fleet(configuration)
    if name == "status":
        print(json.dumps(fleet.status(), indent=1))
        return 0
    for target in [worker] if worker else list(fleet.registry.workers()):
        getattr(fleet, name)(target)
        print(f"{target}: {name} done", file=sys.stderr)
    return 0
