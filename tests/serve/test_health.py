"""Health, status, usage and metrics of a server that is not ready, and of a gateway with workers."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_server import PNG, QUICK, serving
from prometheus_client.core import Metric
from serving import ANN, BOB, sharp
from starlette.testclient import TestClient

from seesr.serving import health
from seesr.serving.health import State
from seesr.serving.job import Job
from seesr.serving.supervisor import BackgroundTask


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("health"), api_keys=f"ann:{ANN},bob:{BOB}") as client:
        client.headers["Authorization"] = f"Bearer {ANN}"
        yield client


def value(client: TestClient, name: str) -> float:
    line = re.search(rf"^{name} (\S+)$", client.get("/metrics").text, re.M)
    assert line, name
    return float(line[1])


@pytest.mark.parametrize(("failure", "ready"), [(None, True), ("the device has failed", False)])
def test_a_server_says_everywhere_whether_it_is_ready(
    client: TestClient, failure: str | None, ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app.state.service.jobs, "failure", failure)  # type: ignore[attr-defined]
    assert value(client, "seesr_ready") == ready
    status = client.get("/status").json()
    assert (status["ready"], status["reason"]) == (ready, failure)
    for path in ("/ready", "/health"):
        answer = client.get(path)
        assert answer.status_code == (200 if ready else 503)
        assert answer.text == "ready" if ready else answer.json()["detail"] == failure
        assert answer.headers.get("retry-after") == (None if ready else "5")
    assert client.get("/ping").status_code == (200 if ready else 503) and client.get("/live").text == "ok"


@pytest.mark.parametrize(("reason", "status"), [("the weights are loading", 204), ("background task x failed", 503)])
def test_a_platform_is_told_that_the_weights_load(
    client: TestClient, reason: str, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client.app.state.service.jobs, "failure", reason)  # type: ignore[attr-defined]
    assert client.get("/ping").status_code == status


def test_metrics_of_the_queue_and_of_this_process(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
    assert (value(client, "seesr_queue_length"), value(client, "seesr_running")) == (0, 0)
    assert value(client, "seesr_oldest_wait_seconds") == 0 and value(client, "seesr_disk_free_bytes") > 1e6
    more = {"queue_length": 2, "oldest_wait_seconds": 50.0, "running": {"id": "a"}}
    status = jobs.status()
    monkeypatch.setattr(jobs, "status", lambda: {**status, **more})
    assert (value(client, "seesr_queue_length"), value(client, "seesr_running")) == (2, 1)
    assert value(client, "seesr_oldest_wait_seconds") == 50
    resident = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert resident and value(client, "seesr_memory_bytes") == pytest.approx(int(resident[1]) * 1024, rel=0.2)


def test_the_status_has_the_models_and_hides_the_jobs_of_others(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    job = client.post("/upscale", params=QUICK, content=sharp(), headers=PNG).headers["x-job-id"]
    monkeypatch.setattr(service.jobs, "running", service.jobs.find(job))
    status = client.get("/status").json()
    assert status["models"] == [{"name": "you/seesr", "version": service.models.default.version, "loaded": True}]
    assert status["version"] == service.models.default.version and status["running"]["id"] == job
    assert status["since"] == service.jobs.since and abs(status["since"] - time.time()) < 86400
    assert client.get("/status", headers={"Authorization": f"Bearer {BOB}"}).json()["running"]["id"] is None
    monkeypatch.setattr(service.jobs, "running", Job("ann", {}, id="gone"))
    assert client.get("/status").json()["running"]["id"] is None, "its record is gone"


def test_the_usage_of_a_key_without_limits_of_its_own(client: TestClient) -> None:
    usage = client.get("/usage", headers={"Authorization": f"Bearer {BOB}"}).json()
    assert (usage["name"], usage["rate"], usage["share"]) == ("bob", 600, 0.5)
    assert usage["priorities"] == ["urgent", "normal", "low"] and usage["days"] == []
    assert usage["megapixels_per_day"] is None and usage["expires"] is None


def samples(metrics: Iterator[Metric]) -> dict[tuple[str, ...], float]:
    return {(s.name, *s.labels.values()): s.value for metric in metrics for s in metric.samples}


def state(**tasks: BackgroundTask) -> State:
    service: Any = SimpleNamespace(supervisor=SimpleNamespace(tasks=tasks))
    return State(service, None)


def test_metrics_of_background_tasks() -> None:
    broken = BackgroundTask(failures=3, error="ValueError", failed=time.monotonic(), pause=60.0)
    assert samples(state(jobs=BackgroundTask(), webhooks=broken).background_tasks({})) == {
        ("seesr_background_failures_total", "jobs"): 0, ("seesr_background_failures_total", "webhooks"): 3,
        ("seesr_background_up", "jobs"): 1, ("seesr_background_up", "webhooks"): 0,
    }  # fmt: skip


def test_metrics_of_workers() -> None:
    workers = {
        "a": {"state": "idle", "failures": {"lease": 1}, "child_failures": {"orders": 2}},
        "b": {"state": "idle", "failures": {"lease": 0}}, "c": {},
    }  # fmt: skip
    assert samples(state().workers({"workers": workers})) == {
        ("seesr_workers", "idle"): 2, ("seesr_workers", "starting"): 1,
        ("seesr_worker_background_failures_total", "a", "lease"): 1,
        ("seesr_worker_background_failures_total", "a", "orders"): 2,
        ("seesr_worker_background_failures_total", "b", "lease"): 0,
    }  # fmt: skip
    assert samples(state().workers({})) == {}


def test_metrics_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "gpu_usage", lambda index: {"used": index, "total": 9, "utilization": 0.5})
    workers = {"a": {"gpu": {"used": 1, "total": 2, "utilization": 0.25}}, "b": {"gpu": {"used": 3, "total": 4}},
               "c": {"gpu": None}, "d": {}}  # fmt: skip
    assert samples(state().gpus({"workers": workers, "engine": None})) == {
        ("seesr_gpu_memory_bytes", "a", "used"): 1, ("seesr_gpu_memory_bytes", "a", "total"): 2,
        ("seesr_gpu_memory_bytes", "b", "used"): 3, ("seesr_gpu_memory_bytes", "b", "total"): 4,
        ("seesr_gpu_utilization_ratio", "a"): 0.25,
    }  # fmt: skip
    assert samples(state().gpus({"engine": {"device_index": 7}})) == {
        ("seesr_gpu_memory_bytes", "local", "used"): 7, ("seesr_gpu_memory_bytes", "local", "total"): 9,
        ("seesr_gpu_utilization_ratio", "local"): 0.5,
    }  # fmt: skip
    assert samples(state().gpus({"engine": {"device": "cpu"}})) == {}


def test_ids_of_other_owners_are_hidden_in_one_place() -> None:
    def own(id: str) -> bool:
        return id == "mine"

    workers = {"a": {"job": "mine", "id": "theirs"}, "b": {"job": None}, "c": {"job": "theirs"}}
    shown = health.without_foreign({"running": {"id": "mine"}, "workers": workers}, own)
    assert shown == {"running": {"id": "mine"}, "workers": {"a": {"job": "mine", "id": None}, "b": {"job": None},
                                                            "c": {"job": None}}}  # fmt: skip


def test_a_page_of_memory_is_counted_in_bytes() -> None:
    assert health.resident() % os.sysconf("SC_PAGE_SIZE") == 0 and health.resident() > 1e7
