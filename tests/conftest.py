"""Shared fixtures: tiny networks of the real classes, the bundled pocket model, a photograph."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# OpenMP reads these when torch loads. One thread for each process: the run uses a process per core (scripts/test), and
# two processes whose threads wait by spinning slow each other several times over.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="seesr-tests-")  # rates of the tests stay out of the user's

import numpy as np
import pytest
import skimage.data
import tiny
from PIL import Image

from scripts.cog_server import CogServer
from seesr import Engine, Upscaler
from seesr.networks import weights

SERVERS = ("server", "service", "echo", "pocket_fleet")  # fixtures that start a server for many tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked long or slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips what cannot run here, and keeps the tests of one server, or else of one file, in one process."""
    everything = config.getoption("--all")
    skipped = {"slow": "--all", "long": "--all"} if not everything else {}
    if not (weights.FULL / weights.MANIFEST).exists():
        skipped["full"] = "weights/full"
    for item in items:
        for mark, needed in skipped.items():
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed}"))
        shared = [name for name in SERVERS if name in getattr(item, "fixturenames", ())]
        item.add_marker(pytest.mark.xdist_group(shared[0] if shared else str(item.path)))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="session")
def tiny_upscaler(tiny_bundle: Path) -> Upscaler:
    return Upscaler.load(tiny_bundle, "cpu")


@pytest.fixture(scope="session")
def pocket() -> Upscaler:
    return Upscaler.load(weights.POCKET, "cpu")


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.load(weights.POCKET, "cpu")


@pytest.fixture(scope="session")
def photo() -> Image.Image:
    """A 64x48 piece of a photograph."""
    return Image.fromarray(skimage.data.chelsea()[60:252, 100:356]).reduce(4)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CogServer]:
    """Cog's server on the pocket bundle."""
    log = tmp_path_factory.mktemp("server") / "log"
    with CogServer(log, SEESR_WEIGHTS=str(weights.POCKET)) as running:
        running.wait_until_ready()
        yield running
    assert "deprecated" not in log.read_text()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
