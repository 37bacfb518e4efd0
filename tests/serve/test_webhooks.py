"""Which addresses webhooks go to, and in which order and how often they are tried."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seesr.serving import webhooks
from seesr.serving.job import DONE, Job
from seesr.serving.refusal import Refused
from seesr.serving.sqlite_store import SqliteStore
from seesr.serving.webhooks import LANES, TRIES, WebhookQueue, check_target, signed

sleep = asyncio.sleep  # also where a test replaces it


@pytest.mark.parametrize(
    ("url", "local", "good"),
    [
        ("https://a.test/", False, True), ("https://a.test:443/x", False, True), ("https://a.test:0/", False, False),
        ("https:///x", False, False), (b"https://a.test/", False, False), ("http://localhost:5/", False, False),
        ("https://a.test/" + "x" * (4096 - 15), False, True), ("https://a.test/" + "x" * (4096 - 14), False, False),
        ("http://localhost:5/", True, True), ("http://127.0.0.1/", True, True), ("http://a.test/", True, False),
        ("https://a.test/", True, True), ("ftp://localhost/", True, False), (None, True, False),
    ],
)  # fmt: skip
def test_the_addresses_of_webhooks(url: Any, local: bool, good: bool) -> None:
    if good:
        check_target(url, local)
        return
    with pytest.raises(Refused, match="of this machine" if local else "an https URL$") as error:
        check_target(url, local)
    assert (error.value.code, error.value.field) == ("invalid_input", "webhook")


def test_the_signature_covers_id_time_and_body() -> None:
    """The example of https://github.com/standard-webhooks: whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw."""
    import base64

    secret = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", b'{"test": 2432232314}', 1614265330.9)
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@pytest.mark.parametrize(
    ("url", "address", "target", "host"),
    [
        ("https://u:p@a.test/x?y=1", "8.8.8.8", "https://8.8.8.8:443/x?y=1", "a.test"),
        ("https://a.test:8443/", "2606:4700::1", "https://[2606:4700::1]:8443/", "a.test:8443"),
        ("http://a.test/", "8.8.8.8", "http://8.8.8.8:80/", "a.test"),
    ],
)
@pytest.mark.parametrize("status", [200, 204, 301, 500])
def test_the_address_that_was_checked_is_the_one_that_is_called(
    url: str, address: str, target: str, host: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    class Client:
        def __init__(self, timeout: float, trust_env: bool) -> None:
            assert trust_env is False and 1 <= timeout < webhooks.SECONDS, "no proxy of the environment"

        async def __aenter__(self) -> Client:
            return self

        async def __aexit__(self, *values: Any) -> None: ...

        async def post(self, target: str, content: bytes, headers: dict[str, str], extensions: Any) -> Any:
            sent.append((target, headers["Host"], extensions["sni_hostname"], content))
            return SimpleNamespace(is_success=status < 300, status_code=status)

    async def public(host: str, port: int) -> str:
        return address

    monkeypatch.setattr(webhooks.httpx, "AsyncClient", Client)
    monkeypatch.setattr(webhooks, "public_address", public)
    assert asyncio.run(webhooks.send_once(b"s", url, "id", {"a": 1})) is (status < 300)
    assert sent == [(target, host, "a.test", b'{"a": 1}')]


def test_a_message_is_tried_with_longer_and_longer_pauses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pauses, tries = list[float](), list[str]()

    async def pause(seconds: float) -> None:
        pauses.append(seconds)

    async def never(job: Job, event: str) -> bool:
        tries.append(event)
        return False

    async def third(job: Job, event: str) -> bool:
        tries.append(event)
        if len(tries) == 2:
            raise LookupError("an error of ours")
        return len(tries) == 3

    monkeypatch.setattr(webhooks.asyncio, "sleep", pause)
    assert not asyncio.run(webhooks.send(never, Job("ann", {}), "completed"))
    assert pauses == [1.0, 2.0, 4.0, 8.0] and len(tries) == TRIES == 5
    assert f"dropped after {TRIES} tries" in caplog.text
    tries.clear()
    pauses.clear()
    assert asyncio.run(webhooks.send(third, Job("ann", {}), "completed"))
    assert len(tries) == 3 and pauses == [1.0, 2.0] and "an error of ours" in caplog.text


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path)
    yield store
    store.close()


def run(queue: WebhookQueue, done: Any) -> None:
    async def work() -> None:
        task = asyncio.ensure_future(queue.run())
        end = time.monotonic() + 5
        while not done() and not task.done() and time.monotonic() < end:
            await sleep(0.005)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task

    asyncio.run(work())
    assert done()


def kept(store: SqliteStore, number: int, *events: str) -> Job:
    job = Job("ann", {}, webhook=f"https://{number}.test/", status=DONE)
    store.keep(job, *(events or ("completed",)))
    return job


def test_a_kept_message_is_tried_as_often_and_then_dropped(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, pauses, events = time.time(), list[float](), list[str]()
    offset = [0.0]

    async def pause(seconds: float) -> None:
        if seconds == webhooks.POLL:
            await sleep(0)
            return
        pauses.append(seconds)
        offset[0] += seconds

    async def refuse(job: Job, event: str) -> bool:
        events.append(event)
        return event == "completed"

    monkeypatch.setattr(webhooks, "time", SimpleNamespace(time=lambda: now + offset[0], monotonic=time.monotonic))
    monkeypatch.setattr(webhooks.asyncio, "sleep", pause)
    kept(store, 1, "output", "completed")
    store.run("UPDATE webhooks SET due = ?", now)
    run(WebhookQueue(store, refuse), lambda: not store.receivers())
    assert events == ["output"] * TRIES + ["completed"], "the next one waits for it"
    assert [seconds for seconds in pauses if seconds] == pytest.approx([1.0, 2.0, 4.0, 8.0], abs=0.01)
    assert f"dropped after {TRIES} tries" in caplog.text


def test_receivers_are_sent_to_at_the_same_time_up_to_a_number(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "LANES", 3)
    monkeypatch.setattr(webhooks, "POLL", 0.005)
    running, most, got = [0], [0], list[str]()

    async def take(job: Job, event: str) -> bool:
        running[0] += 1
        most[0] = max(most[0], running[0])
        await sleep(0.05)
        running[0] -= 1
        got.append(job.id)
        return True

    ids = [kept(store, number).id for number in range(7)]
    run(WebhookQueue(store, take), lambda: len(got) == 7)
    assert most[0] == 3 < LANES and sorted(got) == sorted(ids)


def test_the_end_of_a_server_waits_for_what_was_not_tried(store: SqliteStore) -> None:
    async def take(job: Job, event: str) -> bool:
        return True

    queue = WebhookQueue(store, take)
    started = time.monotonic()
    asyncio.run(queue.drained(5))
    assert time.monotonic() - started < 2, "nothing waits"
    kept(store, 1)
    started = time.monotonic()
    asyncio.run(queue.drained(0.2))
    assert 0.19 < time.monotonic() - started < 2
    store.delay_webhook(1, time.time() + 99)
    started = time.monotonic()
    asyncio.run(queue.drained(5))
    assert time.monotonic() - started < 2, "a message that was tried is left to the next server"


def test_a_receiver_that_does_not_answer_ends_the_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def hang(host: str, port: int) -> str:
        return "8.8.8.8"

    class Client:
        def __init__(self, **values: Any) -> None: ...

        async def __aenter__(self) -> Client:
            await sleep(60)
            return self

        async def __aexit__(self, *values: Any) -> None: ...

    monkeypatch.setattr(webhooks, "SECONDS", 0.02)
    monkeypatch.setattr(webhooks, "public_address", hang)
    monkeypatch.setattr(webhooks.httpx, "AsyncClient", Client)
    with caplog.at_level(logging.WARNING):
        assert not asyncio.run(webhooks.send_once(b"s", "https://a.test/", "id", {}))
    assert "was not accepted: TimeoutError" in caplog.text
