"""Tests the guarantees of one `seesr serve` under faults, on this machine with the echo engine.

    sudo python -m lab.serve --json results/serve/chaos.json

Callers send 200 images, each with an Idempotency-Key, and try again until each is taken. Meanwhile the server is killed
with SIGKILL 20 times and started again. Its disk, a tmpfs (hence root), is full for some seconds. Once its journal is
overwritten, the start is refused, and the journal is put back. Once every record gets a field of another version. At
the end every job is asked for, and its result is compared with what was sent.

lost         jobs that were taken and have no result
twice        runs that began after the job's result was stored, keys with two jobs, and results of no job
misreported  jobs that are called failed or canceled, or succeeded with other bytes
live_ms      how long /live took to answer while the server ran, asked 20 times a second
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
from PIL import Image

from lab import report
from lab.serve.servers import EchoServer

DISK = 8 * 2**20  # bytes
FULL_SECONDS = 3.0
PNG = {"Content-Type": "image/png"}
QUICK = {"wait": 0, "num_inference_steps": 1, "seed": 1}


def distinct_png(number: int) -> bytes:
    """A PNG like no other of the experiment."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of DISK bytes.

    Raises:
        subprocess.CalledProcessError: this is not root.
    """
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


class Callers:
    """Send the images, and measure /live; they try again while the server is away.

    Args:
        pause: seconds between two images of one caller, at most.
    """

    def __init__(self, server: EchoServer, jobs: int, pause: float) -> None:
        self.server, self.jobs, self.pause = server, jobs, pause
        self.client = httpx.Client(timeout=10)
        self.ids: dict[int, set[str]] = {}
        self.refused = 0
        self.live: list[float] = []
        self.stopped = threading.Event()
        self.up = threading.Event()

    def send(self, number: int) -> None:
        headers, ids = {**PNG, "Idempotency-Key": f"image-{number}"}, self.ids.setdefault(number, set())
        sent_again = number % 10 == 0
        while not self.stopped.is_set():
            with contextlib.suppress(httpx.HTTPError):
                url = f"{self.server.url}/upscale"
                answer = self.client.post(url, params=QUICK, content=distinct_png(number), headers=headers)
                if answer.status_code in (200, 202):  # 200: sent again, and made meanwhile
                    ids.add(answer.headers.get("x-job-id") or answer.json()["id"])
                    if not sent_again:
                        break
                    sent_again = False
                elif answer.status_code in (429, 503):
                    self.refused += 1
                else:
                    raise AssertionError(answer.text)
            time.sleep(0.05)
        time.sleep(random.random() * self.pause)

    def send_all(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.send, range(self.jobs)))

    def watch(self) -> None:
        """Asks /live on fresh connections, as a platform does, but not while the server is down."""
        while not self.stopped.wait(0.05):
            if not self.up.is_set():
                continue
            address = urlsplit(self.server.url)
            with contextlib.suppress(OSError, http.client.HTTPException):
                started = time.perf_counter()
                connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
                connection.request("GET", "/live")
                connection.getresponse().read()
                if self.up.is_set():
                    self.live.append(time.perf_counter() - started)
                connection.close()


def until(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.02)


def ended(server: EchoServer) -> int:
    """Jobs that this process of the server has ended."""
    return sum(server.ask("GET", "/status").json()["ended"].values())


def ready(server: EchoServer) -> tuple[int, str]:
    answer = server.ask("GET", "/ready")
    return answer.status_code, answer.text


def fill_disk(server: EchoServer) -> str:
    """Fills the disk for FULL_SECONDS; what /ready said."""
    filler = server.data.parent / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    until(lambda: ready(server)[0] == 503, 20)
    message = json.loads(ready(server)[1])["detail"]
    time.sleep(FULL_SECONDS)
    filler.unlink()
    until(lambda: ready(server)[0] == 200, 20)
    return message


def damage_journal(server: EchoServer) -> str:
    """Overwrites the journal of a server that does not run, and puts it back; what the start said meanwhile."""
    paths = list(server.data.glob("jobs.sqlite*"))
    for path in paths:
        path.rename(path.with_name(f"kept-{path.name}"))
    (server.data / "jobs.sqlite").write_bytes(os.urandom(8192))
    try:
        server.start()
    except RuntimeError as error:
        message = str(error).strip().splitlines()[-1]
    else:
        server.end(signal.SIGKILL)
        raise RuntimeError("the server starts with a damaged journal")
    for path in paths:
        path.with_name(f"kept-{path.name}").replace(path)
    return message


def add_unknown_fields(server: EchoServer) -> None:
    """As if a newer version had written the records."""
    with contextlib.closing(sqlite3.connect(server.data / "jobs.sqlite")) as base, base:
        base.execute("UPDATE jobs SET record = json_set(record, '$.of_a_newer_version', 1)")


def chaos(folder: Path, jobs: int, kills: int) -> dict[str, Any]:
    """The figures of the experiment."""
    runs = folder / "runs.txt"
    with small_disk(folder / "disk") as disk:
        options = {"SEESR_MAX_QUEUE": "1000", "ECHO_SECONDS": "0.05", "ECHO_RUNS": str(runs)}
        server = EchoServer(folder / "server", SEESR_DATA=str(disk / "data"), **options)
        callers = Callers(server, jobs, pause=30 * 4 / jobs)
        server.start()
        threads = [threading.Thread(target=work) for work in (callers.watch, callers.send_all)]
        started = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            messages = disturb(server, callers, kills)
            threads[1].join()
            until(lambda: server.ask("GET", "/status").json()["queue_length"] == 0, 60)
            until(lambda: server.ask("GET", "/status").json()["running"] is None, 60)
            result = summary(server, callers, runs)
        finally:
            callers.stopped.set()
            for thread in threads:
                thread.join()
            server.end(signal.SIGKILL)
            server.client.close()
            callers.client.close()
    live = np.percentile(callers.live, (50, 99, 100)) * 1000
    return {
        "jobs": jobs,
        "kills": kills,
        **result,
        "refused_and_sent_again": callers.refused,
        "live_ms": {name: round(value, 1) for name, value in zip(("median", "p99", "max"), live, strict=True)},
        "live_asked": len(callers.live),
        "said": {name: message.replace(str(disk), "") for name, message in messages.items()},
        "seconds": round(time.monotonic() - started, 1),
    }


def disturb(server: EchoServer, callers: Callers, kills: int) -> dict[str, str]:
    """All faults, one after the other; what the server said of them."""
    messages: dict[str, str] = {}
    for kill in range(kills):
        callers.up.set()
        enough = ended(server) + random.randint(2, 5)
        until(lambda enough=enough: ended(server) >= enough, 60)
        if kill == kills // 2:
            messages["full_disk"] = fill_disk(server)
        callers.up.clear()
        server.end(signal.SIGKILL)
        if kill == kills // 3:
            messages["damaged_journal"] = damage_journal(server)
        if kill == 2 * kills // 3:
            add_unknown_fields(server)
        server.start()
    callers.up.set()
    return messages


def summary(server: EchoServer, callers: Callers, runs: Path) -> dict[str, Any]:
    """What became of the jobs."""
    lost = misreported = 0
    for number, ids in callers.ids.items():
        for id in ids:
            answer = server.ask("GET", f"/jobs/{id}")
            if answer.status_code != 200 or answer.json()["status"] in ("starting", "processing"):
                lost += 1
            elif answer.json()["status"] != "succeeded" or server.ask(
                "GET", f"/jobs/{id}/result"
            ).content != distinct_png(number):
                misreported += 1
    started_runs = runs.read_text().split("\n")
    known = {id for ids in callers.ids.values() for id in ids}
    results = [path.stem for path in (server.data / "outputs").iterdir()]
    twice = sum(line.endswith(" again") for line in started_runs)
    twice += sum(len(ids) - 1 for ids in callers.ids.values()) + sum(name not in known for name in results)
    left = [path.name for kind in ("inputs", "parts") for path in (server.data / kind).iterdir()]
    return {
        "lost": lost + callers.jobs - len(callers.ids),
        "twice": twice,
        "misreported": misreported,
        "files_left": len(left),
        "interrupted_runs": len([line for line in started_runs if line]) - len(known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        figures = chaos(Path(folder), args.jobs, args.kills)
    print(json.dumps(figures, indent=1))
    if args.json:
        report.write(args.json, [{"experiment": "chaos", **figures}])


if __name__ == "__main__":
    main()
