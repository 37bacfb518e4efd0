"""The parts that make `seesr serve` with SEESR_REDIS a gateway: the same routes in front of a fleet."""

from __future__ import annotations

import secrets
from pathlib import Path

from seesr.config import Configuration
from seesr.fleet.file_store import Objects
from seesr.fleet.job_store import PREFIX
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.maintenance import Upkeep
from seesr.fleet.metadata_store import FleetLedger
from seesr.fleet.redis_client import Link
from seesr.object_store import Store
from seesr.serving.app import Parts
from seesr.serving.models import Models
from seesr.serving.webhooks import Send


def parts(configuration: Configuration, bundle: Path, send_once: Send) -> Parts:
    """What a gateway answers with.

    Raises:
        ValueError: the store is not configured, Redis is unavailable, or this machine's clock is wrong; one line.
    """
    link = Link(configuration.redis or "")
    link.check_at_start()
    objects = Objects(Store.configured(), configuration.data / "fetched")
    models = Models(bundle, configuration.bundles)
    jobs = FleetJobs(configuration, link, objects, models.default.version, models.by_version)
    ledger = FleetLedger(link, objects, configuration.data, configuration.keep * 3600)
    upkeep = Upkeep(jobs, configuration.lease, send_once)
    return Parts(
        jobs, ledger, shared_secret(link), {"upkeep": upkeep.clean, "webhooks": upkeep.send_webhooks},
        collectors=(link.seconds, objects.seconds),
    )  # fmt: skip


def shared_secret(link: Link) -> bytes:
    """What all gateways sign with, made by the first."""
    key = f"{PREFIX}secret"
    link(lambda client: client.set(key, secrets.token_hex(32), nx=True))
    return bytes.fromhex(link(lambda client: client.get(key)))
