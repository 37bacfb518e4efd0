"""Clients of a fleet: send images, follow their jobs, and compare the results."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from PIL import Image

from lab.fleet.servers import Fleet
from seesr.fleet.job_store import COUNTS

Figures = dict[str, Any]
THREADS = 8  # that send at the same time


def small_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(48 * 36 * 3, dtype=np.uint8).reshape(36, 48, 3)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGE, PNG = small_png(), {"Content-Type": "image/png"}


class Caller:
    """Sends images to the gateways in turn, and asks after them."""

    def __init__(self, cluster: Fleet) -> None:
        self.fleet = cluster
        self.client = httpx.Client(timeout=15, limits=httpx.Limits(max_connections=32))
        cluster.callers.append(self.client)
        self.seconds: list[float] = []

    def ask(self, method: str, path: str, number: int = 0, **more: Any) -> httpx.Response:
        started, addresses = time.perf_counter(), list(self.fleet.addresses.values())
        answer = self.client.request(method, addresses[number % len(addresses)] + path, **more)
        self.seconds.append(time.perf_counter() - started)
        return answer

    def send(self, number: int = 0, **query: Any) -> str:
        """An image -> the id of its job."""
        requested = {"wait": 0, "num_inference_steps": 1, **query}
        answer = self.ask("POST", "/upscale", number, params=requested, content=IMAGE, headers=PNG)
        assert answer.status_code == 202, answer.text
        return answer.json()["id"]

    def send_many(self, count: int, **query: Any) -> list[str]:
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(lambda number: self.send(number, **query), range(count)))

    def job(self, id: str) -> dict[str, Any]:
        return self.ask("GET", f"/jobs/{id}").json()

    def ended(self, *states: str) -> int:
        return sum(int(float(self.fleet.redis.hget(COUNTS, json.dumps(["jobs", state])) or 0)) for state in states)

    def wait_for(self, count: int, seconds: float, *states: str) -> None:
        self.fleet.until(lambda: self.ended(*(states or ("succeeded",))) >= count, seconds)

    def summary(self, ids: list[str]) -> Figures:
        """What became of the jobs: results are fetched and compared with what was sent."""

        def result(id: str) -> bytes:
            return self.ask("GET", f"/jobs/{id}/result").content

        with ThreadPoolExecutor(THREADS) as pool:
            good = sum(content == IMAGE for content in pool.map(result, ids))
        runs = collections.Counter(job for job, _ in self.fleet.runs())
        files = list((self.fleet.folder / "store" / "out").glob("*"))
        return {
            "jobs": len(ids),
            "results": good,
            "lost": len(ids) - good,
            "duplicates": len(files) - len(ids),
            "runs": sum(runs.values()),
            "run_twice": sum(count > 1 for count in runs.values()),
        }


class Client(Caller):
    """Sends as a careful client does: each image has an Idempotency-Key and is sent again until it is taken.

    Attributes:
        jobs: the id of each image that was taken, by its number.
        versions: the version that each job was sent to, by its id; known once it was collected.
        pause: seconds that each of the THREADS of `send_range` waits after an image.
        refused: answers of 429, 503 and 504, connections that broke, and time-outs; each was sent again.
    """

    def __init__(self, cluster: Fleet) -> None:
        super().__init__(cluster)
        self.jobs: dict[int, str] = {}
        self.versions: dict[str, str] = {}
        self.refused = 0
        self.pause = 0.0

    def send(self, number: int = 0, **query: Any) -> str:
        requested = {"wait": 0, "num_inference_steps": 1, "seed": 1, **query}
        headers = {**PNG, "Idempotency-Key": f"image-{number}"}
        while True:
            with contextlib.suppress(httpx.HTTPError):
                answer = self.ask("POST", "/upscale", number, params=requested, content=IMAGE, headers=headers)
                if answer.status_code in (200, 202):  # 200: it was taken before, and is made already
                    self.jobs[number] = answer.headers.get("x-job-id") or answer.json()["id"]
                    return self.jobs[number]
                if answer.status_code not in (409, 429, 503):
                    raise AssertionError(answer.text)
            self.refused += 1
            time.sleep(0.2)

    def send_range(self, begin: int, end: int) -> list[str]:
        def send(number: int) -> str:
            id = self.send(number)
            time.sleep(self.pause)
            return id

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(send, range(begin, end)))

    def collect(self, seconds: float) -> Figures:
        """Waits until every job has ended, and compares each result with what was sent."""
        waiting, end = set(self.jobs.values()), time.monotonic() + seconds
        misreported: list[str] = []
        while waiting and time.monotonic() < end:
            for id in sorted(waiting):
                with contextlib.suppress(httpx.HTTPError):
                    if self.compare(id, misreported):
                        waiting.discard(id)
            time.sleep(0.2)
        results = {"jobs": len(self.jobs), "lost": len(waiting), "misreported": len(misreported)}
        return {**results, "said": misreported[:3]} if misreported else results

    def compare(self, id: str, misreported: list[str]) -> bool:
        """Whether a job has ended; what is wrong with its end is added to `misreported`."""
        answer = self.ask("GET", f"/jobs/{id}", -1)
        job = answer.json() if answer.status_code == 200 else {}
        if job.get("status") not in ("succeeded", "failed", "canceled"):
            return False
        self.versions[id] = json.loads(self.fleet.redis.hget(f"seesr:job:{id}", "version"))
        if job["status"] != "succeeded":
            misreported.append(f"{job['status']}: {job['error']}")
            return True
        result = self.ask("GET", f"/jobs/{id}/result", -1)
        if result.status_code == 200 and result.content != IMAGE:
            misreported.append("another image")
        return result.status_code == 200
