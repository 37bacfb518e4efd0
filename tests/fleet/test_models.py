"""One gateway in front of a group of workers for each bundle."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab.fleet.callers import IMAGE
from lab.fleet.servers import fleet
from seesr.networks import weights
from seesr.serving.identity import version_of

pytestmark = pytest.mark.long
URI = "data:image/png;base64," + base64.b64encode(IMAGE).decode()


def test_a_gateway_sends_each_model_to_the_workers_of_its_bundle(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    manifest = json.loads((weights.POCKET / weights.MANIFEST).read_text())
    (small / weights.MANIFEST).write_text(json.dumps({**manifest, "name": "small"}))
    own, other = version_of(weights.POCKET), version_of(small)
    with fleet(tmp_path / "fleet", ECHO_SECONDS="0.1", SEESR_BUNDLES=f"acme/small={small}") as running:
        address = running.addresses["gateway"]

        def predict(version: str, wait: str = "wait=30") -> Any:
            body = {"version": version, "input": {"image": URI, "num_inference_steps": 1}}
            headers = {"Prefer": wait} if wait else {}
            return httpx.post(f"{address}/v1/predictions", json=body, headers=headers, timeout=60).json()

        waiting = predict("acme/small", "")
        done = predict("you/seesr")
        assert (done["status"], done["model"], done["version"]) == ("succeeded", "local/seesr", own)
        assert httpx.get(f"{address}/v1/predictions/{waiting['id']}").json()["status"] == "starting"
        models = httpx.get(f"{address}/status").json()["models"]
        assert [(model["name"], model["loaded"]) for model in models] == [("you/seesr", True), ("acme/small", False)]

        running.start_worker("other", SEESR_WEIGHTS=str(small))
        done = predict(other)
        assert (done["status"], done["model"], done["version"]) == ("succeeded", "acme/small", other)
        ended = httpx.get(f"{address}/v1/predictions/{waiting['id']}").json()
        assert (ended["status"], ended["version"]) == ("succeeded", other)
        versions = dict(running.runs())
        assert {versions[waiting["id"]], versions[done["id"]]} == {other} and own in versions.values()
