"""The Redis connection: errors, pauses and the clock."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from redis import exceptions

from seesr.fleet import redis_client
from seesr.fleet.redis_client import MAX_SKEW, PAUSE, TIMEOUT, RedisClient
from seesr.serving.job import Unavailable

AWAY = "redis://127.0.0.1:1/0"


class Clock:
    """In place of the module time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.slept = 1000.0, list[float]()
        clock = SimpleNamespace(monotonic=lambda: self.now, time=lambda: self.now, sleep=self.sleep)
        monkeypatch.setattr(redis_client, "time", clock)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def failing(*errors: Exception | None) -> Any:
    """Work that raises these errors in turn, and then says how often it was called."""
    left, calls = list(errors), list[Any]()

    def work(client: Any) -> int:
        calls.append(client)
        error = left.pop(0) if left else None
        if error is not None:
            raise error
        return len(calls)

    return work


def test_after_a_failure_calls_fail_at_once_for_a_moment(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, client = Clock(monkeypatch), RedisClient(AWAY)
    work = failing(exceptions.TimeoutError("a\nb"))
    with caplog.at_level(logging.WARNING):
        for wait in (0.0, 0.0, PAUSE - 0.1):
            clock.now += wait
            with pytest.raises(Unavailable, match="Redis does not answer"):
                client(work)
    assert "redis: a b" in caplog.text
    clock.now += 0.1
    assert client(work) == 2 and not clock.slept
    assert TIMEOUT + PAUSE < 5, "a gateway says 503 within five seconds"


def test_a_full_redis_is_said_and_asked_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    client, work = RedisClient(AWAY), failing(exceptions.OutOfMemoryError("OOM"))
    with pytest.raises(Unavailable, match=r"memory limit \(maxmemory\)"):
        client(work)
    assert client(work) == 2


def test_a_worker_waits_until_redis_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, client = Clock(monkeypatch), RedisClient(AWAY, retry=True)
    assert client(failing(exceptions.ConnectionError("x"), OSError("x"))) == 3
    assert clock.slept == [PAUSE] * 2


def test_other_errors_are_errors_of_the_program() -> None:
    with pytest.raises(exceptions.ResponseError):
        RedisClient(AWAY, retry=True)(failing(exceptions.ResponseError("wrong type")))


def test_a_wrong_url_is_one_line_without_its_password() -> None:
    with pytest.raises(ValueError, match="SEESR_REDIS is not a valid URL: it must be redis://") as error:
        RedisClient("http://:secret@host")
    assert "secret" not in str(error.value) and error.value.__suppress_context__


@pytest.mark.parametrize(
    ("offset", "message"),
    [(MAX_SKEW - 0.1, None), (0.1 - MAX_SKEW, None), (MAX_SKEW + 0.6, "is 11 s ahead of that of Redis"),
     (-MAX_SKEW - 0.6, "is 11 s behind that of Redis")],
)  # fmt: skip
def test_a_clock_may_be_off_by_ten_seconds(offset: float, message: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, client = Clock(monkeypatch), RedisClient(AWAY)
    clock.now = 1000.5 + offset
    client.client = SimpleNamespace(time=lambda: (1000, 500_000))
    if message is None:
        client.check_at_start()
    else:
        with pytest.raises(ValueError, match=message):
            client.check_at_start()


def test_a_redis_that_is_away_at_the_start_is_one_line() -> None:
    with pytest.raises(ValueError, match="SEESR_REDIS: the queue is unavailable"):
        RedisClient(AWAY).check_at_start()


def test_answers_are_text_and_calls_are_timed(redis: RedisClient) -> None:
    redis(lambda client: client.set("a", "b"))
    assert redis(lambda client: client.get("a")) == "b"
    (count,) = [s.value for metric in redis.seconds.collect() for s in metric.samples if s.name.endswith("_count")]
    assert count == 2
    options = redis.client.connection_pool.connection_kwargs
    assert options["socket_timeout"] == options["socket_connect_timeout"] == TIMEOUT
    assert 0 < options["health_check_interval"] < 60
