"""What gateways do beside answering: bring lost jobs back, remove what has expired, send webhooks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from seesr.fleet.broker import queue_of
from seesr.fleet.job_store import EXPIRY, PREFIX, RUNNING, WAITING
from seesr.fleet.jobs import FleetJobs
from seesr.serving.job import Away, Job

SEPARATOR = "\x06\x16"  # kombu's, between a queue's name and a priority
HOOK_LEASE = 120.0  # seconds that one gateway has for the tries of one message
log = logging.getLogger(__name__)

Send = Callable[[Job, str], Any]  # (job, event) -> awaitable


class Upkeep:
    """Runs in every gateway; a lock lets one of them at a time bring jobs back.

    Args:
        lease: seconds after which an unrenewed job goes to another worker; a job younger than that is not looked for.
    """

    def __init__(self, jobs: FleetJobs, lease: int) -> None:
        self.jobs, self.link, self.lease = jobs, jobs.link, lease
        self.missing: set[str] = set()

    async def run(self, send: Send) -> None:
        """Until it is cancelled."""
        await asyncio.gather(self.clean(), self.tell(send))

    async def clean(self) -> None:
        while True:
            try:
                if self.link(lambda client: client.set(f"{PREFIX}upkeep", "1", nx=True, ex=max(1, self.lease // 2))):
                    await asyncio.to_thread(self.reconcile)
                    await asyncio.to_thread(self.expire)
            except Away as error:
                log.warning("upkeep: %s", error)
            await asyncio.sleep(self.lease / 2)

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
            elif not job.ended:
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
        """Records and objects whose time is over go together."""
        due = self.link(lambda client: client.zrangebyscore(EXPIRY, "-inf", time.time(), start=0, num=1000))
        for name in due:
            kind, _, id = name.partition(":")
            if kind == "job":
                job = self.jobs.records.forget(id)
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

    async def tell(self, send: Send) -> None:
        """Webhooks: whichever gateway takes one tries it; one that dies meanwhile leaves it to the others."""
        while True:
            try:
                hook = self.jobs.records.claim_hook(HOOK_LEASE)
                if hook is None:
                    await asyncio.sleep(0.5)
                    continue
                job = self.jobs.find(hook[0])
                if job is not None:
                    await send(job, hook[1])
                self.jobs.records.drop_hook(*hook)
            except Away as error:
                log.warning("webhooks: %s", error)
                await asyncio.sleep(1)
