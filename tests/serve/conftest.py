"""Fixture: one `seesr serve` for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from serving import Serving


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`seesr serve` on the pocket bundle, with two keys."""
    with Serving(tmp_path_factory.mktemp("serve")) as running:
        yield running
    assert "Traceback" not in running.log()
