"""One image whose tiles are computed by two workers of a fleet."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import skimage.data
from PIL import Image

from lab.fleet.callers import PNG
from lab.fleet.servers import Fleet, fleet
from seesr import Engine, Settings
from seesr.fleet.tile_exchange import kind_of

QUICK: dict[str, Any] = {"num_inference_steps": 2, "latent_tiled_size": 16, "latent_tiled_overlap": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway and two workers with the pocket bundle that share tiles."""
    folder = tmp_path_factory.mktemp("pair")
    options: dict[str, Any] = {"SEESR_DEVICE": "cpu", "SEESR_SHARE_TILES": "1"}
    with fleet(folder, workers=2, worker="seesr worker", lease=20, **options) as running:
        yield running


def source(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.chelsea()[60 : 60 + side, 100 : 100 + side]).save(buffer, "PNG")
    return buffer.getvalue()


def send(running: Fleet, data: bytes, seed: int) -> str:
    params = {**QUICK, "seed": seed, "wait": 0}
    return httpx.post(
        f"{running.addresses['gateway']}/upscale", content=data, headers=PNG, params=params, timeout=60
    ).json()["id"]


def ended(running: Fleet, id: str) -> dict[str, Any]:
    """The job, once it has ended."""
    job: dict[str, Any] = {}

    def look() -> bool:
        job.update(httpx.get(f"{running.addresses['gateway']}/jobs/{id}", timeout=60).json())
        return job["status"] in ("succeeded", "failed", "canceled")

    running.until(look, 120)
    assert job["status"] == "succeeded", job
    return job


def leased(running: Fleet) -> bool:
    return any(running.redis.scan_iter("seesr:tiles-lease:*"))


@pytest.mark.long
def test_two_workers_give_the_bytes_of_one(pair: Fleet, engine: Engine) -> None:
    data = source(128)
    job = ended(pair, send(pair, data, 1))
    assert 0 < job["metrics"]["tiles_shared"] < 128
    assert httpx.get(job["result"]).content == engine.run(data, Settings(**QUICK, seed=1)).data
    pair.until(lambda: not any(name.startswith("tiles/") for name in pair.stored()), 10)
    assert not list(pair.redis.scan_iter("seesr:tiles*"))


@pytest.mark.long
def test_a_helper_that_is_killed_in_the_middle_of_a_step(pair: Fleet, engine: Engine) -> None:
    data = source(192)
    id = send(pair, data, 2)
    pair.until(lambda: leased(pair), 60)
    jobs = {name: json.loads(pair.redis.hget(f"seesr:worker:{name}@here", "job") or "null") for name in pair.processes
            if name.startswith("worker")}  # fmt: skip
    (helper,) = [name for name, job in jobs.items() if job != id]
    os.kill(pair.child(helper), signal.SIGKILL)
    job = ended(pair, id)
    assert httpx.get(job["result"]).content == engine.run(data, Settings(**QUICK, seed=2)).data
    assert job["metrics"]["tiles_shared"] < 288


def test_workers_of_another_kind_do_not_share() -> None:
    kinds = {kind_of(version, machine) for version in ("1", "2") for machine in ("AVX2, 1 threads", "AVX2, 2 threads")}
    assert len(kinds) == 4
