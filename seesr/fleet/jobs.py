"""`FleetJobs`: the job queue of a gateway, with jobs in Redis and images in an object store."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis
import redis.exceptions
from kombu.exceptions import OperationalError

from seesr.config import Configuration
from seesr.engine.quote import make_quote
from seesr.engine.rates import Quote, Rates
from seesr.fleet.broker import TASK, application, queue_of
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import CHANGES, PROBE, RUNNING, TIMES, WAITING, JobStore
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.images.read import open_header, read_file
from seesr.serving.fairness import has_room, share_of
from seesr.serving.job import Job, QueueFull, Unavailable, check_deadline
from seesr.serving.job_counts import Name, Seen, summary
from seesr.serving.listeners import Listeners
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

LONGEST_SLEEP = 10.0  # seconds after which a waiting request looks for itself, in case a message was lost
log = logging.getLogger(__name__)


class FleetJobs:
    """See seesr.serving.job.Jobs.

    Args:
        version: of the default bundle and this program; only workers of the same one take the jobs.
        others: versions of the other bundles.
    """

    def __init__(
        self,
        configuration: Configuration,
        redis: RedisClient,
        objects: FileStore,
        version: str,
        others: Iterable[str] = (),
    ) -> None:
        self.redis, self.objects, self.version = redis, objects, version
        self.versions = list(dict.fromkeys((version, *others)))
        self.max_queue, self.share = configuration.max_queue, configuration.queue_share
        self.records, self.registry = JobStore(redis, configuration.keep * 3600), WorkerRegistry(redis)
        self.app = application(configuration, self.versions, publishes=True)
        self.price_per_hour, self.quotes_every_job = configuration.price_per_hour, False
        self.since = time.time()
        self.closing = False
        self.listeners = Listeners(self.find, LONGEST_SLEEP)

    def start(self, supervisor: Supervisor) -> None:
        supervisor.thread("changes", self.listen)

    def listen(self) -> None:
        """Wakes requests that wait for a job that changed; they look for themselves while Redis is unavailable."""
        while not self.closing:
            try:
                channel = redis.Redis.from_url(self.redis.url, decode_responses=True, socket_keepalive=True).pubsub()
                channel.subscribe(CHANGES)
                self.listeners.wake_all()  # changes before this moment were not heard
                while not self.closing:
                    message = channel.get_message(ignore_subscribe_messages=True, timeout=1)
                    if message:
                        self.listeners.wake(str(message["data"]))
            except (redis.exceptions.RedisError, OSError) as error:
                log.warning("job changes cannot be read; next try in 1 s: %s", " ".join(str(error).split()))
                time.sleep(1)

    def ready(self) -> str | None:
        if self.closing:
            return "the server is shutting down"
        try:
            self.redis(lambda client: client.set(PROBE, "1"))  # a read-only or full Redis takes no job
            states = [worker.get("state") for worker in self.workers_of().values()]
        except Unavailable as error:
            return str(error)
        if reason := self.objects.unavailable():
            return reason
        if any(state in ("idle", "busy") for state in states):
            return None
        return "the weights are loading" if "loading" in states else "no worker of this version is alive"

    def workers_of(self, version: str | None = None) -> dict[str, dict[str, Any]]:
        """The workers that take this gateway's jobs of a version; None: of the default bundle."""
        version = version or self.version
        return {name: worker for name, worker in self.registry.workers().items() if worker.get("version") == version}

    def submit(self, job: Job, image: Path, mask: Path | None = None) -> None:
        if self.closing:
            raise Unavailable("the server is shutting down")
        job.version = job.version or self.version
        self.check_room(job.owner, job.share or self.share)
        check_deadline(job)
        try:
            self.objects.put(f"in/{job.id}", image)
            if mask is not None:
                self.objects.put(f"in/{job.id}-mask", mask)
            if self.records.add(job):
                self.publish(job)
        except Unavailable:
            with contextlib.suppress(
                Unavailable
            ):  # a Redis that hangs may still take the record: its job then needs the files
                self.records.forget(job.id)
                self.objects.drop_inputs(job)
            raise

    def check_room(self, owner: str, share: float) -> None:
        """Refuses a job that would exceed the queue, or its owner's share of it.

        Several gateways may each take one more at the same moment.

        Raises:
            QueueFull: there is no room.
        """
        waiting = self.records.count_waiting()
        if waiting < share_of(self.max_queue, share):
            return
        if not has_room(owner, self.records.waiting_owners(), self.max_queue, share):
            raise QueueFull(self.expected_seconds(waiting))

    def quote(self, job: Job, image: Path) -> Quote | None:
        """By the rates of the slowest worker, since any can take the job; None: no worker publishes its rates."""
        settings, size = Settings(**job.settings), open_header(read_file(image)).size
        names, quotes = list(self.workers_of(job.version)), []
        for state in self.registry.rates(names):
            rates = Rates()
            rates.restore(state)
            if rates.outline is not None:
                quotes.append(make_quote(rates.outline, rates, settings, size, self.price_per_hour))
        if not quotes:
            return None
        slowest = max(quotes, key=lambda quote: quote.seconds or 0.0)
        return dataclasses.replace(slowest, wait=self.wait_for(job, len(names), slowest.seconds or 0.0))

    def wait_for(self, job: Job, workers: int, seconds: float) -> float:
        """Seconds until the turn of a job that is submitted now. Later jobs that are more urgent are not in it.

        Args:
            workers: that take it.
            seconds: of an image where none was made lately.
        """
        each, now = self.median_seconds() or seconds, time.time()
        ahead, running = self.records.count_ahead(job.priority), self.records.running_since()
        if ahead + len(running) < workers:
            return 0.0
        left = sum(max(0.0, each - (now - since)) for since in running)
        return round((ahead * each + left) / workers, 3)

    def publish(self, job: Job) -> None:
        """Hands a job to the workers, in the lane of its owner.

        Raises:
            Unavailable: Redis does not answer.
        """
        try:
            queue = queue_of(job.version or self.version, self.records.lane(job.owner))
            self.app.send_task(TASK, [job.id], task_id=job.id, priority=job.priority, queue=queue)
        except (OperationalError, redis.exceptions.RedisError) as error:
            raise Unavailable(f"the queue is unavailable: {' '.join(str(error).split())[:160]}") from None

    def expected_seconds(self, ahead: int) -> float:
        """How long that many images should take, by the last fifty and the workers that are there."""
        return max(1.0, ahead * (self.median_seconds() or 5.0) / max(1, len(self.workers_of())))

    def median_seconds(self) -> float | None:
        """Of the last fifty images; None: none was made."""
        times = [float(text) for text in self.redis(lambda client: client.lrange(TIMES, 0, -1))]
        return statistics.median(times) if times else None

    def find(self, id: str) -> Job | None:
        return self.records.find(id)

    def recent(self, owner: str, limit: int, before: float | None = None) -> list[Job]:
        return self.records.recent(owner, limit, before)

    def batch(self, owner: str, id: str) -> list[Job]:
        return [job for job in self.records.batch(id) if job.owner == owner]

    def ahead(self, ids: list[str]) -> dict[str, int]:
        """By creation; priorities and the turns of keys can change it."""

        def work(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipe:
                for id in ids:
                    pipe.zrank(WAITING, id)
                pipe.zcard(RUNNING)
                return pipe.execute()

        *ranks, running = self.redis(work)
        return {id: rank + running for id, rank in zip(ids, ranks, strict=True) if rank is not None}

    def cancel(self, id: str) -> None:
        job = self.records.cancel(id)
        if job is not None:
            self.records.hook(job, "completed")
            with contextlib.suppress(Unavailable):  # they are removed with the record
                self.objects.drop_inputs(job)

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        return await self.listeners.changed(id, revision, seconds)

    def result(self, job: Job) -> Path:
        return self.objects.get(f"out/{job.output}")

    def status(self) -> dict[str, Any]:
        def work(client: Any) -> list[Any]:
            with client.pipeline(transaction=False) as pipe:
                pipe.zcard(WAITING)
                pipe.zrange(WAITING, 0, 0, withscores=True)
                pipe.zrange(RUNNING, 0, -1, withscores=True)
                return pipe.execute()

        length, oldest, running = self.redis(work)
        workers = self.registry.workers()
        return {
            "queue_length": length,
            "oldest_wait_seconds": time.time() - oldest[0][1] if oldest else 0.0,
            "running": [{"id": id, "since": since} for id, since in running] or None,
            "since": self.since,
            **summary(self.counts()[0]),
            "engine": None,
            "loaded": [*{worker.get("version") for worker in workers.values()}],
            "workers": workers,
        }

    def counts(self) -> tuple[dict[Name, float], dict[Name, Seen]]:
        return self.records.counts()

    def stop(self) -> None:
        self.closing = True
        self.listeners.close()

    def close(self, seconds: float | None = None) -> None:
        self.stop()
        self.app.close()
