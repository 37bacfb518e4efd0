"""Health checks, `/status`, and metrics for Prometheus."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from seesr.serving import responses
from seesr.serving.api import service
from seesr.serving.middleware import answer, key_of, owner
from seesr.serving.supervisor import Supervisor

STARTED = time.time()


async def live(request: Request) -> Response:
    """The process answers."""
    return PlainTextResponse("ok")


def ready(request: Request) -> Response:
    """200 when images can be made; 503 and why while the weights load, and once the device has failed."""
    reason = service(request).ready()
    return PlainTextResponse("ready") if reason is None else answer("not_ready", reason, {"Retry-After": "5"})


def status(request: Request) -> Response:
    """Versions, bundle and hashes, device, memory, queue, running job, since when."""
    of = service(request)
    reason = of.ready()
    return JSONResponse({
        "ready": reason is None,
        "reason": reason,
        "version": of.version,
        "since": STARTED,
        **without_foreign(of.jobs.status(), lambda id: owns(request, id)),
        "disk_free_bytes": of.ledger.free_bytes(),
    })  # fmt: skip


def usage(request: Request) -> Response:
    """Limits and use of the key that asks."""
    of, key = service(request), key_of(request)
    days = [responses.Day(day=day, images=n, megapixels=round(mp, 6)) for day, n, mp in of.ledger.usage(key.name)]
    found: responses.Usage = {
        "name": key.name,
        "rate": key.rate or of.configuration.rate,
        "share": key.share or of.configuration.queue_share,
        "priorities": list(key.priorities),
        "megapixels_per_day": key.megapixels_per_day,
        "expires": key.expires.isoformat() if key.expires else None,
        "days": days,
    }
    return JSONResponse(found)


def owns(request: Request, id: str) -> bool:
    job = service(request).jobs.find(id)
    return job is not None and job.owner == owner(request)


def without_foreign(status: dict[str, Any], own: Callable[[str], bool]) -> dict[str, Any]:
    """The status of the jobs without the ids of those that are another owner's."""
    running, workers = status["running"], status.get("workers", {})
    entries = [*(running if isinstance(running, list) else [running] if running else []), *workers.values()]
    for entry in entries:
        for name in ("id", "job"):
            if entry.get(name) and not own(entry[name]):
                entry[name] = None
    return status


class Numbers:
    """A collector of what the jobs say at the moment of asking."""

    def __init__(self, now: dict[str, Any], supervisor: Supervisor) -> None:
        self.now, self.supervisor = now, supervisor

    def collect(self) -> Any:
        ended = CounterMetricFamily("seesr_jobs", "Jobs that ended", labels=["status"])
        for name, count in self.now["ended"].items():
            ended.add_metric([name], count)
        seconds = CounterMetricFamily("seesr_stage_seconds", "Seconds per stage", labels=["stage"])
        for name, value in self.now["seconds_per_stage"].items():
            seconds.add_metric([name], value)
        yield from (
            ended,
            seconds,
            CounterMetricFamily("seesr_queue_seconds", "Waited", value=self.now["queue_seconds"]),
        )
        tiles = CounterMetricFamily("seesr_tiles", "Tiles that were denoised", value=self.now["tiles"])
        failures = CounterMetricFamily("seesr_background_failures", "Errors of background tasks", labels=["task"])
        up = GaugeMetricFamily("seesr_background_up", "1 while the background task runs", labels=["task"])
        for name, task in list(self.supervisor.tasks.items()):
            failures.add_metric([name], task.failures)
            up.add_metric([name], not task.down)
        yield from (failures, up)
        yield from (tiles, CounterMetricFamily("seesr_retries", "Second tries", value=self.now["retries"]))


def metrics(request: Request) -> Response:
    """For Prometheus."""
    of, registry = service(request), CollectorRegistry()
    now = of.jobs.status()
    registry.register(Numbers(now, of.supervisor))  # type: ignore[arg-type]
    workers = collections.Counter(worker.get("state", "starting") for worker in now.get("workers", {}).values())
    states = Gauge("seesr_workers", "Workers of the fleet", ["state"], registry=registry)
    for state, count in workers.items():
        states.labels(state).set(count)
    memory = Gauge("seesr_worker_gpu_bytes", "GPU memory of a worker", ["worker", "kind"], registry=registry)
    for name, worker in now.get("workers", {}).items():
        for kind, value in (worker.get("gpu") or {}).items():
            memory.labels(name, kind).set(value)
    for name, description, value in (
        ("seesr_ready", "1 when images can be upscaled", of.ready() is None),
        ("seesr_queue_length", "Jobs that wait", now["queue_length"]),
        ("seesr_oldest_wait_seconds", "Age of the oldest job that waits", now["oldest_wait_seconds"]),
        ("seesr_running", "1 while an image is upscaled", now["running"] is not None),
        ("seesr_memory_bytes", "Resident memory of this process", resident()),
    ):
        Gauge(name, description, registry=registry).set(value)
    return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")


def resident() -> int:
    import resource

    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


ROUTES = [Route("/live", live), Route("/ready", ready), Route("/health", ready), Route("/status", status),
          Route("/usage", usage), Route("/metrics", metrics)]  # fmt: skip
