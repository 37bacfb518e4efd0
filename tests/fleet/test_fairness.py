"""Fairness between the API keys of a fleet."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from serving import ANN, BOB

from lab.fleet.callers import IMAGE, PNG
from lab.fleet.servers import Fleet, fleet


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway of two keys and one worker."""
    folder = tmp_path_factory.mktemp("shares")
    keys = f"ann:{ANN},bob:{BOB}"
    with fleet(folder, ECHO_SECONDS="0.3", SEESR_API_KEYS=keys, SEESR_MAX_QUEUE="8") as running:
        yield running


def post(cluster: Fleet, token: str, **query: object) -> httpx.Response:
    params = {"wait": 0, "num_inference_steps": 1, **query}
    headers = {**PNG, "Authorization": f"Bearer {token}"}
    return httpx.post(
        f"{cluster.addresses['gateway']}/upscale", params=params, content=IMAGE, headers=headers, timeout=30
    )


def test_a_key_that_fills_the_queue_delays_another_by_one_image(shared: Fleet) -> None:
    running = post(shared, ANN, num_inference_steps=8).json()["id"]
    shared.until(lambda: shared.redis.hget(f"seesr:job:{running}", "status") == '"processing"', 20)
    ann = [post(shared, ANN) for _ in range(9)]
    assert [answer.status_code for answer in ann] == [202] * 8 + [429]  # alone, it may fill the queue
    bob = [post(shared, BOB) for _ in range(5)]
    assert [answer.status_code for answer in bob] == [202] * 4 + [429]  # half of the queue, although it is full
    assert "retry-after" in bob[-1].headers and post(shared, ANN).status_code == 429
    ids = [answer.json()["id"] for answer in [*ann[:8], *bob[:4]]]
    shared.until(lambda: shared.redis.zcard("seesr:waiting") + shared.redis.zcard("seesr:running") == 0, 60)
    order = [ids.index(id) for id, _ in shared.runs() if id in ids]
    assert order == [8, 0, 9, 1, 10, 2, 11, 3, 4, 5, 6, 7]
