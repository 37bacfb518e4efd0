"""The process of a worker that computes, with an engine that does what a test asks for, on real Redis."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import signals

from seesr.config import Configuration
from seesr.engine.rates import Rates
from seesr.fleet import worker
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import EXPIRY, HOOKS, RUNNING, WAITING, JobStore
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.tile_exchange import FleetTiles, kind_of
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.networks.weights import Bundle
from seesr.runtime.owner import current_owner
from seesr.runtime.progress import Position
from seesr.serving.job import CANCELED, DONE, FAILED, Job, Unavailable
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

METRICS = {
    "seconds": {"denoise": 0.5}, "tiles": 1, "steps": 1, "out_of_memory_retries": 0, "float32_retries": 0,
    "output_size": "2000x1000",
}  # fmt: skip
POSITIONS = [Position("denoise", done, 2, done / 2, 1.0 - done / 2) for done in range(3)]


class Engine:
    """Stands for an Engine.

    Args:
        work: called with the watchers in the middle of a run.
        well: whether the device works.
    """

    loaded = Bundle(Path(), "echo", "pocket", "none", {})
    machine = "AVX2, 1 threads"

    def __init__(self, work: Callable[[tuple[Any, ...]], None] | None = None, well: bool = True) -> None:
        self.work, self.well, self.rates = work, well, Rates()
        self.runs: list[dict[str, Any]] = []
        self.calls: list[Any] = []

    def run(self, data: Path, settings: Settings, deadline: Any, watchers: tuple[Any, ...], mask: Path | None) -> Any:
        read = mask.read_bytes() if mask else None
        owner = current_owner.get()
        self.runs.append({"data": data.read_bytes(), "mask": read, "owner": owner, "deadline": deadline})
        assert 0 < watchers[0].interval <= 1, "a person sees it move"
        for position in POSITIONS:
            watchers[0](position)
        if self.work is not None:
            self.work(watchers)
        return SimpleNamespace(data=b"result", metrics=METRICS)

    def healthy(self) -> bool:
        return self.well

    def unload(self) -> None:
        self.calls.append("unload")

    def reload(self) -> None:
        self.calls.append("reload")

    def share_tiles(self, pool: FleetTiles) -> None:
        self.calls.append(pool)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the background threads, which are not started."""
    names: list[str] = []
    monkeypatch.setattr(Supervisor, "thread", lambda supervisor, name, work: names.append(name))
    yield names


@pytest.fixture
def configured(configuration: Configuration, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the configuration of the worker module."""

    def set_values(**values: Any) -> None:
        monkeypatch.setattr(worker, "configuration", configuration.model_copy(update=values))

    set_values()
    return set_values


@pytest.fixture
def start(configured: Callable[..., None], threads: list[str]) -> Callable[..., worker.Child]:
    """Starts a child with an engine."""

    def started(engine: Engine | None = None) -> worker.Child:
        return worker.Child(lambda: engine or Engine())

    return started


@pytest.fixture
def store(redis: RedisClient) -> JobStore:
    return JobStore(redis, 3600)


def queued(store: JobStore, objects: FileStore, mask: bytes | None = None, **values: Any) -> Job:
    """A new job with its files in the object store."""
    job = Job.of("ann", Settings(seed=1), webhook="https://a.test/", masked=mask is not None, **values)
    objects.put(f"in/{job.id}", b"image")
    if mask is not None:
        objects.put(f"in/{job.id}-mask", mask)
    store.add(job)
    return job


def found(store: JobStore, job: Job) -> Job:
    result = store.find(job.id)
    assert result is not None
    return result


def events(redis: RedisClient, job: Job) -> list[str]:
    """The webhooks of a job that wait, oldest first."""
    hooks = [hook.split(" ") for hook in redis.client.zrange(HOOKS, 0, -1)]
    return [event for id, event in hooks if id == job.id]


def test_a_job_is_run_from_its_record_to_its_result(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore, redis: RedisClient
) -> None:
    engine = Engine()
    states: list[Any] = []
    child = start(engine)
    engine.work = lambda watchers: states.append(child.registry.workers()["w@here"])
    job = queued(store, objects, b"mask", deadline=100.0)
    child.make(job.id)
    done = found(store, job)
    assert (done.status, done.output, done.metrics, done.attempts) == (DONE, f"{job.id}.png", METRICS, 1)
    assert (done.stage, done.done, done.total, done.progress, done.seconds_left) == ("denoise", 2, 2, 1.0, 0.0)
    assert done.started and done.completed and done.created <= done.started <= done.completed
    assert done.logs.splitlines()[-1] == "100%|##########| 2/2 [denoise]"
    assert objects.read(f"out/{done.output}") == b"result"
    (run,) = engine.runs
    assert (run["data"], run["mask"], run["owner"]) == (b"image", b"mask", "ann")
    assert 90 < run["deadline"].end - time.monotonic() <= 100
    assert not objects.exists(f"in/{job.id}") and not objects.exists(f"in/{job.id}-mask")
    assert not list(child.objects.cache.iterdir())
    assert sorted(events(redis, job)) == ["completed", "logs", "output", "start"]
    assert not redis.client.zcard(WAITING) and not redis.client.zcard(RUNNING)
    assert [(state["state"], state["job"]) for state in states] == [("busy", job.id)]
    after = child.registry.workers()["w@here"]
    assert (after["state"], after["job"], after["bundle"], after["child"]) == ("idle", None, "echo", os.getpid())
    assert len(after["bundle_sha256"]) == 64 and child.registry.rates(["w@here"]) == [engine.rates.state()]
    assert redis.client.zscore(EXPIRY, f"job:{job.id}") > time.time() + 3000


def test_a_child_says_that_it_loads_before_it_is_ready(
    start: Callable[..., worker.Child], threads: list[str], redis: RedisClient
) -> None:
    registry, states = WorkerRegistry(redis), []
    registry.update("w@here", state="busy", job="of a child that was killed")

    def load() -> Engine:
        states.append(registry.workers()["w@here"])
        return Engine()

    worker.Child(load)
    assert (states[0]["state"], states[0]["job"]) == ("loading", None)
    assert registry.workers()["w@here"]["state"] == "idle" and threads == ["orders", "cache"]


def test_a_canceled_or_ended_job_is_not_run(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore
) -> None:
    engine = Engine()
    child = start(engine)
    canceled, ended, gone = (queued(store, objects) for _ in range(3))
    store.update(canceled.id, cancel=True)
    store.end(ended.id, FAILED, error="of an earlier run")
    store.forget(gone.id)
    for job in (canceled, ended, gone):
        child.make(job.id)
    assert not engine.runs and found(store, canceled).status == CANCELED
    assert found(store, ended).error == "of an earlier run" and store.find(gone.id) is None


def test_an_image_that_kills_its_worker_is_started_three_times(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore
) -> None:
    def kill(watchers: tuple[Any, ...]) -> None:
        raise KeyboardInterrupt

    child = start(Engine(kill))
    job = queued(store, objects)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            child.make(job.id)
    assert found(store, job).status == "processing"
    child.make(job.id)
    assert (found(store, job).status, found(store, job).error) == (FAILED, "the worker died 3 times on this image")
    assert len(child.engine.runs) == 3


@pytest.mark.parametrize(
    ("error", "well", "message", "kills"),
    [
        (ValueError("the image is damaged"), True, "the image is damaged", 0),
        (RuntimeError("out of memory"), True, "out of memory", 0),
        (RuntimeError("CUDA error"), False, "CUDA error", 1),
        (LookupError("broken on purpose"), True, "internal error; see the worker's log", 0),
    ],
    ids=["value", "runtime", "device", "other"],
)
def test_an_error_fails_the_job_and_a_failed_device_ends_the_worker(
    error: Exception, well: bool, message: str, kills: int, start: Callable[..., worker.Child], store: JobStore,
    objects: FileStore, redis: RedisClient, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def fail(watchers: tuple[Any, ...]) -> None:
        raise error

    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
    child = start(Engine(fail, well))
    job = queued(store, objects)
    child.make(job.id)
    assert (found(store, job).status, found(store, job).error) == (FAILED, message)
    assert killed == [(os.getppid(), signal.SIGTERM)] * kills
    assert child.registry.workers()["w@here"]["state"] == "idle"
    assert "completed" in events(redis, job) and "output" not in events(redis, job)


def test_a_running_job_that_is_canceled_ends_at_its_next_tile(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore
) -> None:
    job = queued(store, objects)

    def cancel(watchers: tuple[Any, ...]) -> None:
        store.update(job.id, cancel=True)
        watchers[0](Position("decode", 0, 2))  # writes the report that reads the cancellation
        watchers[0](Position("decode", 1, 2))
        pytest.fail("the run goes on")

    start(Engine(cancel)).make(job.id)
    assert found(store, job).status == CANCELED and not objects.exists(f"in/{job.id}")


def test_a_second_run_of_an_ended_job_changes_nothing_but_its_own_disk(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore, redis: RedisClient
) -> None:
    job = queued(store, objects, b"mask")
    child = start(Engine(lambda watchers: store.end(job.id, FAILED, error="by another worker") and None))
    child.make(job.id)
    assert (found(store, job).status, found(store, job).error) == (FAILED, "by another worker")
    assert objects.exists(f"in/{job.id}"), "it belongs to the worker that has ended the job"
    assert not list(child.objects.cache.iterdir()) and "completed" not in events(redis, job)


def test_inputs_that_the_store_does_not_remove_do_not_fail_the_job(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(job: Job) -> None:
        raise Unavailable("the object store is unavailable")

    child, job = start(), queued(store, objects)
    monkeypatch.setattr(child.objects, "drop_inputs", away)
    child.make(job.id)
    assert found(store, job).status == DONE


def test_the_first_result_of_a_job_is_kept(
    start: Callable[..., worker.Child], store: JobStore, objects: FileStore
) -> None:
    job = queued(store, objects)
    objects.put(f"out/{job.id}.png", b"of the first run")
    start().make(job.id)
    assert found(store, job).status == DONE and objects.read(f"out/{job.id}.png") == b"of the first run"


def test_the_store_is_tried_with_longer_and_longer_pauses(
    start: Callable[..., worker.Child], configured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configured(store_retry=30.0)
    child, now, pauses = start(), [0.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    def away() -> None:
        raise Unavailable("the object store is unavailable")

    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with pytest.raises(Unavailable):
        child.until_stored(away)
    first = pauses[0]
    assert 0 < first < 0.5 and pauses == [min(first * 2**number, 5.0) for number in range(len(pauses))]
    assert 30 - 5 < sum(pauses) <= 30


def test_a_store_that_is_away_for_too_long_fails_the_job(
    start: Callable[..., worker.Child], configured: Callable[..., None], store: JobStore, objects: FileStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Also where the input is gone, and the worker asks for an earlier result."""
    configured(store_retry=0.0, store="s3://images")
    child = start()

    def away(name: str) -> None:
        raise Unavailable("the object store is unavailable")

    monkeypatch.setattr(child.objects, "exists", away)
    job = queued(store, objects)
    objects.drop_inputs(job)
    child.make(job.id)
    message = "the object store is unavailable (s3://images) for 0 s; send the image again, or raise SEESR_STORE_RETRY"
    assert (found(store, job).status, found(store, job).error) == (FAILED, message)


def test_orders_unload_and_load_the_engine(start: Callable[..., worker.Child], redis: RedisClient) -> None:
    engine, states = Engine(), []
    child = start(engine)
    child.tiles = pool = FleetTiles(redis, child.objects, child.supervisor, "w@here", "kind")
    orders = iter([None, "unload", "load", "of tomorrow"])

    def order(name: str) -> str | None:
        states.append(child.registry.workers()[name]["state"])
        result = next(orders, "")
        if result == "":
            child.supervisor.stop()
        if result is None:
            child.registry.update(name, state="lost")
        return result

    child.registry.order = order  # type: ignore[method-assign]
    child.obey()
    assert engine.calls == ["unload", "reload", pool]
    assert states == ["idle", "idle", "unloaded", "idle", "idle"]


def test_a_worker_that_shares_tiles_says_so_and_ends_each_job(
    start: Callable[..., worker.Child], configured: Callable[..., None], store: JobStore, objects: FileStore,
    threads: list[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    configured(share_tiles=True)
    engine, jobs = Engine(), []
    child = start(engine)
    pool = child.tiles
    assert pool is not None and engine.calls == [pool] and pool.worker == "w@here"
    assert child.registry.workers()["w@here"]["tiles"] == pool.kind == kind_of(worker.version, engine.machine)
    assert {"tiles of others", "tile leases"} < set(threads)
    job = queued(store, objects)
    engine.work = lambda watchers: jobs.append(pool.job)
    monkeypatch.setattr(pool, "end_job", lambda: jobs.append("ended"))
    child.make(job.id)
    assert jobs == [job.id, "ended"] and found(store, job).status == DONE


@pytest.mark.parametrize(("hours", "seconds"), [(24.0, 60.0), (0.01, 18.0)])
def test_the_disk_of_a_worker_is_cleaned_every_minute_or_more_often(
    hours: float, seconds: float, start: Callable[..., worker.Child], configured: Callable[..., None]
) -> None:
    child, waited, removed = start(), [], []
    configured(keep=hours)

    def wait(pause: float) -> bool:
        waited.append(pause)
        return len(waited) > 2

    child.supervisor.stopping = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    child.objects.trim = removed.append  # type: ignore[method-assign]
    child.trim()
    assert waited == [seconds] * 3 and removed == [hours * 3600] * 2


def test_a_child_that_cannot_load_ends_its_worker(
    configured: Callable[..., None], threads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
    monkeypatch.setattr(worker.logs, "configure", lambda log_format: None)
    monkeypatch.setattr(worker, "child", None)
    monkeypatch.setattr(worker, "load", Engine)
    signals.worker_process_init.send(sender=None)
    child: Any = worker.child  # type: ignore[unreachable]
    assert isinstance(child.engine, Engine) and not killed
    ran: list[str] = []
    monkeypatch.setattr(child, "make", ran.append)
    worker.upscale("a job")
    assert ran == ["a job"]

    def fail() -> Engine:
        raise OSError("no weights")

    monkeypatch.setattr(worker, "load", fail)
    with pytest.raises(OSError, match="no weights"):
        worker.start_child()
    assert killed == [(os.getppid(), signal.SIGTERM)]


def test_a_worker_that_shuts_down_leaves_the_registry(configured: Callable[..., None], redis: RedisClient) -> None:
    registry = WorkerRegistry(redis)
    registry.update("w@here", state="idle")
    signals.worker_shutdown.send(sender=None)
    assert registry.workers() == {}


@pytest.mark.parametrize(
    ("visible", "given", "name"),
    [(None, None, "cpu-{process}@{host}"), ("0,1", None, "gpu0-1-{process}@{host}"), ("2", "big@here", "big@here")],
)
def test_a_worker_is_named_after_its_gpu_its_process_and_its_host(
    visible: str | None, given: str | None, name: str, configured: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    configured(worker_name=given)
    monkeypatch.setenv("SEESR_WORKER_NAME", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(worker, "make_private", lambda folder: None)
    worker.run("lab.fleet.echo")
    ((program, arguments),) = started
    expected = name.format(process=os.getpid(), host=os.uname()[1])
    assert program == arguments[0] == sys.executable and os.environ["SEESR_WORKER_NAME"] == expected
    assert arguments[1:8] == ["-m", "celery", "-A", "lab.fleet.echo", "worker", "-n", expected]
    assert arguments[8] == "-Q" and arguments[9].split(",") == worker.queues_of(worker.version)
    assert {"--without-gossip", "--without-mingle"} < set(arguments)
