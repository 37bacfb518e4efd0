"""The parts of a gateway, on a real Redis."""

from __future__ import annotations

from typing import Any

import pytest

from seesr.config import Configuration
from seesr.fleet import gateway
from seesr.fleet.redis_client import RedisClient
from seesr.networks import weights
from seesr.serving.identity import version_of


def test_the_parts_of_a_gateway(configuration: Configuration) -> None:
    parts = gateway.parts(configuration.model_copy(update={"keep": 2.0}), weights.POCKET, None)  # type: ignore[arg-type]
    jobs: Any = parts.jobs
    store: Any = parts.store
    assert jobs.version == version_of(weights.POCKET) and jobs.versions == [jobs.version]
    assert jobs.records.keep == store.keep == 2 * 3600
    assert list(parts.background) == ["maintenance", "webhooks"] and parts.drained is None
    assert jobs.objects.cache == configuration.data / "fetched" and len(parts.collectors) == 2
    jobs.close()


def test_all_gateways_sign_with_the_secret_of_the_first(redis: RedisClient) -> None:
    secrets = [gateway.shared_secret(redis) for _ in range(2)]
    assert secrets[0] == secrets[1] and len(secrets[0]) == 32
    redis.client.flushdb()
    assert gateway.shared_secret(redis) != secrets[0]


def test_a_gateway_without_a_store_does_not_start(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SEESR_STORE")
    with pytest.raises(ValueError, match="SEESR_STORE is not set"):
        gateway.parts(configuration, weights.POCKET, None)  # type: ignore[arg-type]
