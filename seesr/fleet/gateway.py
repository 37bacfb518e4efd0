"""The parts that make `seesr serve` with SEESR_REDIS a gateway: the same routes in front of a fleet."""

from __future__ import annotations

import secrets
from pathlib import Path

from seesr.config import Configuration
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import PREFIX
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.maintenance import Maintenance
from seesr.fleet.metadata_store import FleetMetadataStore
from seesr.fleet.redis_client import RedisClient
from seesr.object_store import Store
from seesr.serving.app import Parts
from seesr.serving.models import Models
from seesr.serving.webhooks import Send


def parts(configuration: Configuration, bundle: Path, send_once: Send) -> Parts:
    """What a gateway answers with.

    Raises:
        ValueError: the store is not configured, Redis is unavailable, or this machine's clock is wrong; one line.
    """
    redis = RedisClient(configuration.redis or "")
    redis.check_at_start()
    objects = FileStore(Store.configured(), configuration.data / "fetched")
    models = Models(bundle, configuration.bundles)
    jobs = FleetJobs(configuration, redis, objects, models.default.version, models.by_version)
    store = FleetMetadataStore(redis, objects, configuration.data, configuration.keep * 3600)
    maintenance = Maintenance(jobs, configuration.lease, send_once)
    return Parts(
        jobs, store, shared_secret(redis), {"maintenance": maintenance.clean, "webhooks": maintenance.send_webhooks},
        collectors=(redis.seconds, objects.seconds),
    )  # fmt: skip


def shared_secret(redis: RedisClient) -> bytes:
    """What all gateways sign with, made by the first."""
    key = f"{PREFIX}secret"
    redis(lambda client: client.set(key, secrets.token_hex(32), nx=True))
    return bytes.fromhex(redis(lambda client: client.get(key)))
