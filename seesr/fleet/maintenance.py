"""Background work of gateways: republishes lost jobs, removes expired ones, sends webhooks."""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import time
from typing import Any

from seesr.fleet.broker import PRIORITIES, queues_of
from seesr.fleet.job_store import EXPIRY, PREFIX, RUNNING, WAITING, job_key
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.transport import broker_jobs
from seesr.serving import webhooks
from seesr.serving.job import FAILED, Job, Unavailable
from seesr.serving.webhooks import Send

SWEEP = 3600.0  # seconds between two looks for files without a record
HOOK_LEASE = 120.0  # seconds after which a message that its gateway does not renew goes to another one
MAX_HOOKS = 200  # messages that one gateway tries at the same time
log = logging.getLogger(__name__)


class Maintenance:
    """Runs in every gateway; a lock lets one of them at a time bring jobs back.

    Args:
        lease: seconds after which an unrenewed job goes to another worker; a job younger than that is not looked for.
        send_once: one try of a webhook; whether the receiver took it.
    """

    def __init__(self, jobs: FleetJobs, lease: int, send_once: Send) -> None:
        self.jobs, self.redis, self.lease, self.send_once = jobs, jobs.redis, lease, send_once
        self.missing: set[str] = set()

    async def clean(self) -> None:
        while True:
            try:
                if versions := await asyncio.to_thread(self.claim_turn):
                    await asyncio.to_thread(self.reconcile, versions)
                    for work in (self.expire, self.sweep):
                        await asyncio.to_thread(work)
            except Unavailable as error:
                log.warning("maintenance failed; next try in half a lease: %s", error)
            await asyncio.sleep(self.lease / 2)

    def claim_turn(self) -> list[str]:
        """The versions for which this gateway is the one that cleans up now."""

        def claim(version: str) -> bool:
            key = f"{PREFIX}upkeep:{version[:12]}"
            return bool(self.redis(lambda client: client.set(key, "1", nx=True, ex=max(1, self.lease // 2))))

        return [version for version in self.jobs.versions if claim(version)]

    def reconcile(self, versions: list[str]) -> None:
        """Publishes jobs again that have not ended and are neither queued nor running: the broker lost them.

        A job must be missing twice, so that one that a worker is just taking is not run twice.
        """

        def unfinished(client: Any) -> list[str]:
            old = time.time() - self.lease
            return [*client.zrangebyscore(WAITING, "-inf", old), *client.zrangebyscore(RUNNING, "-inf", old)]

        open_jobs = set(self.redis(unfinished))
        missing = open_jobs - self.known(versions) if open_jobs else set()
        for id in missing & self.missing:
            job = self.jobs.find(id)
            if job is None:
                self.jobs.records.forget(id)
            elif not job.ended and job.version in versions:  # others are looked for by their own gateways
                log.warning("job %s was missing from the queue; published again", id)
                self.jobs.publish(job)
        self.missing = missing - self.missing

    def known(self, versions: list[str]) -> set[str]:
        """Ids that the broker has: in a list of these versions, or taken and not acknowledged."""
        queues = [queue for version in versions for queue in queues_of(version)]
        return self.redis(lambda client: broker_jobs(client, queues, PRIORITIES))

    def expire(self) -> None:
        """Removes records and objects whose time is over; a job that has not ended stays if anybody can run it."""
        keep = self.jobs.records.keep
        due = self.redis(lambda client: client.zrangebyscore(EXPIRY, "-inf", time.time(), start=0, num=1000))
        versions = {worker.get("version") for worker in self.jobs.registry.workers().values()} if due else set()
        for name in due:
            kind, _, id = name.partition(":")
            if kind == "job":
                job = self.jobs.find(id)
                if job is not None and not job.ended:
                    self.redis(lambda client, name=name: client.zadd(EXPIRY, {name: time.time() + keep}))
                    if job.version not in versions:
                        self.fail_without_worker(job)
                    continue
                self.jobs.records.forget(id)
                if job is not None:
                    self.jobs.objects.drop_inputs(job)
                if job is not None and job.output:
                    self.jobs.objects.drop(f"out/{job.output}")
            elif kind == "batch":
                if self.jobs.records.batch(id):  # it is there for as long as one of its jobs
                    self.redis(lambda client, name=name: client.zadd(EXPIRY, {name: time.time() + self.lease}))
                    continue
                self.redis(lambda client, id=id: client.delete(f"{PREFIX}batch:{id}"))
            else:
                text = self.redis(lambda client, id=id: client.getdel(f"{PREFIX}upload:{id}"))
                if text:
                    owner = json.loads(text)[0]
                    self.redis(lambda client, id=id, owner=owner: client.zrem(f"{PREFIX}uploads:{owner}", id))
                self.jobs.objects.drop(f"uploads/{id}")
            self.redis(lambda client, name=name: client.zrem(EXPIRY, name))

    def fail_without_worker(self, job: Job) -> None:
        """Ends a job that waited for SEESR_KEEP hours and whose version no worker has."""
        hours, version = self.jobs.records.keep / 3600, (job.version or "")[:12]
        message = f"no worker of version {version} has taken the image for {hours:g} hours; send it again"
        if self.jobs.records.end(job.id, FAILED, error=message):
            self.jobs.records.hook(job, "completed")
            self.jobs.objects.drop_inputs(job)

    def sweep(self) -> None:
        """Removes old files that no record names.

        A gateway that was killed between a file and its record leaves one, and so do a worker whose job has ended
        meanwhile and a Redis that lost its last writes.
        """
        keep = self.jobs.records.keep
        pause = max(1, int(min(SWEEP, keep / 4)))
        if not self.redis(lambda client: client.set(f"{PREFIX}sweep", "1", nx=True, ex=pause)):
            return
        for names in self.jobs.objects.older(keep + self.lease):
            for name in names:
                key = record_key(name)
                if not self.redis(lambda client, key=key: client.exists(key)):
                    self.jobs.objects.drop(name)

    async def send_webhooks(self) -> None:
        """Sends the webhooks that no other gateway has: to each receiver in order, to different ones at the same time.

        A gateway keeps what it has claimed while it tries; if it is killed, the others send it.
        """
        lanes: dict[str, asyncio.Lock] = collections.defaultdict(asyncio.Lock)
        claimed: dict[tuple[str, str], asyncio.Task[None]] = {}
        renewed = time.monotonic()
        async with asyncio.TaskGroup() as group:
            while True:
                claimed = {hook: task for hook, task in claimed.items() if not task.done()}
                try:
                    if time.monotonic() - renewed > HOOK_LEASE / 4:
                        await asyncio.to_thread(self.jobs.records.renew_hooks, list(claimed), HOOK_LEASE)
                        renewed = time.monotonic()
                    free = len(claimed) < MAX_HOOKS
                    hook = await asyncio.to_thread(self.jobs.records.claim_hook, HOOK_LEASE) if free else None
                    job = await asyncio.to_thread(self.jobs.find, hook[0]) if hook else None
                    if hook is not None and job is None:
                        await asyncio.to_thread(self.jobs.records.drop_hook, *hook)
                except Unavailable as error:
                    log.warning("webhooks cannot be read; next try in 1 s: %s", error)
                    await asyncio.sleep(1)
                    continue
                if hook is None or job is None:
                    await asyncio.sleep(0.5 if hook is None else 0)
                    continue
                lane = lanes[job.receiver]
                claimed[hook] = group.create_task(self.send_webhook(job, hook[1], lane))
                await asyncio.sleep(0)  # it takes its place in the lane
                for name in [name for name, lock in lanes.items() if lock is not lane and not lock.locked()]:
                    del lanes[name]

    async def send_webhook(self, job: Job, event: str, lane: asyncio.Lock) -> None:
        async with lane:
            await webhooks.send(self.send_once, job, event)
            try:
                await asyncio.to_thread(self.jobs.records.drop_hook, job.id, event)
            except Unavailable as error:  # it is sent again; the receiver recognizes it by its webhook-id
                log.warning("webhooks cannot be read; next try in 1 s: %s", error)


def record_key(name: str) -> str:
    """The record of a file: in/ID, in/ID-mask, tiles/ID-... and out/ID.png belong to a job, uploads/ID to an upload."""
    folder, _, file = name.partition("/")
    id = file.partition(".")[0].partition("-")[0]
    return f"{PREFIX}upload:{id}" if folder == "uploads" else job_key(id)
