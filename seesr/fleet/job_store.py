"""Jobs in Redis: one hash each, one JSON field per attribute; scripts change several fields atomically."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

from seesr.fleet.broker import LANES
from seesr.fleet.redis_client import RedisClient
from seesr.serving.job import CANCELED, DONE, Job
from seesr.serving.job_counts import MAX_KEYS, OTHER, Name, Seen, exemplars, increments

PREFIX = "seesr:"
WAITING, RUNNING = PREFIX + "waiting", PREFIX + "running"  # ids by their creation, and by their latest start
CHANGES = PREFIX + "changes"  # channel: the id of every job that changed
EXPIRY, HOOKS = PREFIX + "expiry", PREFIX + "hooks"
LANE = PREFIX + "lanes"  # hash: the lane of each owner
PROBE = PREFIX + "probe"
COUNTS, EXEMPLARS, OWNERS = PREFIX + "job-counts", PREFIX + "exemplars", PREFIX + "counted-keys"
TIMES = PREFIX + "times"
ATTEMPTS = 3

ADD = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('ZADD', KEYS[2], ARGV[2], ARGV[1])
redis.call('ZADD', KEYS[3], ARGV[2], ARGV[1])
redis.call('ZADD', KEYS[4], ARGV[3], 'job:' .. ARGV[1])
if ARGV[4] ~= '' then redis.call('RPUSH', KEYS[5], ARGV[1]) end
return 1
"""
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
UPDATE = """
if redis.call('HEXISTS', KEYS[1], 'owner') == 0 then return 'gone' end
for i = 2, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('PUBLISH', KEYS[2], ARGV[1])
return redis.call('HGET', KEYS[1], 'cancel')
"""
WAITING_OWNERS = """
local owners = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local owner = redis.call('HGET', ARGV[1] .. id, 'owner')
    if owner then table.insert(owners, owner) end
end
return owners
"""
AHEAD = """
local ahead = 0
for _, id in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
    local priority = tonumber(redis.call('HGET', ARGV[1] .. id, 'priority') or '')
    if priority and priority <= tonumber(ARGV[2]) then ahead = ahead + 1 end
end
return ahead
"""
ASSIGN_LANE = """
local lane = redis.call('HGET', KEYS[1], ARGV[1])
if lane then return tonumber(lane) end
lane = redis.call('HLEN', KEYS[1]) % tonumber(ARGV[2])
redis.call('HSET', KEYS[1], ARGV[1], lane)
return lane
"""
CLAIM = """
local due = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, 1)
if due[1] then redis.call('ZADD', KEYS[1], ARGV[2], due[1]) end
return due[1]
"""


def job_key(id: str) -> str:
    return f"{PREFIX}job:{id}"


class JobStore:
    """Every job of the fleet.

    Args:
        keep: seconds after its end for which a job is kept.
    """

    def __init__(self, redis: RedisClient, keep: float) -> None:
        self.redis, self.keep = redis, keep
        script = redis.client.register_script
        self.add_script, self.begin_script = script(ADD), script(BEGIN)
        self.end_script, self.update_script, self.ahead_script = script(END), script(UPDATE), script(AHEAD)
        self.claim_script, self.owners_script, self.lane_script = (
            script(CLAIM),
            script(WAITING_OWNERS),
            script(ASSIGN_LANE),
        )

    def count_waiting(self) -> int:
        return self.redis(lambda client: client.zcard(WAITING))

    def waiting_owners(self) -> list[str]:
        """The owner of each job that waits."""
        owners = self.redis(lambda client: self.owners_script(keys=[WAITING], args=[job_key("")]))
        return [json.loads(owner) for owner in owners]

    def count_ahead(self, priority: int) -> int:
        """The jobs that wait and are at least as urgent."""
        return self.redis(lambda client: self.ahead_script(keys=[WAITING], args=[job_key(""), priority]))

    def running_since(self) -> list[float]:
        """The start of each job that runs, seconds since 1970."""
        return [since for _, since in self.redis(lambda client: client.zrange(RUNNING, 0, -1, withscores=True))]

    def lane(self, owner: str) -> int:
        """The lane of the queue for an owner's jobs: one of its own, until there are more owners than lanes."""
        return self.redis(lambda client: self.lane_script(keys=[LANE], args=[owner, LANES]))

    def add(self, job: Job) -> bool:
        """Keeps a new job as waiting; False if there is one of this id."""
        fields = encoded(dataclasses.asdict(job))
        keys = [job_key(job.id), WAITING, f"{PREFIX}owner:{job.owner}", EXPIRY, f"{PREFIX}batch-jobs:{job.batch}"]
        args = [job.id, job.created, job.created + self.keep, job.batch or ""]
        args += [word for pair in fields.items() for word in pair]
        return bool(self.redis(lambda client: self.add_script(keys=keys, args=args)))

    def find(self, id: str) -> Job | None:
        return decoded(self.redis(lambda client: client.hgetall(job_key(id))))

    def many(self, ids: list[str]) -> list[Job]:
        """Those that are there still."""

        def work(client: Any) -> list[dict[str, str]]:
            with client.pipeline(transaction=False) as pipe:
                for id in ids:
                    pipe.hgetall(job_key(id))
                return pipe.execute()

        return [job for fields in self.redis(work) if (job := decoded(fields))]

    def recent(self, owner: str, limit: int, before: float | None) -> list[Job]:
        key, top = f"{PREFIX}owner:{owner}", "+inf" if before is None else f"({before!r}"
        return self.many(self.redis(lambda client: client.zrevrangebyscore(key, top, "-inf", start=0, num=limit)))

    def batch(self, id: str) -> list[Job]:
        return self.many(self.redis(lambda client: client.lrange(f"{PREFIX}batch-jobs:{id}", 0, -1)))

    def begin(self, id: str) -> str:
        """A worker takes the job: how often it was begun now, "ended", or "gone"."""
        keys = [job_key(id), WAITING, RUNNING, CHANGES]
        return self.redis(lambda client: self.begin_script(keys=keys, args=[id, time.time()]))

    def report(self, job: Job, **values: Any) -> None:
        """Writes a running job's fields, and reads whether it is to stop: it was canceled, or its record is gone."""
        job.cancel = self.update(job.id, **values) != "false"

    def update(self, id: str, **values: Any) -> str:
        """Writes fields of a job; its field `cancel` in JSON, or "gone". A record that is gone does not come back."""
        args = [id, *(word for pair in encoded(values).items() for word in pair)]
        return self.redis(lambda client: self.update_script(keys=[job_key(id), CHANGES], args=args))

    def end(self, id: str, status: str, only_waiting: bool = False, **values: Any) -> Job | None:
        """Ends and counts a job that has not ended, and returns it; None if it had, or `only_waiting` and it runs."""
        fields = encoded({"status": status, "completed": time.time(), **values})
        keys = [job_key(id), WAITING, RUNNING, CHANGES]
        args = [id, "waiting" if only_waiting else "any", *(word for pair in fields.items() for word in pair)]
        if not self.redis(lambda client: self.end_script(keys=keys, args=args)):
            return None
        self.redis(lambda client: client.zadd(EXPIRY, {f"job:{id}": time.time() + self.keep}))
        job = self.find(id)
        if job is not None:
            self.count(job)
        return job

    def cancel(self, id: str) -> Job | None:
        """Asks for the end; the job if it was still waiting, and so has ended."""
        self.update(id, cancel=True)
        return self.end(id, CANCELED, only_waiting=True)

    def count(self, job: Job) -> None:
        """Adds an ended job to the counts of the fleet. Two workers at once may each count one key too many."""

        def work(client: Any) -> None:
            owner = job.owner
            if not client.sismember(OWNERS, owner):
                if client.scard(OWNERS) < MAX_KEYS:
                    client.sadd(OWNERS, owner)
                else:
                    owner = OTHER
            with client.pipeline() as pipe:
                if job.status == DONE and job.metrics:
                    pipe.lpush(TIMES, (job.completed or 0) - (job.started or 0))
                    pipe.ltrim(TIMES, 0, 49)
                for name, value in increments(job, owner).items():
                    pipe.hincrbyfloat(COUNTS, json.dumps(name), value)
                for name, seen in exemplars(job).items():
                    pipe.hset(EXEMPLARS, json.dumps(name), json.dumps(seen))
                pipe.expire(EXEMPLARS, math.ceil(self.keep))  # no job's id outlives the last job
                pipe.execute()

        self.redis(work)

    def counts(self) -> tuple[dict[Name, float], dict[Name, Seen]]:
        """The counts of the fleet and the latest exemplars."""
        counts, seen = self.redis(lambda client: (client.hgetall(COUNTS), client.hgetall(EXEMPLARS)))
        return (
            {tuple(json.loads(name)): float(value) for name, value in counts.items()},
            {tuple(json.loads(name)): tuple(json.loads(value)) for name, value in seen.items()},
        )

    def hook(self, job: Job, event: str) -> None:
        """Queues an event for the job's webhook; any gateway sends it."""
        if job.webhook and (job.events is None or event in job.events):
            self.redis(lambda client: client.zadd(HOOKS, {f"{job.id} {event}": time.time()}))

    def claim_hook(self, lease: float) -> tuple[str, str] | None:
        """(job, event) of the next due webhook; other gateways do not get it for `lease` seconds."""
        now = time.time()
        claimed = self.redis(lambda client: self.claim_script(keys=[HOOKS], args=[now, now + lease]))
        return tuple(claimed.split(" ")) if claimed else None

    def renew_hooks(self, hooks: list[tuple[str, str]], lease: float) -> None:
        """Keeps claimed messages for `lease` seconds more."""
        if hooks:
            due = {f"{id} {event}": time.time() + lease for id, event in hooks}
            self.redis(lambda client: client.zadd(HOOKS, due, xx=True))

    def drop_hook(self, id: str, event: str) -> None:
        self.redis(lambda client: client.zrem(HOOKS, f"{id} {event}"))

    def forget(self, id: str) -> Job | None:
        """Removes a job's record and returns it."""
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

        self.redis(work)
        return job


def encoded(values: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in values.items()}


def decoded(fields: dict[str, str]) -> Job | None:
    """None for a record that is gone, or of which a late report left a piece."""
    if "owner" not in fields:
        return None
    return Job.from_record({name: json.loads(value) for name, value in fields.items()})
