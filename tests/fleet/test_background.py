"""Every background task of a gateway and of a worker survives an error. Gateways run in this process, on real Redis."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import redis
import redis.client
from serve.test_background import Receivers, metric, until  # type: ignore[import-not-found]
from starlette.testclient import TestClient

from seesr.config import Configuration
from seesr.fleet import gateway, lease
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import JobStore
from seesr.fleet.jobs import FleetJobs
from seesr.fleet.maintenance import Maintenance
from seesr.fleet.metadata_store import FleetMetadataStore
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.networks import weights
from seesr.object_store import Store
from seesr.serving import app, supervisor, webhooks
from seesr.serving.gpu import gpu_usage
from seesr.serving.identity import version_of
from seesr.serving.job import DONE, Job
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

BREAKS = {  # background task of a gateway -> what it calls
    "changes": (redis.client.PubSub, "get_message"),
    "housekeeping": (FleetMetadataStore, "expire"),
    "maintenance": (Maintenance, "reconcile"),
    "webhooks": (JobStore, "claim_hook"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_task_of_a_gateway_survives_an_error(
    name: str, configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, function = BREAKS[name]
    real, broken = getattr(owner, function), threading.Event()

    def work(*args: Any, **more: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("broken on purpose")
        return real(*args, **more)

    monkeypatch.setattr(owner, function, work)
    monkeypatch.setattr(app, "EXPIRY", 0.05)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.4)
    WorkerRegistry(RedisClient(configuration.redis or "")).update(
        "w@here", version=version_of(weights.POCKET), state="idle"
    )
    built = app.build(
        configuration,
        "http://seesr.test",
        weights.POCKET,
        lambda send: gateway.parts(configuration, weights.POCKET, send),
    )
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        until(lambda: client.get("/ready").status_code == 200)
        assert set(built.state.service.supervisor.tasks) == set(BREAKS)
        broken.set()
        until(lambda: f"background task {name} (RuntimeError) failed" in client.get("/ready").text)
        until(lambda: metric(client, f'seesr_background_failures_total{{task="{name}"}}') >= 2)
        broken.clear()
        until(lambda: client.get("/ready").status_code == 200)


def test_the_lease_is_renewed_while_the_gpu_cannot_be_read(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewed: list[float] = []

    def no_gpu() -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(lease, "renew", lambda redis: renewed.append(time.monotonic()))
    monkeypatch.setattr(lease, "gpu_usage", no_gpu)
    tasks = lease.start_threads(configuration)
    assert set(tasks.tasks) == {"lease", "registry"}
    until(lambda: tasks.tasks["registry"].failures >= 2 and len(renewed) >= 3)
    monkeypatch.setattr(lease, "gpu_usage", lambda: None)
    registry = WorkerRegistry(RedisClient(configuration.redis or ""))
    until(lambda: registry.workers().get("w@here", {}).get("failures", {}).get("registry", 0) >= 2)
    assert tasks.tasks["lease"].failures == 0

    def broken(redis: RedisClient) -> None:
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(lease, "renew", broken)
    until(lambda: tasks.tasks["lease"].failures >= 2)
    tasks.stop()


@pytest.mark.parametrize("visible", ["", "-1", "GPU-unknown", "7"])
def test_a_gpu_that_nvml_does_not_know(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def unknown(place: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", unknown)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", unknown)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_usage() is None


def test_a_worker_takes_commands_after_a_failed_reload(monkeypatch: pytest.MonkeyPatch) -> None:
    from seesr.fleet import worker

    orders = iter(["load", "load"])
    reloads = iter([RuntimeError("no memory"), None])
    messages: list[dict[str, Any]] = []

    class Engine:
        def reload(self) -> None:
            if error := next(reloads):
                raise error

    class Orders:
        def order(self, name: str) -> str | None:
            time.sleep(0.01)
            return next(orders, None)

    child = object.__new__(worker.Child)
    child.registry, child.engine, child.name, child.supervisor = Orders(), Engine(), "w", Supervisor()  # type: ignore[assignment]
    report = lambda state=None, **more: state and messages.append({"state": state, **more})  # noqa: E731
    monkeypatch.setattr(child, "report_state", report)
    child.supervisor.thread("orders", child.obey)
    until(lambda: len(messages) == 4)
    child.supervisor.stop()
    assert [message["state"] for message in messages] == ["loading", "failed", "loading", "idle"]
    assert messages[1]["error"] == "RuntimeError: no memory" and child.supervisor.tasks["orders"].failures == 1


def test_a_worker_repeats_the_state_that_redis_has_lost(configuration: Configuration) -> None:
    from seesr.fleet import worker

    child = object.__new__(worker.Child)
    child.registry, child.name, child.supervisor = (
        WorkerRegistry(RedisClient(configuration.redis or "")),
        "w@here",
        Supervisor(),
    )
    child.state, child.state_lock = {}, threading.Lock()
    child.report_state("busy", job="of yesterday")
    child.report_state("idle", job=None)
    child.registry.update("w@here", state="busy", job="of yesterday")  # as if the last write were lost
    thread = child.supervisor.thread("orders", child.obey)
    until(lambda: child.registry.workers()["w@here"]["state"] == "idle")
    child.supervisor.stop()
    child.registry.send("w@here", "end")  # it waits for an order
    thread.join(10)
    assert not thread.is_alive(), "it would take the orders of the next test"
    assert child.registry.workers()["w@here"]["job"] is None


def test_one_receiver_does_not_delay_or_stop_the_webhooks_of_others(
    configuration: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSE", 0.01)
    redis = RedisClient(configuration.redis or "")
    jobs = FleetJobs(configuration, redis, FileStore(Store.configured(), configuration.data / "f"), "v1" * 32)
    receivers = Receivers()
    created = []
    for host in ("slow", "broken", "good"):
        job = Job.of("ann", Settings(seed=1), webhook=f"https://{host}.test/hook", status=DONE)
        created.append(job)
        jobs.records.add(job)
        for event in ("start", "output", "completed"):
            jobs.records.hook(job, event)
            time.sleep(0.002)  # their order is by time

    async def work() -> None:
        maintenance = Maintenance(jobs, 2, receivers)
        task = asyncio.ensure_future(maintenance.send_webhooks())
        end = time.monotonic() + 5
        while len(receivers.got) < 3 and time.monotonic() < end:
            await asyncio.sleep(0.01)
        assert not task.done()
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(work())
    assert receivers.got == [(created[2].id, event) for event in ("start", "output", "completed")]
    jobs.close()
