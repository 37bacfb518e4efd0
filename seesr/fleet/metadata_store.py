"""Uploads, idempotency keys and batch notes of a fleet, in Redis and the object store."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import EXPIRY, PREFIX
from seesr.fleet.redis_client import RedisClient
from seesr.serving.metadata_store import USAGE_DAYS, remove_older

RELEASE = """
local value = redis.call('GET', KEYS[1])
if value and cjson.decode(value)[2] == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""

ADD_USAGE = """
local used = tonumber(redis.call('HGET', KEYS[1], ARGV[1] .. ' megapixels') or 0)
if used + tonumber(ARGV[3]) > tonumber(ARGV[4]) then return 0 end
redis.call('HINCRBYFLOAT', KEYS[1], ARGV[1] .. ' megapixels', ARGV[3])
redis.call('HINCRBY', KEYS[1], ARGV[1] .. ' images', ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
"""


class FleetMetadataStore:
    """See seesr.serving.metadata_store.MetadataStore.

    Args:
        folder: of this machine, for files on their way.
        keep: seconds for which things are kept.
    """

    def __init__(self, redis: RedisClient, objects: FileStore, folder: Path, keep: float) -> None:
        self.redis, self.objects, self.folder, self.keep = redis, objects, folder, keep
        for name in ("parts", "zips"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def file(self, kind: str, name: str) -> Path:
        assert "/" not in name and name not in ("", ".", "..")
        return self.folder / kind / name

    def keep_upload(self, owner: str, record: dict[str, Any], path: Path) -> None:
        self.objects.put(f"uploads/{record['id']}", path)
        path.unlink()

        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.set(f"{PREFIX}upload:{record['id']}", json.dumps([owner, record]))
                pipe.zadd(f"{PREFIX}uploads:{owner}", {record["id"]: time.time()})
                pipe.zadd(EXPIRY, {f"upload:{record['id']}": time.time() + self.keep})
                pipe.execute()

        self.redis(work)

    def uploads(self, owner: str, id: str | None = None) -> list[dict[str, Any]]:
        key = f"{PREFIX}uploads:{owner}"
        ids = [id] if id else self.redis(lambda client: client.zrevrange(key, 0, 99))
        texts = [self.redis(lambda client, id=id: client.get(f"{PREFIX}upload:{id}")) for id in ids]
        pairs = [json.loads(text) for text in texts if text]
        return [record for record_owner, record in pairs if record_owner == owner]

    def upload_file(self, id: str) -> Path:
        return self.objects.get(f"uploads/{id}")

    def drop_upload(self, owner: str, id: str) -> None:
        self.redis(lambda client: client.delete(f"{PREFIX}upload:{id}"))
        self.redis(lambda client: client.zrem(f"{PREFIX}uploads:{owner}", id))
        self.objects.drop(f"uploads/{id}")

    def claim(self, owner: str, key: str, digest: str, id: str) -> tuple[str, str] | None:
        """Atomic: of two gateways that are asked at once, one gets the other's answer."""
        name, value = f"{PREFIX}key:{owner}:{key}", json.dumps([digest, id])
        if self.redis(lambda client: client.set(name, value, nx=True, ex=int(self.keep))):
            return None
        text = self.redis(lambda client: client.get(name))
        return tuple(json.loads(text)) if text else None

    def release(self, owner: str, key: str, id: str) -> None:
        name = f"{PREFIX}key:{owner}:{key}"
        self.redis(lambda client: client.eval(RELEASE, 1, name, id))

    def add_usage(self, owner: str, day: str, images: int, megapixels: float, quota: float | None) -> bool:
        keys, limit = [f"{PREFIX}usage:{owner}"], "inf" if quota is None else repr(quota)
        args = [day, images, repr(megapixels), limit, USAGE_DAYS * 86400]
        return bool(self.redis(lambda client: client.eval(ADD_USAGE, 1, *keys, *args)))

    def usage(self, owner: str) -> list[tuple[str, int, float]]:
        result = self.redis(lambda client: client.hgetall(f"{PREFIX}usage:{owner}"))
        days = sorted({name.partition(" ")[0] for name in result}, reverse=True)[:USAGE_DAYS]
        return [(day, int(result[f"{day} images"]), float(result[f"{day} megapixels"])) for day in days]

    def keep_note(self, id: str, note: dict[str, Any]) -> None:
        def work(client: Any) -> None:
            with client.pipeline() as pipe:
                pipe.set(f"{PREFIX}batch:{id}", json.dumps(note))
                pipe.zadd(EXPIRY, {f"batch:{id}": time.time() + self.keep})
                pipe.execute()

        self.redis(work)

    def note(self, id: str) -> dict[str, Any] | None:
        text = self.redis(lambda client: client.get(f"{PREFIX}batch:{id}"))
        return json.loads(text) if text else None

    def free_bytes(self) -> int:
        return self.objects.free_bytes()

    def expire(self, seconds: float) -> None:
        """Scratch files of this machine; records and objects are the fleet's (seesr.fleet.maintenance)."""
        self.objects.trim(seconds)
        for kind in ("parts", "zips"):
            remove_older(self.folder / kind, time.time() - seconds)

    def close(self) -> None:
        self.redis.client.close()
