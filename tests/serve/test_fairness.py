"""Fairness between the API keys of one server."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from echo_server import PNG, QUICK
from serving import ANN, BOB, sharp
from starlette.testclient import TestClient

from lab.serve.echo import Echo
from seesr.config import Configuration
from seesr.networks import weights
from seesr.runtime.owner import current_owner
from seesr.serving import app
from seesr.serving.fairness import Turns, has_room
from seesr.serving.job import LATER, NORMAL, URGENT, Job


def owners(**counts: int) -> list[str]:
    return [owner for owner, count in counts.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("waiting", "room"),
    [
        ({}, True), ({"ann": 9}, True), ({"ann": 10}, False),  # alone, an owner may fill the queue
        ({"ann": 4, "bob": 1}, True), ({"ann": 5, "bob": 1}, False),  # with others it has half
        ({"bob": 10}, True), ({"ann": 4, "bob": 10}, True), ({"ann": 5, "bob": 10}, False),  # a full queue of another's
        ({"ann": 0, "bob": 5, "eve": 5}, False), ({"ann": 2, "bob": 4, "eve": 3}, True),
    ],
)  # fmt: skip
def test_the_share_of_a_key(waiting: dict[str, int], room: bool) -> None:
    assert has_room("ann", owners(**waiting), 10, 0.5) is room


def test_the_smallest_queue_takes_a_job_of_each() -> None:
    assert has_room("ann", [], 1, 0.5) and not has_room("ann", owners(ann=1), 1, 0.5)
    assert has_room("bob", owners(ann=2), 3, 0.1)  # the smallest share is one job
    assert not has_room("bob", owners(ann=1, bob=1), 4, 0.1)


def test_keys_take_turns_within_a_priority() -> None:
    waiting = [Job("ann", {}, created=number) for number in range(4)] + [Job("bob", {}, created=10 + n) for n in (0, 1)]
    waiting += [Job("bob", {}, priority=LATER, created=0), Job("ann", {}, priority=URGENT, created=20)]
    turns, order = Turns(), []
    expected = [(job.priority, job.owner, job.created) for job in turns.order(waiting)]
    while waiting:
        job = turns.next(waiting)
        waiting.remove(job)
        order.append((job.priority, job.owner, job.created))
    assert order == [
        (URGENT, "ann", 20), (NORMAL, "bob", 10), (NORMAL, "ann", 0), (NORMAL, "bob", 11), (NORMAL, "ann", 1),
        (NORMAL, "ann", 2), (NORMAL, "ann", 3), (LATER, "bob", 0),
    ]  # fmt: skip
    assert expected == order


def test_the_order_counts_a_turn_that_was_just_taken() -> None:
    turns = Turns()
    turns.next([Job("bob", {}, created=0)])
    waiting = [Job("ann", {}, created=1), Job("bob", {}, created=2), Job("ann", {}, priority=URGENT, created=3)]
    expected = [job.created for job in turns.order(waiting)]
    order = []
    while waiting:
        order.append(turns.next(waiting))
        waiting.remove(order[-1])
    assert [job.created for job in order] == expected == [3, 2, 1]


class Held(Echo):
    """An engine whose first image waits until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go, self.names, self.owners = threading.Event(), [], []  # type: ignore[var-annotated]

    def run(self, data: Path, *more: Any) -> Any:
        assert self.go.wait(20)
        self.names.append(data.name)
        self.owners.append(current_owner.get())
        return super().run(data, *more)


def test_a_key_that_fills_the_queue_delays_another_by_one_image(tmp_path: Path) -> None:
    engine = Held()
    configuration = Configuration(data=tmp_path, max_queue=6, api_keys=f"ann:{ANN},bob:{BOB}")  # type: ignore[arg-type]
    built = app.build(
        configuration,
        "http://images.test",
        weights.POCKET,
        lambda send: app.local(configuration, lambda: engine, weights.POCKET, send),  # type: ignore[arg-type, return-value]
    )

    def post(token: str) -> Any:
        headers = {**PNG, "Authorization": f"Bearer {token}"}
        return client.post("/upscale", params={**QUICK, "wait": "0"}, content=sharp(), headers=headers)

    with TestClient(built) as client:
        while post(ANN).status_code == 202:  # one runs, six wait
            pass
        bob = [post(BOB) for _ in range(4)]
        assert [answer.status_code for answer in bob] == [202, 202, 202, 429]
        assert "retry-after" in bob[-1].headers
        ids = [answer.json()["id"] for answer in bob[:3]]
        reading = {"Authorization": f"Bearer {BOB}"}
        assert [client.get(f"/jobs/{id}", headers=reading).json()["ahead"] for id in ids] == [1, 3, 5]
        engine.go.set()
        jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
        while jobs.waiting or jobs.running:
            pass
    assert [engine.names.index(id) for id in ids] == [1, 3, 5]
    assert engine.owners[:6] == ["ann", "bob", "ann", "bob", "ann", "bob"]  # whose cached stages each job may use
