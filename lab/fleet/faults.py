"""Fault experiments with Redis, the store, gateways and workers, run by lab.fleet.figures."""

from __future__ import annotations

import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from lab.fleet.callers import IMAGE, PNG, THREADS, Client, Figures
from lab.fleet.live import LiveWatch, watched
from lab.fleet.servers import Fleet, fleet, free_port
from seesr.fleet.job_store import JobStore
from seesr.fleet.redis_client import RedisClient
from seesr.networks import weights

KEEP, CHAOS_KEEP = 15.0, 40.0  # seconds after which records and files expire; longer than an experiment's faults
EXPIRED = 90.0  # seconds within which all must have expired
OUTAGE = 5.0  # seconds of a fault
SENDING = 10.0  # seconds in which the images of `chaos` are sent, without the faults


class Experiment:
    """A fleet, its client, and the figures that all experiments have."""

    def __init__(self, cluster: Fleet, live: LiveWatch) -> None:
        self.fleet, self.client, self.live = cluster, Client(cluster), live
        self.started = time.monotonic()

    def until_succeeded(self, count: int) -> None:
        self.fleet.until(lambda: self.client.ended("succeeded") >= count, 60)

    def send_in_background(self, begin: int, end: int) -> threading.Thread:
        thread = threading.Thread(target=self.client.send_range, args=(begin, end))
        thread.start()
        return thread

    def outcome(self, **figures: Any) -> Figures:
        """Waits until all jobs have ended, and then until everything of them has expired."""
        result, runs = self.client.collect(90), self.fleet.runs()
        left: list[str] = []

        def expired() -> bool:
            left[:] = self.fleet.left()
            return not left

        with suppress(TimeoutError):
            self.fleet.until(expired, EXPIRED)
        seconds = self.live.stop()
        median, p99, slowest = np.percentile(seconds, (50, 99, 100)) * 1000
        return {
            **result,
            "mixed": sum(self.client.versions.get(id, version) != version for id, version in runs),
            "run_twice": len(runs) - len({id for id, _ in runs}),
            "left": len(left),
            **({"left_at": left[:5]} if left else {}),
            **figures,
            "refused_and_sent_again": self.client.refused,
            "live_ms": {"median": round(median, 1), "p99": round(p99, 1), "max": round(slowest, 1)},
            "live_asked": len(seconds),
            "seconds": round(time.monotonic() - self.started, 1),
        }


@contextmanager
def experiment(folder: Path, keep: float = KEEP, **options: Any) -> Iterator[Experiment]:
    """A fleet whose jobs expire after `keep` seconds."""
    options = {"ECHO_SECONDS": "0.1", "SEESR_KEEP": str(keep / 3600), **options}
    with fleet(folder, **options) as cluster, watched(cluster) as live:
        yield Experiment(cluster, live)


@contextmanager
def stopped(cluster: Fleet, name: str) -> Iterator[None]:
    """A process that hangs meanwhile."""
    cluster.processes[name].send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        cluster.processes[name].send_signal(signal.SIGCONT)


def status_of(cluster: Fleet, path: str) -> int:
    return httpx.get(cluster.addresses["gateway"] + path, timeout=15).status_code


def readonly(folder: Path, jobs: int, workers: int) -> Figures:
    with experiment(folder, workers=workers) as test:
        cluster = test.fleet
        test.client.send_range(0, jobs // 2)
        test.until_succeeded(jobs // 8)
        cluster.redis.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
        started = time.monotonic()
        sending = test.send_in_background(jobs // 2, jobs)
        time.sleep(1)
        answers = [status_of(cluster, path) for path in ("/ready", "/live")]
        post = httpx.post(f"{cluster.addresses['gateway']}/upscale?wait=0", content=IMAGE, headers=PNG).status_code
        time.sleep(max(0.0, started + OUTAGE - time.monotonic()))
        cluster.redis.execute_command("REPLICAOF", "NO", "ONE")
        sending.join()
        return test.outcome(while_read_only={"ready": answers[0], "live": answers[1], "post": post})


def hang(folder: Path, jobs: int, workers: int) -> Figures:
    with experiment(folder, workers=workers, s3=True, SEESR_STORE_RETRY="60") as test:
        cluster, took = test.fleet, []
        first = test.client.send_range(0, jobs // 2)
        test.until_succeeded(jobs // 8)
        with stopped(cluster, "weed"):
            sending = test.send_in_background(jobs // 2, jobs)
            time.sleep(1)
            while len(took) < 4 * OUTAGE:  # routes that do not need the store
                started = time.monotonic()
                status_of(cluster, f"/jobs/{first[0]}")
                took.append(time.monotonic() - started)
                time.sleep(0.25)
        sending.join()
        return test.outcome(job_asked_ms=round(1000 * max(took), 1))


def tail(folder: Path, jobs: int, workers: int) -> Figures:
    with experiment(folder, workers=workers) as test:
        cluster = test.fleet
        test.client.send_range(0, jobs)
        test.until_succeeded(jobs // 4)
        (log,) = (folder / "appendonlydir").glob("*.incr.aof")
        time.sleep(1.5)  # what is older is written
        size, ended = log.stat().st_size, test.client.ended("succeeded")
        test.until_succeeded(jobs * 3 // 4)
        time.sleep(1.5)
        ended = test.client.ended("succeeded") - ended
        cluster.kill("redis")
        lost = log.stat().st_size - size
        with log.open("r+b") as file:
            file.truncate(size)
        cluster.start_redis()
        return test.outcome(lost_bytes=lost, lost_ends=ended)


def other_bundle(folder: Path) -> Path:
    """A bundle of another version."""
    folder.mkdir()
    manifest = json.loads((weights.POCKET / weights.MANIFEST).read_text())
    (folder / weights.MANIFEST).write_text(json.dumps({**manifest, "name": "other"}))
    return folder


def upgrade(folder: Path, jobs: int, workers: int) -> Figures:
    with experiment(folder, workers=2) as test:
        cluster, new = test.fleet, {"SEESR_WEIGHTS": str(other_bundle(folder / "bundle"))}
        test.client.send_range(0, jobs // 2)
        cluster.start_worker("worker2", wait=False, **new)
        old = cluster.addresses["gateway"]
        cluster.start_gateway("gateway1", **new)
        del cluster.addresses["gateway"]  # the load balancer
        test.client.send_range(jobs // 2, jobs)
        cluster.kill("worker0")  # its job goes to the other one of its version
        cluster.until(lambda: cluster.works("worker2"), 60)
        cluster.until(lambda: not any(job["version"] == first_version(cluster) for job in open_jobs(cluster)), 90)
        codes = [cluster.kill("worker1", signal.SIGTERM)]
        codes.append(cluster.kill("gateway", signal.SIGTERM))
        assert old not in cluster.addresses.values()
        return test.outcome(versions=len({version for _, version in cluster.runs()}), exit_codes=codes)


def open_jobs(cluster: Fleet) -> list[dict[str, Any]]:
    """The records of jobs that have not ended."""
    ids = [*cluster.redis.zrange("seesr:waiting", 0, -1), *cluster.redis.zrange("seesr:running", 0, -1)]
    records = [cluster.redis.hgetall(f"seesr:job:{id}") for id in ids]
    return [{name: json.loads(value) for name, value in record.items()} for record in records if record]


def first_version(cluster: Fleet) -> str:
    """The version of the worker that ran the first job."""
    return cluster.runs()[0][1]


def chaos(folder: Path, jobs: int, workers: int) -> Figures:
    """All that can leave something behind."""
    with experiment(folder, CHAOS_KEEP, workers=workers, gateways=2) as test:
        cluster, client = test.fleet, test.client
        orphan = folder / "store" / "in" / secrets.token_hex(16)
        client.pause = SENDING * THREADS / jobs
        sending = test.send_in_background(0, jobs)
        test.until_succeeded(jobs // 8)
        orphan.write_bytes(IMAGE)  # of a gateway that was killed between a file and its record
        for number in range(3):
            client.ask("POST", "/v1/files", files={"content": (f"{number}.png", IMAGE)})
        files = [("a", ("a.png", IMAGE)), ("b", ("b.png", b"no image"))]
        batch = client.ask("POST", "/batches", files=files, params={"num_inference_steps": 1}).json()
        canceled = [client.send(1000 + number, num_inference_steps=8) for number in range(3)]
        for id in canceled:
            client.ask("DELETE", f"/jobs/{id}")
        late = client.send(2000, num_inference_steps=8, priority="urgent")
        cluster.until(lambda: cluster.redis.hget(f"seesr:job:{late}", "status") == '"processing"', 30)
        JobStore(RedisClient(cluster.environment["SEESR_REDIS"]), CHAOS_KEEP).forget(
            late
        )  # its worker ends a job that has expired
        for number in (1000, 1001, 1002, 2000):
            del client.jobs[number]
        with stopped(cluster, "redis"):
            time.sleep(3)
        del cluster.addresses["gateway1"]
        cluster.kill("gateway1")
        cluster.start_gateway("gateway1")
        cluster.kill("worker0")
        cluster.start_worker("worker0", wait=False)
        test.until_succeeded(jobs // 2)
        cluster.kill("redis")
        cluster.start_redis()
        sending.join()
        cluster.until(lambda: client.ask("GET", f"/batches/{batch['id']}").json()["status"] == "ended", 60)
        client.ask("GET", f"/batches/{batch['id']}/result")
        return test.outcome()


EXPERIMENTS: dict[str, Callable[[Path, int, int], Figures]] = {
    "readonly": readonly, "hang": hang, "tail": tail, "upgrade": upgrade, "chaos": chaos,
}  # fmt: skip
