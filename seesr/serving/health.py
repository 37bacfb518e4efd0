"""Health checks, `/status`, and metrics for Prometheus."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from seesr.serving import responses
from seesr.serving.access import LOCAL
from seesr.serving.api import service_of
from seesr.serving.gpu import gpu_usage
from seesr.serving.job_counts import families
from seesr.serving.middleware import answer, key_of, owner
from seesr.serving.service import Service


async def live(request: Request) -> Response:
    """The process answers."""
    return PlainTextResponse("ok")


def ready(request: Request) -> Response:
    """200 when images can be made; 503 and why while the weights load, and once the device has failed."""
    reason = service_of(request).ready()
    return PlainTextResponse("ready") if reason is None else answer("not_ready", reason, {"Retry-After": "5"})


def status(request: Request) -> Response:
    """Versions, bundle and hashes, device, memory, queue, running job, since when."""
    service = service_of(request)
    reason, now = service.ready(), service.jobs.status()
    loaded = now.pop("loaded")
    return JSONResponse({
        "ready": reason is None,
        "reason": reason,
        "version": service.models.default.version,
        "models": [
            {"name": model.example, "version": version, "loaded": version in loaded}
            for version, model in service.models.by_version.items()
        ],
        **without_foreign(now, lambda id: owns(request, id)),
        "disk_free_bytes": service.store.free_bytes(),
    })  # fmt: skip


def usage(request: Request) -> Response:
    """Limits and use of the key that asks."""
    service, key = service_of(request), key_of(request)
    days = [responses.Day(day=day, images=n, megapixels=round(mp, 6)) for day, n, mp in service.store.usage(key.name)]
    usage: responses.Usage = {
        "name": key.name,
        "rate": key.rate or service.configuration.rate,
        "share": key.share or service.configuration.queue_share,
        "priorities": list(key.priorities),
        "megapixels_per_day": key.megapixels_per_day,
        "expires": key.expires.isoformat() if key.expires else None,
        "days": days,
    }
    return JSONResponse(usage)


def owns(request: Request, id: str) -> bool:
    job = service_of(request).jobs.find(id)
    return job is not None and job.owner == owner(request)


def without_foreign(status: dict[str, Any], is_own: Callable[[str], bool]) -> dict[str, Any]:
    """The status of the jobs without the ids of those that are another owner's."""
    running, workers = status["running"], status.get("workers", {})
    entries = [*(running if isinstance(running, list) else [running] if running else []), *workers.values()]
    for entry in entries:
        for name in ("id", "job"):
            if entry.get(name) and not is_own(entry[name]):
                entry[name] = None
    return status


class State:
    """A collector of what the server and its jobs say at one moment.

    Args:
        key: the one key whose counts are shown, without the ids of jobs; None: all.
    """

    def __init__(self, service: Service, key: str | None) -> None:
        self.service, self.key = service, key

    def collect(self) -> Iterator[Metric]:
        now = self.service.jobs.status()
        yield from families(*self.service.jobs.counts(), self.key)
        yield from self.background_tasks(now)
        yield from self.workers(now)
        yield from self.gpus(now)
        for name, description, value in (
            ("seesr_ready", "1 when images can be upscaled", self.service.ready() is None),
            ("seesr_queue_length", "Jobs in the queue", now["queue_length"]),
            ("seesr_oldest_wait_seconds", "Age of the oldest job in the queue", now["oldest_wait_seconds"]),
            ("seesr_running", "1 while an image is upscaled", now["running"] is not None),
            ("seesr_memory_bytes", "Resident memory of this process", resident()),
            ("seesr_disk_free_bytes", "Free bytes of the disk of SEESR_DATA", self.service.store.free_bytes()),
        ):
            yield GaugeMetricFamily(name, description, value=value)

    def background_tasks(self, now: dict[str, Any]) -> Iterator[Metric]:
        failures = CounterMetricFamily("seesr_background_failures", "Errors of background tasks", labels=["task"])
        up = GaugeMetricFamily("seesr_background_up", "1 while the background task runs", labels=["task"])
        for name, task in list(self.service.supervisor.tasks.items()):
            failures.add_metric([name], task.failures)
            up.add_metric([name], not task.down)
        yield from (failures, up)

    def workers(self, now: dict[str, Any]) -> Iterator[Metric]:
        workers = now.get("workers", {})
        states = GaugeMetricFamily("seesr_workers", "Workers of the fleet", labels=["state"])
        for state, count in collections.Counter(worker.get("state", "starting") for worker in workers.values()).items():
            states.add_metric([state], count)
        yield states
        failures = CounterMetricFamily(
            "seesr_worker_background_failures", "Errors of a worker's background tasks", labels=["worker", "task"]
        )
        for name, worker in workers.items():
            for task, count in {**worker.get("failures", {}), **worker.get("child_failures", {})}.items():
                failures.add_metric([name, task], count)
        yield failures

    def gpus(self, now: dict[str, Any]) -> Iterator[Metric]:
        usages = {name: worker.get("gpu") for name, worker in now.get("workers", {}).items()}
        engine = now["engine"] or {}
        if "device_index" in engine:
            usages["local"] = gpu_usage(engine["device_index"])
        memory = GaugeMetricFamily("seesr_gpu_memory_bytes", "Memory of a worker's GPU", labels=["worker", "kind"])
        busy = GaugeMetricFamily(
            "seesr_gpu_utilization_ratio", "Utilization of a worker's GPU, from 0 to 1", labels=["worker"]
        )
        for name, usage in usages.items():
            for kind in ("used", "total") if usage else ():
                memory.add_metric([name, kind], usage[kind])
            if usage and "utilization" in usage:
                busy.add_metric([name], usage["utilization"])
        yield from (memory, busy)


def metrics(request: Request) -> Response:
    """For Prometheus; in OpenMetrics, with ids of jobs as exemplars, for a scraper that accepts it."""
    service, key, registry = service_of(request), request.scope["state"]["key"], CollectorRegistry()
    sees_all = key is None or key.name == LOCAL  # the scrape token, or a server without keys
    registry.register(State(service, None if sees_all else key.name))  # type: ignore[arg-type]
    registry.register(service.registry)
    encode, media_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), media_type=media_type)


def resident() -> int:
    import resource

    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


ROUTES = [Route("/live", live), Route("/ready", ready), Route("/health", ready), Route("/status", status),
          Route("/usage", usage), Route("/metrics", metrics)]  # fmt: skip
