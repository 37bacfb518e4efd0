"""POST /quote and deadlines that cannot be met, on an engine that sleeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from echo_server import PNG, QUICK
from serving import sharp
from starlette.testclient import TestClient

from lab.serve.echo import TILES, Echo
from seesr.config import Configuration
from seesr.networks import weights
from seesr.serving import app

SECONDS = 0.4  # of one image


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    configuration = Configuration(data=tmp_path)
    built = app.build(
        configuration,
        "http://images.test",
        weights.POCKET,
        lambda send: app.local(configuration, lambda: Echo(SECONDS), weights.POCKET, send),  # type: ignore[arg-type, return-value]
    )
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.01)
        yield client


def post(client: TestClient, route: str = "/upscale", **params: Any) -> Any:
    return client.post(route, params={**QUICK, "wait": "0", **params}, content=sharp(), headers=PNG)


def ended(client: TestClient, id: str) -> dict[str, Any]:
    while (job := client.get(f"/jobs/{id}").json())["status"] in ("starting", "processing"):
        time.sleep(0.02)
    return job


def test_a_quote_has_the_wait_and_queues_nothing(client: TestClient) -> None:
    quote = post(client, "/quote").json()
    assert quote["seconds"] == quote["promised"] == SECONDS and quote["wait"] == 0
    assert quote["tiles"] == TILES and quote["bytes"] == len(sharp()) and quote["peak_memory_mb"] == {"host": 1}
    assert not client.app.state.service.jobs.waiting  # type: ignore[attr-defined]
    jobs = [post(client).json()["id"] for _ in range(3)]
    later = post(client, "/quote").json()
    assert 2 * SECONDS - 0.1 <= later["wait"] <= 3 * SECONDS
    assert post(client, "/quote", priority="urgent").json()["wait"] <= SECONDS
    assert post(client, "/quote", deadline="0.5").json()["meets_deadline"] is False
    assert post(client, "/quote", deadline="60").json()["meets_deadline"] is True
    assert [ended(client, id)["status"] for id in jobs] == ["succeeded"] * 3


def test_a_deadline_that_cannot_be_met_is_refused_with_the_quote(client: TestClient) -> None:
    first = post(client)
    refused = post(client, deadline="0.5")
    assert refused.status_code == 409
    assert "a deadline of 0.5 s cannot be met: the queue and this image can take 0." in refused.json()["detail"]
    assert refused.json()["quote"]["seconds"] == SECONDS and 0.1 < refused.json()["quote"]["wait"] <= SECONDS
    accepted = post(client, deadline="5")
    assert accepted.status_code == 202
    assert ended(client, accepted.json()["id"])["status"] == ended(client, first.json()["id"])["status"] == "succeeded"
    files = list((client.app.state.service.configuration.data / "inputs").iterdir())  # type: ignore[attr-defined]
    assert not files, "of the refused image"


def test_one_file_of_a_batch_that_cannot_be_in_time_is_refused_alone(client: TestClient) -> None:
    files = [("image", (f"{n}.png", sharp(), "image/png")) for n in range(3)]
    batch = client.post("/batches", params={**QUICK, "deadline": str(2.5 * SECONDS)}, files=files).json()
    assert len(batch["jobs"]) == 2 and "cannot be met" in batch["refused"][0]["error"]
    assert batch["refused"][0]["code"] == "deadline_too_short"


def test_quotes_are_refused_as_images_are(client: TestClient) -> None:
    assert post(client, "/quote", scale_factor="99").status_code == 422
    answer = client.post("/quote", params=QUICK, content=b"not an image", headers=PNG)
    assert answer.status_code == 422
    assert client.get("/quote").status_code == 405
    assert "/quote" in client.get("/openapi.json").json()["paths"]


def test_no_quote_before_the_weights_are_loaded(tmp_path: Path) -> None:
    configuration = Configuration(data=tmp_path)

    def load() -> Any:
        time.sleep(0.5)
        return Echo()

    built = app.build(
        configuration,
        "http://images.test",
        weights.POCKET,
        lambda send: app.local(configuration, load, weights.POCKET, send),
    )
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        answer = post(client, "/quote")
        assert answer.status_code == 503 and answer.json()["detail"] == "the weights are loading"
        assert post(client, deadline="0.01").status_code == 202  # nothing is known against it
