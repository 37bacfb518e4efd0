"""`seesr fleet`: what each command sends to a worker, and what it waits for. Workers are entries in a real Redis."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from seesr.config import Configuration
from seesr.fleet import control
from seesr.fleet.broker import LANES, queues_of
from seesr.fleet.job_store import RUNNING, WAITING
from seesr.fleet.redis_client import RedisClient

VERSION = "d" * 64


class Remote:
    """Stands for Celery's remote control, and writes down what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, Any]] = []

    def cancel_consumer(self, queue: str, destination: list[str], reply: bool, timeout: float) -> None:
        assert reply and timeout >= 1, "it waits until the worker has done it"
        self.sent.append((f"cancel {queue}", destination))

    def add_consumer(self, queue: str, destination: list[str], reply: bool, timeout: float) -> None:
        assert reply and timeout >= 1
        self.sent.append((f"add {queue}", destination))

    def shutdown(self, destination: list[str]) -> None:
        self.sent.append(("shutdown", destination))


class Clock:
    """In place of the module time: each sleep lets the worker do its next step."""

    def __init__(self) -> None:
        self.slept: list[float] = []
        self.steps: list[Callable[[], Any]] = []

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept.append(seconds)
        if self.steps:
            self.steps.pop(0)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(control, "time", clock)
    return clock


@pytest.fixture
def fleet(configuration: Configuration, clock: Clock) -> control.Fleet:
    """A fleet of one worker that is busy."""
    fleet = control.Fleet(configuration)
    fleet.app.close()
    fleet.app = type("App", (), {"control": Remote()})()  # type: ignore[assignment]
    fleet.registry.update("w@here", state="busy", version=VERSION)
    return fleet


def sent(fleet: control.Fleet) -> list[tuple[str, Any]]:
    return fleet.app.control.sent  # type: ignore[attr-defined]


def orders(fleet: control.Fleet) -> list[str]:
    return fleet.redis.client.lrange("seesr:orders:w@here", 0, -1)


def canceled() -> list[tuple[str, Any]]:
    return [(f"cancel {queue}", ["w@here"]) for queue in queues_of(VERSION)]


def added() -> list[tuple[str, Any]]:
    return [(f"add {queue}", ["w@here"]) for queue in queues_of(VERSION)]


@pytest.mark.parametrize("state", ["idle", "unloaded"])
def test_a_drained_worker_takes_nothing_and_has_ended_its_job(fleet: control.Fleet, clock: Clock, state: str) -> None:
    """It waits once more: a job that was just taken may not have begun."""

    def update(value: str) -> Callable[[], None]:
        return lambda: fleet.registry.update("w@here", state=value)

    clock.steps = [update("busy"), update(state), update("busy"), update(state)]
    fleet.drain("w@here")
    assert sent(fleet) == canceled() and len(canceled()) == LANES
    assert len(clock.slept) == 4 and max(clock.slept) == clock.slept[2] >= 0.5


def test_a_worker_takes_jobs_again(fleet: control.Fleet) -> None:
    fleet.resume("w@here")
    assert sent(fleet) == added()


def test_an_unloaded_worker_was_drained_before(fleet: control.Fleet, clock: Clock) -> None:
    fleet.registry.update("w@here", state="idle")
    clock.steps = [lambda: None, lambda: fleet.registry.update("w@here", state="unloaded")]
    fleet.unload("w@here")
    assert sent(fleet) == canceled() and orders(fleet) == ["unload"] and not clock.steps


@pytest.mark.parametrize("before", ["unloaded", "failed", "idle"])
def test_a_loaded_worker_takes_jobs_again(fleet: control.Fleet, clock: Clock, before: str) -> None:
    fleet.registry.update("w@here", state=before)
    states: list[str] = []

    def load() -> None:
        states.append(fleet.worker("w@here")["state"])
        fleet.registry.update("w@here", state="idle")

    clock.steps = [load]
    fleet.load("w@here")
    assert states == ["loading"] and orders(fleet) == ["load"] and sent(fleet) == added()


def test_a_worker_that_cannot_load_takes_no_jobs_and_says_why(fleet: control.Fleet, clock: Clock) -> None:
    clock.steps = [lambda: fleet.registry.update("w@here", state="failed", error="no memory")]
    with pytest.raises(ValueError, match="w@here cannot load the weights: no memory; see its log"):
        fleet.load("w@here")
    assert not sent(fleet)


def test_a_worker_is_restarted_after_its_job(fleet: control.Fleet, clock: Clock) -> None:
    clock.steps = [lambda: fleet.registry.update("w@here", state="idle")]
    fleet.restart("w@here")
    assert sent(fleet) == [*canceled(), ("shutdown", ["w@here"])]


def test_a_worker_that_is_not_there_is_named_with_those_that_are(fleet: control.Fleet) -> None:
    with pytest.raises(ValueError, match="there is no worker 'x'; alive: w@here"):
        fleet.worker("x")
    fleet.registry.leave("w@here")
    with pytest.raises(ValueError, match="there is no worker 'x'; alive: none"):
        fleet.worker("x")


def test_the_commands(
    fleet: control.Fleet, configuration: Configuration, redis: RedisClient, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A command is for the worker that is named, or for all."""
    monkeypatch.setattr(control, "Fleet", lambda configuration: fleet)
    fleet.registry.update("v@here", state="idle", version=VERSION)
    redis.client.zadd(WAITING, {"a": 1, "b": 2})
    redis.client.zadd(RUNNING, {"c": 1})
    assert control.command(configuration, "status", None) == 0
    output = capsys.readouterr().out
    shown = json.loads(output)
    assert (shown["waiting"], shown["running"]) == (2, 1) and list(shown["workers"]) == ["v@here", "w@here"]
    assert shown["workers"]["w@here"] == {"state": "busy", "version": VERSION}
    assert output.startswith('{\n "waiting"'), "indented, for people"
    for worker, targets in (("w@here", ["w@here"]), (None, ["v@here", "w@here"])):
        sent(fleet).clear()
        assert control.command(configuration, "resume", worker) == 0
        assert [target for _, target in sent(fleet)] == [[target] for target in targets for _ in range(LANES)]
        assert capsys.readouterr().err == "".join(f"{target}: resume done\n" for target in targets)


def test_the_queues_are_those_of_the_default_bundle(configuration: Configuration, fleet: control.Fleet) -> None:
    from seesr.serving.identity import version_of

    own = control.Fleet(configuration)
    assert configuration.weights
    assert own.app.conf.task_default_queue == queues_of(version_of(configuration.weights))[0]
    assert own.app.conf.task_publish_retry is False, "a command does not wait for a Redis that is away"
    own.app.close()
