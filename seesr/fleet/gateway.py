"""`seesr serve` with SEESR_REDIS: the same routes before a fleet."""

from __future__ import annotations

import secrets
from pathlib import Path

from seesr.configuration import Configuration
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.ledger import FleetLedger
from seesr.fleet.link import Link
from seesr.fleet.objects import Objects
from seesr.fleet.records import PREFIX
from seesr.fleet.upkeep import Upkeep
from seesr.serving.app import Parts
from seesr.serving.identity import version_of
from seesr.store import Store


def parts(configuration: Configuration, bundle: Path) -> Parts:
    """What a gateway answers with.

    Raises:
        ValueError: the store is not configured, Redis is away, or this machine's clock is wrong; one line.
    """
    link = Link(configuration.redis or "")
    link.check_at_start()
    objects = Objects(Store.configured(), configuration.data / "fetched")
    jobs = FleetJobs(configuration, link, objects, version_of(bundle))
    ledger = FleetLedger(link, objects, configuration.data, configuration.keep * 3600)
    return Parts(jobs, ledger, shared_secret(link), Upkeep(jobs, configuration.lease).run)


def shared_secret(link: Link) -> bytes:
    """What all gateways sign with, made by the first."""
    key = f"{PREFIX}secret"
    link(lambda client: client.set(key, secrets.token_hex(32), nx=True))
    return bytes.fromhex(link(lambda client: client.get(key)))
