"""Fixtures: a replica of the hub with miniature checkpoints, and bundles converted from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import published
import pytest
from hub import Hub

from seesr.checkpoints import __main__ as command
from seesr.checkpoints import convert, sources, web


@pytest.fixture(scope="session")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    published.publish(root)
    return root


@pytest.fixture
def hub(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The replica, with an empty cache and no token. Its files are hard links: change one by replacing it."""
    root = Path(shutil.copytree(repositories, tmp_path / "hub", copy_function=lambda a, b: Path(b).hardlink_to(a)))
    sums = published.sums(root)
    with Hub(root) as running:
        for name, value in {"HF_ENDPOINT": running.url, "SEESR_GITHUB": running.raw}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SEESR_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "no-login"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(web, "time", SimpleNamespace(sleep=running.slept.append))
        monkeypatch.setattr(sources, "published", lambda: sums)
        yield running


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """`run(*arguments)` is ./scripts/weights in this process, with tmp_path/full as its bundle."""

    def call(*arguments: str) -> None:
        command.main(["--target", str(tmp_path / "full"), *arguments])

    return call


@pytest.fixture
def unconverted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion only makes an empty folder: for tests of downloads."""
    monkeypatch.setattr(convert, "convert", lambda source, target, licences: target.mkdir())


@pytest.fixture(scope="session")
def converted(repositories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of downloads, as the command keeps them."""
    root, environment = tmp_path_factory.mktemp("cache"), pytest.MonkeyPatch()
    sums = published.sums(repositories)
    with Hub(repositories) as running, environment.context() as patch:
        for name, value in {"HF_ENDPOINT": running.url, "SEESR_GITHUB": running.raw, "SEESR_CACHE": str(root)}.items():
            patch.setenv(name, value)
        patch.setattr(sources, "published", lambda: sums)
        command.main(["--target", str(root / "full"), "--keep"])
    return root


@pytest.fixture
def downloads(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted / "downloads", tmp_path / "downloads"))
