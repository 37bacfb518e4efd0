"""The private parts of kombu and Celery that seesr/fleet/transport.py uses exist and behave as expected."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from celery import Celery
from celery.worker import state
from celery.worker.request import Request
from kombu import Queue
from kombu.transport import redis
from redis.exceptions import ReadOnlyError

from lab.report import ROOT
from seesr.config import Configuration
from seesr.fleet import transport
from seesr.fleet.broker import PRIORITIES, TASK, application, queue_of, queues_of
from seesr.fleet.redis_client import RedisClient
from seesr.serving.job import LATER, NORMAL, URGENT

VERSION = "c" * 64


@pytest.fixture
def app(configuration: Configuration) -> Iterator[Celery]:
    RedisClient(configuration.redis or "").client.flushall()
    with application(configuration, [VERSION], publishes=True) as publisher:
        yield publisher


@pytest.fixture
def client(configuration: Configuration) -> Any:
    return RedisClient(configuration.redis or "").client


def test_the_read_that_is_overridden_is_the_one_that_kombu_calls() -> None:
    assert str(inspect.signature(redis.Channel._brpop_read)) == "(self, **options)"
    assert redis.Transport.Channel is redis.Channel and transport.Transport.Channel is transport.Channel
    assert ReadOnlyError in transport.Transport.connection_errors
    assert set(redis.Transport.connection_errors) < set(transport.Transport.connection_errors)


def test_messages_wait_under_the_names_and_with_the_ids_that_maintenance_reads(app: Celery, client: Any) -> None:
    for number, (lane, priority) in enumerate([(0, URGENT), (3, NORMAL), (3, LATER), (15, NORMAL)]):
        app.send_task(TASK, [f"job{number}"], task_id=f"job{number}", priority=priority, queue=queue_of(VERSION, lane))
        (message,) = client.lrange(transport.list_of(queue_of(VERSION, lane), priority), 0, -1)
        assert transport.job_of(message) == f"job{number}"
    assert transport.broker_jobs(client, queues_of(VERSION), PRIORITIES) == {f"job{number}" for number in range(4)}


def test_unacknowledged_messages_are_where_lease_and_maintenance_read(app: Celery, client: Any) -> None:
    queue = queue_of(VERSION, 0)
    app.send_task(TASK, ["job"], task_id="job", queue=queue)
    with app.connection_for_read() as connection:
        message = connection.default_channel.basic_get(queue)
        assert client.zrange(transport.UNACKED_INDEX, 0, -1) == [message.delivery_tag]
        assert transport.broker_jobs(client, queues_of(VERSION), PRIORITIES) == {"job"}
        message.ack()
    assert transport.broker_jobs(client, queues_of(VERSION), PRIORITIES) == set()


def test_the_requests_of_a_worker_have_delivery_tags() -> None:
    assert hasattr(state, "reserved_requests") and hasattr(state, "active_requests")
    assert isinstance(inspect.getattr_static(Request, "message"), property)
    assert transport.taken_tags() == []


@pytest.mark.parametrize("message", ["no JSON", "{}", "[]", "3", '{"headers": []}', '["x"]'])
def test_a_foreign_message_has_no_job_id(message: str) -> None:
    assert transport.job_of(message) is None


def test_keys_take_turns_and_an_urgent_job_is_first(app: Celery) -> None:
    """The order in which kombu's round robin gives messages to one worker."""
    sent = [(0, NORMAL)] * 4 + [(1, NORMAL)] * 2 + [(2, LATER), (0, URGENT), (2, NORMAL)]
    for number, (lane, priority) in enumerate(sent):
        app.send_task(TASK, [], task_id=f"{lane} {number}", priority=priority, queue=queue_of(VERSION, lane))
    order: list[str] = []

    def take(body: Any, message: Any) -> None:
        order.append(message.headers["id"])
        message.ack()

    with app.connection_for_read() as connection:
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        queues = [Queue(name) for name in queues_of(VERSION)]
        with app.amqp.Consumer(channel, queues=queues, callbacks=[take], accept=["json"]):
            while len(order) < len(sent):
                connection.drain_events(timeout=5)
    assert order == ["0 7", "1 4", "2 8", "0 0", "1 5", "0 1", "0 2", "0 3", "2 6"]


def test_only_transport_uses_private_attributes_of_kombu() -> None:
    private = ("unacked", "reserved_requests", "_brpop", "celery.worker", "kombu.transport", "x06")
    for path in (ROOT / "seesr" / "fleet").glob("*.py"):
        lines = [line for line in path.read_text().splitlines() if any(word in line for word in private)]
        allowed = ("celery.worker.consumer.tasks:Tasks", "unacked_key", "unacked_index_key", "unacked_restore")
        others = [line for line in lines if not any(word in line for word in allowed)]
        assert path.name == "transport.py" or not others, (path.name, others)


def test_a_job_is_published_in_the_lane_of_its_owner(configuration: Configuration, tmp_path: Path) -> None:
    from fleet.test_recovery import sent  # type: ignore[import-not-found]

    from seesr.fleet.file_store import FileStore
    from seesr.fleet.jobs import FleetJobs
    from seesr.object_store import Store

    redis = RedisClient(configuration.redis or "")
    redis.client.flushall()
    jobs = FleetJobs(configuration, redis, FileStore(Store.configured(), tmp_path / "fetched"), VERSION)
    assert [jobs.records.lane(owner) for owner in ("ann", "bob", "ann", "eve")] == [0, 1, 0, 2]
    assert [jobs.records.lane(f"owner{number}") for number in range(20)][12:15] == [15, 0, 1]
    job = sent(jobs, tmp_path)
    (message,) = redis.client.lrange(transport.list_of(queue_of(VERSION, 0), NORMAL), 0, -1)
    assert json.loads(message)["headers"]["id"] == job.id
    jobs.close()


@pytest.mark.parametrize("error", [ValueError("no JSON"), KeyError("body"), TypeError("x"), AttributeError("x")])
def test_a_malformed_message_is_dropped_with_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read(channel: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(redis.Channel, "_brpop_read", read)
    with pytest.raises(Empty):
        object.__new__(transport.Channel)._brpop_read()
    assert f"malformed queue message dropped: {type(error).__name__}" in caplog.text
    monkeypatch.setattr(redis.Channel, "_brpop_read", lambda channel, **options: options["timeout"])
    assert object.__new__(transport.Channel)._brpop_read(timeout=5) == 5


def test_the_tags_of_taken_messages_are_those_of_reserved_and_running_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    first, second = (SimpleNamespace(message=SimpleNamespace(delivery_tag=tag)) for tag in "ab")
    hashable = [type("Request", (), {"message": request.message})() for request in (first, second)]
    monkeypatch.setattr(state, "reserved_requests", set(hashable))
    monkeypatch.setattr(state, "active_requests", set(hashable[:1]))
    assert sorted(transport.taken_tags()) == ["a", "b"]


def test_the_most_urgent_priority_has_the_list_of_the_queue() -> None:
    assert transport.list_of("q", 0) == "q" and transport.list_of("q", 9) == f"q{transport.SEPARATOR}9"
