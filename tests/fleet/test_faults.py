"""A gateway and a worker while Redis or the store hangs, refuses writes or restarts."""

from __future__ import annotations

import contextlib
import signal
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from lab.fleet.callers import IMAGE, PNG
from lab.fleet.servers import Fleet, fleet, free_port
from seesr.fleet.file_store import MAX_CALLS, CallLimit
from seesr.serving.job import Unavailable

CALLERS = 6


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A gateway without a worker."""
    with fleet(tmp_path_factory.mktemp("gateway"), workers=0) as running:
        yield running


@contextlib.contextmanager
def silent_server() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1000)
        yield listener.getsockname()[1]


@contextlib.contextmanager
def stopped(process: int) -> Iterator[None]:
    import os

    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


def time_of_live(address: str, call: Callable[[httpx.Client], object], seconds: float) -> float:
    """Seconds that /live took at the median while callers call; a busy test machine delays single ones."""
    ended = threading.Event()

    def work() -> None:
        with httpx.Client(base_url=address, timeout=60) as client:
            while not ended.is_set():
                with contextlib.suppress(httpx.HTTPError):
                    call(client)
                time.sleep(0.05)

    took, begun = [], time.monotonic()
    with ThreadPoolExecutor(CALLERS) as pool, httpx.Client(base_url=address, timeout=60) as client:
        calls = [pool.submit(work) for _ in range(CALLERS)]
        try:
            while time.monotonic() - begun < seconds:
                start = time.monotonic()
                assert client.get("/live").status_code == 200
                took.append(time.monotonic() - start)
                time.sleep(0.05)
        finally:
            ended.set()
        for done in calls:
            done.result()
    assert max(took) < 1
    return statistics.median(took)


def post(client: httpx.Client) -> httpx.Response:
    return client.post("/upscale", content=IMAGE, headers=PNG, params={"num_inference_steps": 1, "wait": 0})


def test_live_answers_while_redis_hangs(gateway: Fleet) -> None:
    address = gateway.addresses["gateway"]
    job = httpx.post(f"{address}/upscale?wait=0", content=IMAGE, headers=PNG).json()["id"]

    def call(client: httpx.Client) -> None:
        post(client)
        for path in ("/ready", "/status", "/metrics", f"/jobs/{job}", "/v1/files", "/v1/predictions"):
            assert client.get(path).status_code == 503, path

    with stopped(gateway.processes["redis"].pid):
        assert time_of_live(address, call, 2) < 0.1
    gateway.until(lambda: httpx.get(f"{address}/jobs/{job}").status_code == 200, 5)


def test_live_answers_while_the_store_hangs(gateway: Fleet, tmp_path: Path) -> None:
    with silent_server() as port:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
        address = gateway.start_gateway(
            "stranger", SEESR_STORE="s3://nowhere", AWS_ENDPOINT=f"http://127.0.0.1:{port}", **keys
        )
        try:
            with httpx.Client(base_url=address) as client:

                def call(_: httpx.Client) -> None:
                    with contextlib.suppress(httpx.TimeoutException):
                        client.post("/upscale", content=IMAGE, headers=PNG, params={"wait": 0}, timeout=2)
                        client.get("/ready", timeout=2)

                assert time_of_live(address, call, 2) < 0.1
        finally:
            gateway.kill("stranger")
            del gateway.addresses["stranger"]


def test_a_hanging_store_does_not_block_other_routes(tmp_path: Path) -> None:
    """Uploads wait for the store; whoever asks only for a job is answered."""
    folder, port = tmp_path, free_port()
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}
    environment = {"SEESR_STORE": "s3://seesr", "AWS_ENDPOINT": f"http://127.0.0.1:{port}", **keys}
    with fleet(folder, workers=0, gateways=0, **environment) as cluster:
        store = cluster.spawn("other", sys.executable, "-m", "moto.server", "-p", str(port))
        cluster.until(lambda: httpx.put(f"{environment['AWS_ENDPOINT']}/seesr").status_code == 200, 60)
        address = cluster.start_gateway("gateway")
        job = httpx.post(f"{address}/upscale?wait=0", content=IMAGE, headers=PNG, timeout=30).json()["id"]

        def send(_: int) -> int:
            url = f"{address}/upscale"
            return httpx.post(url, content=IMAGE, headers=PNG, params={"wait": 0}, timeout=60).status_code

        with ThreadPoolExecutor(60) as pool:
            with stopped(store.pid):
                sending = [pool.submit(send, number) for number in range(60)]  # a gateway has 40 threads
                time.sleep(2.5)
                started = time.monotonic()
                answers = [httpx.get(f"{address}/{path}", timeout=20) for path in (f"jobs/{job}", "live")]
                assert [answer.status_code for answer in answers] == [200, 200] and time.monotonic() - started < 1
            statuses = [done.result() for done in sending]
        assert set(statuses) == {202, 503} and statuses.count(503) > 60 - 2 * MAX_CALLS


def test_calls_beyond_the_limit_wait_for_a_place_and_not_for_a_slow_call() -> None:
    limit, begun = CallLimit(2, slow=0.3), threading.Event()

    def work(seconds: float) -> None:
        with limit.call():
            begun.set()
            time.sleep(seconds)

    with ThreadPoolExecutor(3) as pool:
        quick = [pool.submit(work, 0.1) for _ in range(3)]
        assert all(call.result() is None for call in quick)
        slow = [pool.submit(work, 0.8) for _ in range(2)]
        time.sleep(0.05)
        for least, maximum in ((0.2, 0.5), (0.0, 0.05)):  # the second one does not wait at all
            started = time.monotonic()
            with pytest.raises(Unavailable, match="too slow"), limit.call():
                pass
            assert least <= time.monotonic() - started < maximum
        assert all(call.result() is None for call in slow)
    with limit.call():
        pass


def test_a_waiting_caller_asks_redis_rarely(gateway: Fleet) -> None:
    """One subscription wakes all who wait."""
    address, callers = gateway.addresses["gateway"], 40
    with ThreadPoolExecutor(callers) as pool:
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=address, timeout=30, limits=limits) as client:
            waits = [
                pool.submit(client.post, "/upscale", content=IMAGE, headers=PNG, params={"wait": 4})
                for _ in range(callers)
            ]
            time.sleep(1.5)
            before = gateway.redis.info("stats")["total_commands_processed"]
            time.sleep(1.5)
            commands = gateway.redis.info("stats")["total_commands_processed"] - before
            assert all(done.result().status_code == 202 for done in waits)
    assert commands < 2 * callers  # with maintenance; a look each 0.25 s would be six for each caller
