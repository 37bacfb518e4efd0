"""Jobs in Redis: one hash each, one JSON field per attribute; scripts change several fields atomically."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from seesr.fleet.redis_client import Link
from seesr.serving.job import CANCELED, Job

PREFIX = "seesr:"
WAITING, RUNNING = PREFIX + "waiting", PREFIX + "running"  # ids by their creation, and by their latest start
CHANGES = PREFIX + "changes"  # channel: the id of every job that changed
EXPIRY, HOOKS = PREFIX + "expiry", PREFIX + "hooks"
COUNTS, STAGES, TIMES = PREFIX + "counts", PREFIX + "stage-seconds", PREFIX + "times"
ATTEMPTS = 3

BEGIN = """
local status = redis.call('HGET', KEYS[1], 'status')
if not status then return 'gone' end
if status ~= '"starting"' and status ~= '"processing"' then return 'ended' end
redis.call('HSET', KEYS[1], 'status', '"processing"', 'started', ARGV[2])
redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
redis.call('PUBLISH', KEYS[4], ARGV[1])
return tostring(redis.call('HINCRBY', KEYS[1], 'attempts', 1))
"""
END = """
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= '"starting"' and (status ~= '"processing"' or ARGV[2] == 'waiting') then return 0 end
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('PUBLISH', KEYS[4], ARGV[1])
return 1
"""
CLAIM = """
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, 1)
if due[1] then redis.call('ZADD', KEYS[1], ARGV[2], due[1]) end
return due[1]
"""


def job_key(id: str) -> str:
    return f"{PREFIX}job:{id}"


class Records:
    """Every job of the fleet.

    Args:
        keep: seconds after its end for which a job is kept.
    """

    def __init__(self, link: Link, keep: float) -> None:
        self.link, self.keep = link, keep
        self.begin_script, self.end_script, self.claim_script = (
            link.redis.register_script(words) for words in (BEGIN, END, CLAIM)
        )

    def add(self, job: Job, most: int) -> int:
        """Keeps a new job as waiting, unless `most` wait already; returns how many were before it."""
        ahead = self.link(lambda client: client.zcard(WAITING))
        if ahead >= most:
            return ahead

        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.hset(job_key(job.id), mapping=encoded(dataclasses.asdict(job)))
                pipe.zadd(WAITING, {job.id: job.created})
                pipe.zadd(f"{PREFIX}owner:{job.owner}", {job.id: job.created})
                pipe.zadd(EXPIRY, {f"job:{job.id}": job.created + self.keep})
                if job.batch:
                    pipe.rpush(f"{PREFIX}batch-jobs:{job.batch}", job.id)
                pipe.execute()

        self.link(work)
        return ahead

    def find(self, id: str) -> Job | None:
        return decoded(self.link(lambda client: client.hgetall(job_key(id))))

    def many(self, ids: list[str]) -> list[Job]:
        """Those that are there still."""

        def work(client: Any) -> list[dict[str, str]]:
            with client.pipeline(transaction=False) as pipe:
                for id in ids:
                    pipe.hgetall(job_key(id))
                return pipe.execute()

        return [job for found in self.link(work) if (job := decoded(found))]

    def recent(self, owner: str, limit: int, before: float | None) -> list[Job]:
        key, top = f"{PREFIX}owner:{owner}", "+inf" if before is None else f"({before!r}"
        return self.many(self.link(lambda client: client.zrevrangebyscore(key, top, "-inf", start=0, num=limit)))

    def batch(self, id: str) -> list[Job]:
        return self.many(self.link(lambda client: client.lrange(f"{PREFIX}batch-jobs:{id}", 0, -1)))

    def begin(self, id: str) -> str:
        """A worker takes the job: how often it was begun now, "ended", or "gone"."""
        keys = [job_key(id), WAITING, RUNNING, CHANGES]
        return self.link(lambda client: self.begin_script(keys=keys, args=[id, time.time()]))

    def report(self, job: Job, **values: Any) -> None:
        """Writes a running job's fields, and reads whether anybody wants it still."""

        def work(client: Any) -> list[Any]:
            with client.pipeline() as pipe:
                pipe.hset(job_key(job.id), mapping=encoded(values))
                pipe.hincrby(job_key(job.id), "revision", 1)
                pipe.hget(job_key(job.id), "cancel")
                pipe.publish(CHANGES, job.id)
                return pipe.execute()

        job.cancel = self.link(work)[2] == "true"

    def end(self, id: str, status: str, only_waiting: bool = False, **values: Any) -> bool:
        """Ends a job that has not ended; False if it had, or `only_waiting` and it runs."""
        fields = encoded({"status": status, "completed": time.time(), **values})
        keys = [job_key(id), WAITING, RUNNING, CHANGES]
        args = [id, "waiting" if only_waiting else "any", *(word for pair in fields.items() for word in pair)]
        ended = bool(self.link(lambda client: self.end_script(keys=keys, args=args)))
        if ended:
            self.link(lambda client: client.zadd(EXPIRY, {f"job:{id}": time.time() + self.keep}))
            self.link(lambda client: client.hincrby(COUNTS, status, 1))
        return ended

    def cancel(self, id: str) -> bool:
        """Asks for the end; True if it was still waiting, and so has ended."""
        self.link(lambda client: client.exists(job_key(id)) and client.hset(job_key(id), "cancel", "true"))
        return self.end(id, CANCELED, only_waiting=True)

    def count(self, job: Job) -> None:
        """Adds an image that was made to what the fleet shows of itself."""

        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.lpush(TIMES, (job.completed or 0) - (job.started or 0))
                pipe.ltrim(TIMES, 0, 49)
                for name, seconds in job.metrics["seconds"].items():
                    pipe.hincrbyfloat(STAGES, name, seconds)
                pipe.hincrbyfloat(COUNTS, "queue_seconds", (job.started or 0) - job.created)
                pipe.hincrby(COUNTS, "tiles", job.metrics["tiles"] * job.metrics["steps"])
                retries = job.metrics["out_of_memory_retries"] + job.metrics["float32_retries"]
                pipe.hincrby(COUNTS, "retries", retries)
                pipe.execute()

        self.link(work)

    def hook(self, job: Job, event: str) -> None:
        """Something that a webhook is to be told; any gateway sends it."""
        if job.webhook and (job.events is None or event in job.events):
            self.link(lambda client: client.zadd(HOOKS, {f"{job.id} {event}": time.time()}))

    def claim_hook(self, lease: float) -> tuple[str, str] | None:
        """(job, event) that is to be told now; nobody else gets it for `lease` seconds."""
        now = time.time()
        found = self.link(lambda client: self.claim_script(keys=[HOOKS], args=[now, now + lease]))
        return tuple(found.split(" ")) if found else None

    def renew_hooks(self, hooks: list[tuple[str, str]], lease: float) -> None:
        """Keeps claimed messages for `lease` seconds more."""
        if hooks:
            due = {f"{id} {event}": time.time() + lease for id, event in hooks}
            self.link(lambda client: client.zadd(HOOKS, due, xx=True))

    def drop_hook(self, id: str, event: str) -> None:
        self.link(lambda client: client.zrem(HOOKS, f"{id} {event}"))

    def forget(self, id: str) -> Job | None:
        """Removes a job's record; what it said."""
        job = self.find(id)

        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.delete(job_key(id))
                pipe.zrem(WAITING, id)
                pipe.zrem(RUNNING, id)
                if job is not None:
                    pipe.zrem(f"{PREFIX}owner:{job.owner}", id)
                    if job.batch:
                        pipe.lrem(f"{PREFIX}batch-jobs:{job.batch}", 0, id)
                pipe.execute()

        self.link(work)
        return job


def encoded(values: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in values.items()}


def decoded(found: dict[str, str]) -> Job | None:
    """None for a record that is gone, or of which a late report left a piece."""
    if "owner" not in found:
        return None
    return Job.from_record({name: json.loads(value) for name, value in found.items()})
