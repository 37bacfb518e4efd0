"""The lease on running jobs: Redis gives a job to another worker when nobody renews it, and only then.

Kombu's visibility timeout is set once, when a job is taken, so that a long job would run twice. A thread of the
worker's parent renews it for as long as the process lives: a timer of the consumer would stop in a warm shutdown.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any, ClassVar

from celery import bootsteps
from celery.worker import state

from seesr.config import Configuration
from seesr.fleet.redis_client import Link
from seesr.fleet.worker_registry import ALIVE, Roster
from seesr.networks import weights
from seesr.serving.identity import version_of
from seesr.serving.job import Away

INDEX = "unacked_index"  # kombu's: delivery tags by the time at which they were taken
log = logging.getLogger(__name__)


class Lease(bootsteps.StartStopStep):
    """Begins the thread with the consumer, once."""

    requires: ClassVar[set[str]] = {"celery.worker.consumer.tasks:Tasks"}
    thread: threading.Thread | None = None

    def start(self, parent: Any) -> None:
        if Lease.thread is None:
            Lease.thread = threading.Thread(target=keep, name="lease", daemon=True)
            Lease.thread.start()


def keep() -> None:
    """Renews what this worker has taken, and its place in the roster."""
    configuration = Configuration.read()
    link, name = Link(configuration.redis or ""), configuration.worker_name or ""
    version, roster = version_of(configuration.weights or weights.locate()), Roster(link)
    while True:
        try:
            renew(link)
            roster.tell(name, version=version, parent=os.getpid(), gpu=gpu_memory())
        except Away as error:
            log.warning("lease: %s", error)
        time.sleep(min(configuration.lease / 6, ALIVE / 3))


def renew(link: Link) -> None:
    """Every job that this worker has taken counts as taken just now."""
    taken = {*state.reserved_requests, *state.active_requests}
    tags = [request.message.delivery_tag for request in taken]
    if tags:
        now = time.time()
        link(lambda client: client.zadd(INDEX, dict.fromkeys(tags, now), xx=True))


def gpu_memory() -> dict[str, int] | None:
    """Bytes used and in all of this worker's GPU, without touching CUDA; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    place = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    handle = (
        pynvml.nvmlDeviceGetHandleByIndex(int(place)) if place.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(place)
    )
    found = pynvml.nvmlDeviceGetMemoryInfo(handle)
    return {"used": int(found.used), "total": int(found.total)}
