"""The whole server in the test's process, on an engine that gives its input back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from lab.serve.echo import Echo
from seesr.config import Configuration
from seesr.networks import weights
from seesr.serving import app

QUICK = {"num_inference_steps": "1", "seed": "1"}
PNG = {"Content-Type": "image/png"}


@contextlib.contextmanager
def serving(folder: Path, base: str = "http://127.0.0.1:5000", **values: Any) -> Iterator[TestClient]:
    """The whole server in this process, on an engine that gives its input back."""
    configuration = Configuration(data=folder, **values)
    built = app.build(
        configuration,
        base,
        weights.POCKET,
        lambda send: app.local(configuration, Echo, weights.POCKET, send),  # type: ignore[arg-type, return-value]
    )
    with TestClient(built, base_url=base, raise_server_exceptions=False) as client:
        end = time.monotonic() + 10
        while client.get("/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield client
