"""Shares the tiles of one worker's image with idle workers of the fleet (SEESR_SHARE_TILES).

Redis has what waits and who works; tensors are in the object store under tiles/. A helper keeps a lease on its batch.
When the lease is not renewed, or the helper is slow, the worker that has the image computes the batch itself or gives
it to another helper: the bytes are the same. See docs/decisions/0037-one-image-on-many-workers.md.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import PREFIX
from seesr.fleet.redis_client import TIMEOUT, RedisClient
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.runtime.tile_batches import TileBatches
from seesr.serving.job import Unavailable
from seesr.serving.supervisor import Supervisor

LEASE = 6  # seconds without renewal after which a batch goes to others
OPEN = 15  # seconds for which a step stays open without a word of the worker that has the image
POLL = 1.0  # seconds between two looks at leases and idle workers
AHEAD = 2  # batches posted for each idle worker: one that it computes and the next
MAX_FAULTS = 3  # errors of helpers after which a step is not shared any more
PAUSE = 0.2  # seconds between two polls of a worker that runs an image
log = logging.getLogger(__name__)


def kind_of(version: str, machine: str) -> str:
    """Workers of one kind give the same bytes.

    Args:
        version: of the bundle and this program.
        machine: what results depend on beside it, see Engine.machine.
    """
    return hashlib.sha256(f"{version} {machine}".encode()).hexdigest()[:12]


def waiting_key(kind: str) -> str:
    return f"{PREFIX}tiles:{kind}"


def step_key(step: str) -> str:
    return f"{PREFIX}tiles-step:{step}"


def lease_key(step: str, number: int) -> str:
    return f"{PREFIX}tiles-lease:{step}:{number}"


def results_key(step: str) -> str:
    return f"{PREFIX}tiles-results:{step}"


class FleetTiles:
    """The side of the worker that has the image; a seesr.runtime.tile_batches.TilePool.

    Args:
        worker: name of this worker.
        kind: see `kind_of`.

    Attributes:
        job: whose image is made; its record keeps the files from being swept.
    """

    def __init__(self, redis: RedisClient, objects: FileStore, supervisor: Supervisor, worker: str, kind: str) -> None:
        self.redis, self.objects, self.supervisor = redis, objects, supervisor
        self.worker, self.kind = worker, kind
        self.registry, self.job = WorkerRegistry(redis), "none"
        self.contexts: set[str] = set()  # names of the stored contexts of this job

    def begin(self, batches: TileBatches) -> None:
        """Offers the batches to idle workers until they are closed."""
        self.supervisor.thread("shared tiles", lambda: self.serve(batches))

    def serve(self, batches: TileBatches) -> None:
        step = OpenStep(self, batches)
        try:
            while not batches.closed:
                step.look()
                step.post()
                step.collect()
        except Unavailable as error:  # the batches that helpers have are overdue some time later
            log.warning("tiles are not shared in this step: %s", error)
        finally:
            step.close()

    def idle(self) -> int:
        """How many other workers of this kind have no image of their own."""
        workers = self.registry.workers().items()
        return sum(
            name != self.worker and about.get("tiles") == self.kind and about.get("state") == "idle"
            for name, about in workers
        )

    def end_job(self) -> None:
        """Removes what helpers needed of the image."""
        for name in self.contexts:
            with contextlib.suppress(Unavailable):  # it is swept with the job's record
                self.objects.drop(name)
        self.contexts.clear()


class OpenStep:
    """One step whose batches are offered."""

    def __init__(self, pool: FleetTiles, batches: TileBatches) -> None:
        self.pool, self.redis, self.objects, self.batches = pool, pool.redis, pool.objects, batches
        self.id, self.context = secrets.token_hex(8), f"tiles/{pool.job}-{batches.image}"
        self.posted: dict[int, bool] = {}  # number -> whether it was missing at the last look
        self.polled, self.helpers, self.faults = 0.0, 0, 0

    def name(self, number: int) -> str:
        """The file of a batch; its result has another letter at the end."""
        return f"tiles/{self.pool.job}-{self.id}-{number}"

    def look(self) -> None:
        """Once a second: keeps the step open, counts the helpers, and takes back batches whose helper is lost."""
        if time.monotonic() - self.polled < POLL:
            return
        self.polled, self.helpers = time.monotonic(), self.pool.idle()

        def work(client: Any) -> list[Any]:
            with client.pipeline() as pipe:
                pipe.set(step_key(self.id), "1", ex=OPEN)
                pipe.lrange(waiting_key(self.pool.kind), 0, -1)
                for number in self.posted:
                    pipe.exists(lease_key(self.id, number))
                return pipe.execute()

        _, waiting, *leased = self.redis(work)
        tasks = [json.loads(task) for task in waiting]
        listed = {task["number"] for task in tasks if task["step"] == self.id}
        for (number, missed), lease in zip(list(self.posted.items()), leased, strict=True):
            missing = not lease and number not in listed
            if missing and missed:  # twice, since one that was just taken has no lease yet
                log.warning("the helper of tile batch %d is lost; the batch is computed again", number)
                del self.posted[number]
                self.batches.give_back(number)
            else:
                self.posted[number] = missing

    def post(self) -> None:
        """Offers as many batches as there is room for."""
        while self.faults < MAX_FAULTS and len(self.posted) < AHEAD * self.helpers:
            number = self.batches.take()
            if number is None:
                return
            self.posted[number] = False
            if self.context not in self.pool.contexts:
                self.objects.put(self.context, self.batches.context)
                self.pool.contexts.add(self.context)
            self.objects.put(self.name(number), self.batches.task(number))
            task = {"step": self.id, "number": number, "file": self.name(number), "context": self.context}
            self.redis(lambda client, task=task: client.rpush(waiting_key(self.pool.kind), json.dumps(task)))

    def collect(self) -> None:
        """Waits a moment for a result."""
        item = self.redis(lambda client: client.blpop([results_key(self.id)], timeout=TIMEOUT / 4))
        if item is None:
            return
        result = json.loads(item[1])
        number = result["number"]
        if result["error"]:
            self.faults += 1
            log.warning("a helper failed in tile batch %d: %s", number, result["error"])
            self.batches.give_back(number)
        else:
            with contextlib.suppress(FileNotFoundError):  # it was computed twice, and removed after the first
                self.batches.put(number, self.objects.read(self.name(number) + "r"), from_helper=True)
        self.posted.pop(number, None)
        self.drop(number)

    def drop(self, number: int) -> None:
        for name in (self.name(number), self.name(number) + "r"):
            self.objects.drop(name)

    def close(self) -> None:
        """Removes what is left of the step. Helpers that still compute see that it has ended."""

        def work(client: Any) -> None:
            tasks = [task for task in client.lrange(waiting_key(self.pool.kind), 0, -1) if self.id in task]
            with client.pipeline() as pipe:
                pipe.delete(step_key(self.id), results_key(self.id))
                for task in tasks:
                    pipe.lrem(waiting_key(self.pool.kind), 0, task)
                pipe.execute()

        with contextlib.suppress(Unavailable):  # keys expire, and files are swept with the job's record
            self.redis(work)
            for number in self.posted:
                self.drop(number)


class TileTaker:
    """The side of an idle worker: computes batches of other workers' images.

    Args:
        engine: of this worker.
    """

    def __init__(self, redis: RedisClient, objects: FileStore, supervisor: Supervisor, engine: Any, kind: str) -> None:
        self.redis, self.objects, self.engine, self.kind = redis, objects, engine, kind
        self.leased: set[str] = set()
        self.leasing = threading.Lock()
        supervisor.thread("tiles of others", lambda: self.run(supervisor.stopping))
        supervisor.thread("tile leases", lambda: self.renew(supervisor.stopping))

    def run(self, stopping: threading.Event) -> None:
        """Computes batches until `stopping`."""
        while not stopping.is_set():
            if self.engine.busy or not self.help():
                stopping.wait(PAUSE)

    def help(self) -> bool:
        """Waits a moment for a batch and computes it; False: this worker runs an image now."""
        item = self.redis(lambda client: client.blpop([waiting_key(self.kind)], timeout=TIMEOUT / 2))
        if item is None:
            return True
        task = json.loads(item[1])
        step, number = task["step"], task["number"]
        if not self.redis(lambda client: client.exists(step_key(step))):
            return True
        error, result = "", None
        try:
            with self.lease(lease_key(step, number)):
                data = self.objects.read(task["file"])
                result = self.engine.compute_tiles(task["context"], lambda: self.objects.read(task["context"]), data)
                if result is None:
                    self.redis(lambda client: client.lpush(waiting_key(self.kind), item[1]))
                    return False
                if not self.redis(lambda client: client.exists(step_key(step))):
                    return True
                self.objects.put(task["file"] + "r", result)
        except FileNotFoundError:  # the step has ended meanwhile
            return True
        except (RuntimeError, Unavailable) as fault:
            error = " ".join(str(fault).split())[:200]

        def publish(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.rpush(results_key(step), json.dumps({"number": number, "error": error}))
                pipe.expire(results_key(step), OPEN)
                pipe.execute()

        self.redis(publish)
        return True

    @contextlib.contextmanager
    def lease(self, key: str) -> Iterator[None]:
        """Holds a key in Redis that expires LEASE seconds after the death of this process."""
        with self.leasing:
            self.leased.add(key)
            self.redis(lambda client: client.set(key, "1", ex=LEASE))
        try:
            yield
        finally:
            with self.leasing:
                self.leased.discard(key)
                self.redis(lambda client: client.delete(key))

    def renew(self, stopping: threading.Event) -> None:
        """Renews the lease on the batch that is computed, until `stopping`."""
        while not stopping.wait(LEASE / 3):
            with self.leasing:
                for key in self.leased:
                    self.redis(lambda client, key=key: client.set(key, "1", ex=LEASE))
