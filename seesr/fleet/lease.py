"""The lease on running jobs: Redis gives a job to another worker only when the lease is not renewed.

Kombu's visibility timeout is set once, when a job is taken, so that a long job would run twice. A thread of the
worker's parent renews it for as long as the process lives: a timer of the consumer would stop in a warm shutdown.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

from celery import bootsteps

from seesr.config import Configuration
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.transport import UNACKED_INDEX, taken_tags
from seesr.fleet.worker_registry import ALIVE, WorkerRegistry
from seesr.networks import weights
from seesr.serving.gpu import gpu_usage
from seesr.serving.identity import version_of
from seesr.serving.job import Unavailable
from seesr.serving.supervisor import Supervisor

log = logging.getLogger(__name__)


class Lease(bootsteps.StartStopStep):
    """Starts the threads with the consumer, once."""

    requires: ClassVar[set[str]] = {"celery.worker.consumer.tasks:Tasks"}
    supervisor: Supervisor | None = None

    def start(self, parent: Any) -> None:
        if Lease.supervisor is None:
            Lease.supervisor = start_threads(Configuration.read())


def start_threads(configuration: Configuration) -> Supervisor:
    """Renews the leases, and on another thread the registry entry: an error in one does not delay the other."""
    supervisor = Supervisor()
    redis, name = RedisClient(configuration.redis or ""), configuration.worker_name or ""
    version, registry = version_of(configuration.weights or weights.locate()), WorkerRegistry(redis)

    def register() -> None:
        failures = {name: task.failures for name, task in supervisor.tasks.items()}
        registry.update(name, version=version, parent=os.getpid(), gpu=gpu_usage(), failures=failures)

    interval = configuration.lease / 6
    supervisor.thread("lease", lambda: every(interval, supervisor.stopping, lambda: renew(redis)))
    supervisor.thread("registry", lambda: every(min(interval, ALIVE / 3), supervisor.stopping, register))
    return supervisor


def every(seconds: float, stopping: threading.Event, work: Callable[[], None]) -> None:
    """Runs `work` again and again until `stopping`; that Redis is unavailable is no error."""
    while True:
        try:
            work()
        except Unavailable as error:
            log.warning("redis: %s", error)
        if stopping.wait(seconds):
            return


def renew(redis: RedisClient) -> None:
    """Every job that this worker has taken counts as taken just now."""
    tags = taken_tags()
    if tags:
        now = time.time()
        redis(lambda client: client.zadd(UNACKED_INDEX, dict.fromkeys(tags, now), xx=True))
