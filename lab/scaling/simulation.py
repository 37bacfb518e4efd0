"""Discrete events: arrivals, workers that start, work and are lost, and the rule that changes their number."""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import yaml

from lab.report import ROOT

DAY = 86_400.0
TICK, SYNC, SCRAPE, WINDOW, TOLERANCE = 5, 15, 30, 300, 0.1  # KEDA's poll; defaults of Kubernetes and Prometheus
Scaler = Callable[[float, int, int, int], int]  # (now, waiting, busy, workers) -> workers


@dataclasses.dataclass
class Keda:
    """The ScaledObject of deploy/kubernetes/fleet/worker.yaml with the horizontal pod autoscaler that it configures."""

    most: int
    cooldown: float
    threshold: float
    per_busy: float
    metric: float = 0.0
    active: float = -math.inf
    history: collections.deque[tuple[float, int]] = dataclasses.field(default_factory=collections.deque)

    @classmethod
    def read(cls) -> Keda:
        """The rule of the manifest."""
        documents = yaml.safe_load_all((ROOT / "deploy/kubernetes/fleet/worker.yaml").read_text())
        spec = next(d["spec"] for d in documents if d["kind"] == "ScaledObject")
        about = spec["triggers"][0]["metadata"]
        per_busy = re.search(r"max\(seesr_queue_length\) \+ (\d+) \* max\(seesr_workers", about["query"])
        assert per_busy and spec["pollingInterval"] == TICK and about["activationThreshold"] == "0"
        return cls(spec["maxReplicaCount"], spec["cooldownPeriod"], float(about["threshold"]), float(per_busy[1]))

    def __call__(self, now: float, waiting: int, busy: int, workers: int) -> int:
        if now % SCRAPE == 0:
            self.metric = waiting + self.per_busy * busy
        if self.metric > 0:
            self.active = now
        if workers == 0 or now - self.active >= self.cooldown:
            self.history.clear()
            return int(self.metric > 0)
        if now % SYNC:
            return workers
        share = self.metric / (self.threshold * workers)
        wanted = workers if abs(share - 1) <= TOLERANCE else math.ceil(self.metric / self.threshold)
        self.history.append((now, wanted))
        while self.history[0][0] < now - WINDOW:
            self.history.popleft()
        if wanted < workers:
            wanted = min(workers, max(count for _, count in self.history))
        return max(1, min(wanted, self.most, max(2 * workers, workers + 4)))


@dataclasses.dataclass(eq=False)
class Worker:
    """A billed machine: starting, idle or busy with a job; one that leaves ends after its job."""

    since: float
    ready: bool = False
    job: int | None = None
    leaving: bool = False
    lost: bool = False


class Simulation:
    """A fleet from the first arrival to the end of the last job.

    Args:
        arrivals: seconds, ascending.
        service: draws the seconds of a job.
        start: seconds from the request of a worker until it takes jobs.
        scaler: called every TICK seconds; None: the number of workers stays.
        workers: that are ready at the beginning.
        lifetime: mean seconds after which a worker is lost; its job starts again `lease` seconds later.
    """

    def __init__(
        self, arrivals: list[float], service: Callable[[], float], start: float, scaler: Scaler | None = None,
        workers: int = 0, lifetime: float = math.inf, lease: float = 60.0, seed: int = 0,
    ) -> None:  # fmt: skip
        self.arrivals, self.service, self.start, self.scaler = arrivals, service, start, scaler
        self.target, self.lifetime, self.lease, self.random = workers, lifetime, lease, random.Random(seed)
        self.workers: list[Worker] = []
        self.queue: collections.deque[int] = collections.deque()
        self.waits, self.left = [0.0] * len(arrivals), len(arrivals)
        self.now = self.billed = self.used = 0.0
        self.numbers = itertools.count()
        self.events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def at(self, seconds: float, event: Callable[..., None], *about: Any) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.numbers), event, about))

    def run(self) -> Simulation:
        for _ in range(self.target):
            self.add(0.0)
        for job, when in enumerate(self.arrivals):
            self.at(when, self.enqueue, job)
        if self.scaler is not None:
            self.at(0.0, self.scale)
        while self.events and (self.left or self.now < DAY):
            self.now, _, event, about = heapq.heappop(self.events)
            event(*about)
        self.billed += sum(max(self.now, DAY) - worker.since for worker in self.workers)
        return self

    def add(self, start: float) -> None:
        worker = Worker(self.now)
        self.workers.append(worker)
        self.at(start, self.become_ready, worker)
        if self.lifetime < math.inf:
            self.at(self.random.expovariate(1 / self.lifetime), self.lose, worker)

    def remove(self, worker: Worker) -> None:
        worker.lost = True
        self.workers.remove(worker)
        self.billed += self.now - worker.since

    def become_ready(self, worker: Worker) -> None:
        worker.ready = True
        self.assign()

    def enqueue(self, job: int) -> None:
        self.queue.append(job)
        self.assign()

    def retry(self, job: int) -> None:
        self.queue.appendleft(job)
        self.assign()

    def assign(self) -> None:
        """Gives waiting jobs to idle workers."""
        for worker in self.workers:
            if not self.queue:
                return
            if worker.ready and worker.job is None and not worker.leaving and not worker.lost:
                worker.job = self.queue.popleft()
                self.waits[worker.job] = self.now - self.arrivals[worker.job]
                self.at(seconds := self.service(), self.finish, worker, seconds)

    def finish(self, worker: Worker, seconds: float) -> None:
        if worker.lost:
            return
        worker.job, self.left, self.used = None, self.left - 1, self.used + seconds
        if worker.leaving:
            self.remove(worker)
        self.assign()

    def lose(self, worker: Worker) -> None:
        if worker.lost:
            return
        self.remove(worker)
        if worker.job is not None:
            self.at(self.lease, self.retry, worker.job)
        if not worker.leaving:
            self.add(self.start)

    def scale(self) -> None:
        staying = [worker for worker in self.workers if not worker.leaving]
        busy = sum(worker.job is not None for worker in staying)
        assert self.scaler is not None
        target = self.scaler(self.now, len(self.queue), busy, len(staying))
        for _ in range(target - len(staying)):
            self.add(self.start)
        order = sorted(staying, key=lambda worker: (worker.ready, -worker.since))  # as a ReplicaSet: starting, newest
        for worker in order[: max(0, len(staying) - target)]:
            worker.leaving = True
            if worker.job is None:
                self.remove(worker)
        self.at(TICK, self.scale)
