"""How the server is built, started and stopped, without running it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from serving import ANN
from starlette.testclient import TestClient

from lab.serve.echo import Echo
from seesr.config import Configuration
from seesr.networks import weights
from seesr.serving import app
from seesr.serving.job import Job
from seesr.serving.keys import Key, Keys, digest, read_tokens, today
from seesr.serving.local import FAILURE

KEYS = SecretStr(f"ann:{ANN}")


class Runs:
    """What `serve` does when a real server would begin."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.servers: list[app.Server] = []
        self.reason: str | None = None
        self.bound: list[tuple[str, int]] = []

        def run(server: app.Server, sockets: list[socket.socket]) -> None:
            self.servers.append(server)
            self.bound.append(sockets[0].getsockname()[:2])
            sockets[0].close()
            monkeypatch.setattr(server.jobs, "ready", lambda: self.reason)

        monkeypatch.setattr(app.Server, "run", run)
        monkeypatch.setattr(app, "make_private", lambda folder: folder.mkdir(parents=True, exist_ok=True))


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    runs = Runs(monkeypatch)
    yield runs
    for server in runs.servers:
        server.app.state.service.store.close()


def serve(configuration: Configuration, host: str = "127.0.0.1", port: int = 0, **values: Any) -> int:
    return app.serve(configuration, host, port, weights.POCKET, None, **values)


@pytest.mark.parametrize(("reason", "code"), [(None, 0), ("the device has failed", 0), (f"{FAILURE}: no weights", 3)])
def test_a_server_tells_its_address_and_ends_with_a_code(
    reason: str | None, code: int, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.reason = reason
    assert serve(Configuration(data=tmp_path / "data", shutdown=7.5)) == code
    (server,) = runs.servers
    (address,) = runs.bound
    assert address[1] > 0 and capsys.readouterr().out == f"seesr at http://127.0.0.1:{address[1]}/\n"
    options = server.config
    assert options.timeout_graceful_shutdown == 7 and server.limit == 7.5 and options.ws == "none"
    assert not options.access_log and not options.server_header and not options.date_header
    assert options.log_config is None, "logs.py configures the logs"


def test_a_short_shutdown_still_waits_a_second(runs: Runs, tmp_path: Path) -> None:
    serve(Configuration(data=tmp_path / "data", shutdown=0.1))
    assert runs.servers[0].config.timeout_graceful_shutdown == 1


@pytest.mark.parametrize(
    ("host", "values", "message"),
    [
        ("0.0.0.0", {}, "--host 0.0.0.0 can be reached from outside: set SEESR_API_KEYS"),
        ("0.0.0.0", {"api_keys": KEYS, "local_webhooks": True}, "SEESR_LOCAL_WEBHOOKS is for a server on this machine"),
        ("127.0.0.1", {"api_keys": SecretStr("ann:short")}, "shorter than 16 characters"),
        ("203.0.113.7", {"api_keys": KEYS}, "--port 0 cannot be used: "),
    ],
)
def test_what_does_not_start(host: str, values: dict[str, Any], message: str, runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        serve(Configuration(data=tmp_path / "data", **values), host)
    assert not runs.servers


@pytest.mark.parametrize(
    ("host", "values"),
    [("0.0.0.0", {"api_keys": KEYS}), ("0.0.0.0", {"platform": "sagemaker"}), ("127.0.0.1", {"local_webhooks": True}),
     ("localhost", {})],
)  # fmt: skip
def test_what_starts(
    host: str, values: dict[str, Any], runs: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert serve(Configuration(data=tmp_path / "data", **values), host) == 0
    warned = "every user of this machine can use the server" in caplog.text
    assert warned is (not values or "local_webhooks" in values)


def test_a_port_in_use_is_one_line(runs: Runs, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port} cannot be used: Address already in use"):
            serve(Configuration(data=tmp_path / "data"), port=port)


def test_a_gateway_is_made_of_the_parts_of_its_fleet(runs: Runs, tmp_path: Path) -> None:
    made: list[Any] = []

    def fleet(configuration: Configuration, bundle: Path, send: Any) -> app.Parts:
        made.append(bundle)
        return app.local(configuration, Echo, bundle, send)  # type: ignore[arg-type]

    serve(Configuration(data=tmp_path / "data", api_keys=KEYS), fleet=fleet)
    assert made == [weights.POCKET]


def test_an_engine_that_cannot_load_ends_a_server_that_was_never_ready(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def load_engine(bundle: Path, device: str | None, rates: Path) -> Any:
        loaded.append((bundle, device, rates))
        raise OSError("no weights")

    monkeypatch.setattr(app, "load_engine", load_engine)
    serve(Configuration(data=tmp_path / "data", api_keys=KEYS))
    (server,) = runs.servers
    jobs: Any = server.jobs
    for ready, ends in ((True, False), (False, True)):
        server.should_exit, jobs.loaded = False, ready
        with pytest.raises(OSError, match="no weights"):
            jobs.engines.loads[jobs.version]()
        assert server.should_exit is ends
    assert loaded[0] == (weights.POCKET, None, tmp_path / "data" / "rates")


def test_the_first_signal_ends_in_order_and_a_second_interrupt_at_once() -> None:
    stopped: list[int] = []
    server: Any = object.__new__(app.Server)
    server.should_exit, server.force_exit, server.limit = False, False, 5.0
    server.app, server.jobs = SimpleNamespace(state=SimpleNamespace()), SimpleNamespace(stop=lambda: stopped.append(1))
    server.handle_exit(signal.SIGINT, None)
    first = server.app.state.stop_by
    assert server.should_exit and not server.force_exit and first == pytest.approx(time.monotonic() + 5, abs=1)
    server.handle_exit(signal.SIGTERM, None)
    assert not server.force_exit and server.app.state.stop_by == first, "the limit counts from the first"
    server.handle_exit(signal.SIGINT, None)
    assert server.force_exit and len(stopped) == 3


@pytest.mark.parametrize(("hours", "pause"), [(24.0, 60.0), (0.01, 18.0), (1e-6, 1.0)])
def test_expired_files_are_looked_for_every_minute_or_more_often(
    hours: float, pause: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, ages = list[float](), list[float]()
    configuration = Configuration(data=tmp_path, keep=hours)
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real(60)

    built = app.build(
        configuration, "http://x", weights.POCKET, lambda send: app.local(configuration, Echo, weights.POCKET, send)  # type: ignore[arg-type]
    )  # fmt: skip
    store = built.state.service.store
    monkeypatch.setattr(store, "expire", ages.append)
    monkeypatch.setattr(app, "asyncio", SimpleNamespace(
        sleep=sleep, to_thread=asyncio.to_thread, ensure_future=asyncio.ensure_future, wait=asyncio.wait))  # fmt: skip
    with TestClient(built):
        end = time.monotonic() + 10
        while not pauses:
            assert time.monotonic() < end
            time.sleep(0.01)
    assert pauses == [pause] and ages == [hours * 3600]


def test_the_end_of_a_server_has_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = Configuration(data=tmp_path)
    for stop_by, least, most in ((None, None, None), (time.monotonic() + 50, 40, 50), (time.monotonic() - 9, 0.0, 0.0)):
        built = app.build(
            configuration, "http://x", weights.POCKET,
            lambda send: app.local(configuration, Echo, weights.POCKET, send),  # type: ignore[arg-type]
        )  # fmt: skip
        jobs, closed = built.state.service.jobs, list[float | None]()
        real = jobs.close

        def close(seconds: float | None, real: Any = real, closed: list[float | None] = closed) -> None:
            closed.append(seconds)
            real(seconds)

        monkeypatch.setattr(jobs, "close", close)
        with TestClient(built):
            if stop_by is not None:
                built.state.stop_by = stop_by
        assert built.state.service.supervisor.stopping.is_set()
        (seconds,) = closed
        if least is None or seconds is None:
            assert seconds is least
        else:
            assert least <= seconds <= most


def test_a_webhook_has_the_prediction_and_a_new_id_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    async def send_once(*values: Any) -> bool:
        sent.append(values)
        return True

    monkeypatch.setattr(app.webhooks, "send_once", send_once)
    monkeypatch.setattr(app.replicate, "prediction", lambda service, base, job, whole: {"base": base, "whole": whole})
    sender = app.WebhookSender()
    sender.base = "http://here"
    sender.service = SimpleNamespace(  # type: ignore[assignment]
        webhook_secret=lambda owner: owner.encode(), configuration=SimpleNamespace(local_webhooks=True)
    )
    job = Job("ann", {}, id="a", revision=7, webhook="https://a.test/")
    assert asyncio.run(sender(job, "completed"))
    assert sent == [(b"ann", "https://a.test/", "a-7-completed", {"base": "http://here", "whole": False}, True)]


def test_keys_of_a_list_and_their_validity() -> None:
    tokens = read_tokens(f" ann:{'a' * 16} ,, {'b' * 16},x:y:{'c' * 16}")
    assert [key.name for key in tokens] == ["ann", "key2", "x:y"] and tokens[1].sha256 == digest("b" * 16)
    with pytest.raises(ValueError, match="key 2 of SEESR_API_KEYS is shorter than 16 characters"):
        read_tokens(f"{'a' * 16},{'b' * 15}")
    assert tokens[0].id == tokens[0].sha256[:8] and tokens[0].valid
    assert not Key(name="a", sha256="", expires=today()).valid
    assert not Keys(Configuration()) and Keys(Configuration(api_keys=KEYS))
    known = Keys(Configuration(api_keys=KEYS))
    assert known.find(ANN) and known.find(ANN[:-1]) is None and known.path is None
