"""Background work of gateways: republishes lost jobs, removes expired ones, sends webhooks."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import logging
import time
from typing import Any

from seesr.fleet.broker import queue_of
from seesr.fleet.job_store import EXPIRY, PREFIX, RUNNING, WAITING
from seesr.fleet.jobs import FleetJobs
from seesr.serving import webhooks
from seesr.serving.job import Away, Job
from seesr.serving.webhooks import Send

SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and a priority
HOOK_LEASE = 120.0  # seconds after which a message that its gateway does not renew goes to another one
MOST_HOOKS = 200  # messages that one gateway tries at the same time
log = logging.getLogger(__name__)


class Upkeep:
    """Runs in every gateway; a lock lets one of them at a time bring jobs back.

    Args:
        lease: seconds after which an unrenewed job goes to another worker; a job younger than that is not looked for.
        send_once: one try of a webhook; whether the receiver took it.
    """

    def __init__(self, jobs: FleetJobs, lease: int, send_once: Send) -> None:
        self.jobs, self.link, self.lease, self.send_once = jobs, jobs.link, lease, send_once
        self.missing: set[str] = set()

    async def clean(self) -> None:
        while True:
            try:
                if await asyncio.to_thread(self.claim_turn):
                    await asyncio.to_thread(self.reconcile)
                    await asyncio.to_thread(self.expire)
            except Away as error:
                log.warning("upkeep: %s", error)
            await asyncio.sleep(self.lease / 2)

    def claim_turn(self) -> bool:
        """Whether this gateway is the one of its version that cleans up now."""
        key = f"{PREFIX}upkeep:{self.jobs.version[:12]}"
        return bool(self.link(lambda client: client.set(key, "1", nx=True, ex=max(1, self.lease // 2))))

    def reconcile(self) -> None:
        """Publishes again what has not ended and is neither queued nor taken: lost between two commands of the broker.

        A job must be missing twice, so that one on its way from a list into a worker's hands is not run twice.
        """

        def unfinished(client: Any) -> list[str]:
            old = time.time() - self.lease
            return [*client.zrangebyscore(WAITING, "-inf", old), *client.zrangebyscore(RUNNING, "-inf", old)]

        open_jobs = set(self.link(unfinished))
        missing = open_jobs - self.known() if open_jobs else set()
        for id in missing & self.missing:
            job = self.jobs.find(id)
            if job is None:
                self.jobs.records.forget(id)
            elif not job.ended and job.version == self.jobs.version:  # others are looked for by their own gateways
                log.warning("job %s was lost by the queue and is published again", id)
                self.jobs.publish(job)
        self.missing = missing - self.missing

    def known(self) -> set[str]:
        """Ids that the broker has: in a list, or taken and not acknowledged."""
        queue = queue_of(self.jobs.version)

        def messages(client: Any) -> list[str]:
            steps = self.jobs.app.conf.broker_transport_options["priority_steps"]
            lists = [queue if step == 0 else f"{queue}{SEPARATOR}{step}" for step in steps]
            return [*(words for name in lists for words in client.lrange(name, 0, -1)), *client.hvals("unacked")]

        found = set()
        for words in self.link(messages):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a message that is none of ours
                message = json.loads(words)
                message = message[0] if isinstance(message, list) else message
                found.add(message["headers"]["id"])
        return found

    def expire(self) -> None:
        """Records and objects whose time is over go together; a job that has not ended stays."""
        keep = self.jobs.records.keep
        due = self.link(lambda client: client.zrangebyscore(EXPIRY, "-inf", time.time(), start=0, num=1000))
        for name in due:
            kind, _, id = name.partition(":")
            if kind == "job":
                job = self.jobs.find(id)
                if job is not None and not job.ended:
                    self.link(lambda client, name=name: client.zadd(EXPIRY, {name: time.time() + keep}))
                    continue
                self.jobs.records.forget(id)
                if job is not None:
                    self.jobs.objects.drop_inputs(job)
                if job is not None and job.output:
                    self.jobs.objects.drop(f"out/{job.output}")
            else:
                words = self.link(lambda client, id=id: client.getdel(f"{PREFIX}upload:{id}"))
                if words:
                    owner = json.loads(words)[0]
                    self.link(lambda client, id=id, owner=owner: client.zrem(f"{PREFIX}uploads:{owner}", id))
                self.jobs.objects.drop(f"uploads/{id}")
            self.link(lambda client, name=name: client.zrem(EXPIRY, name))

    async def send_webhooks(self) -> None:
        """Sends the webhooks that no other gateway has: to each receiver in order, to different ones at the same time.

        A gateway keeps what it has claimed while it tries; one that dies leaves it to the others.
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
                    free = len(claimed) < MOST_HOOKS
                    hook = await asyncio.to_thread(self.jobs.records.claim_hook, HOOK_LEASE) if free else None
                    job = await asyncio.to_thread(self.jobs.find, hook[0]) if hook else None
                    if hook is not None and job is None:
                        await asyncio.to_thread(self.jobs.records.drop_hook, *hook)
                except Away as error:
                    log.warning("webhooks: %s", error)
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
            except Away as error:  # it is sent again; the receiver recognizes it by its webhook-id
                log.warning("webhooks: %s", error)
