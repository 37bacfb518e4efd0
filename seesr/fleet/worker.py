"""One GPU's worker: a Celery parent that keeps the lease, and a child process that runs the engine.

    seesr worker        starts it

The child loads the engine once. A job is started at most three times, and not again once it has
ended. Its output is written once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from celery import signals

from seesr import logs
from seesr.config import Configuration
from seesr.fleet.broker import TASK, application, queues_of
from seesr.fleet.file_store import FileStore
from seesr.fleet.job_store import ATTEMPTS, JobStore
from seesr.fleet.lease import Lease
from seesr.fleet.redis_client import RedisClient
from seesr.fleet.tile_exchange import FleetTiles, TileTaker, kind_of
from seesr.fleet.worker_registry import WorkerRegistry
from seesr.networks import weights
from seesr.object_store import Store
from seesr.runtime.owner import image_of
from seesr.serving.identity import make_private, version_of
from seesr.serving.job import CANCELED, DONE, FAILED, Job, Unavailable
from seesr.serving.reporter import Canceled, Reporter
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

T = TypeVar("T")
LONGEST_PAUSE = 5.0  # seconds between two tries of the store
REPORT_INTERVAL = 0.5  # seconds between two reports of one stage
LONGEST_TRIM = 60.0  # seconds between two looks for old files on this machine
log = logging.getLogger(__name__)

configuration = Configuration.read()
version = version_of(configuration.weights or weights.locate())
app = application(configuration, [version], publishes=False)
app.steps["consumer"].add(Lease)  # pyright: ignore[reportOptionalSubscript]
app.conf.imports = [__name__]  # a spawned child begins with these


def load() -> Any:
    """The engine of this worker's child."""
    from seesr.engine.engine import Engine

    return Engine.load()


class Child:
    """State of the process that computes, from its start to its end.

    Attributes:
        tiles: shares the tiles of this worker's images; None: they are not shared.
    """

    tiles: FleetTiles | None = None

    def __init__(self, engine_of: Callable[[], Any]) -> None:
        redis = RedisClient(configuration.redis or "", retry=True)
        self.records = JobStore(redis, configuration.keep * 3600)
        self.objects = FileStore(Store.configured(), configuration.data / "worker")
        self.registry = WorkerRegistry(redis)
        self.name = configuration.worker_name or ""
        self.state: dict[str, Any] = {"child": os.getpid()}
        self.state_lock = threading.Lock()
        self.supervisor = Supervisor()
        self.report_state("loading", job=None)  # of a child before, which was killed
        self.engine = engine_of()
        bundle, rates = self.engine.loaded, self.engine.rates.state()
        self.report_state("idle", bundle=bundle.name, bundle_sha256=bundle.digest, rates=rates)
        if configuration.share_tiles:
            self.tiles = self.shared_tiles(redis)
        self.supervisor.thread("orders", self.obey)
        self.supervisor.thread("cache", self.trim)

    def shared_tiles(self, redis: RedisClient) -> FleetTiles:
        """Shares tiles with the workers of the same kind, in both directions."""
        kind = kind_of(version, self.engine.machine)
        TileTaker(redis, self.objects, self.supervisor, self.engine, kind)
        pool = FleetTiles(redis, self.objects, self.supervisor, self.name, kind)
        self.engine.share_tiles(pool)
        self.report_state(tiles=kind)
        return pool

    def report_state(self, state: str | None = None, **more: Any) -> None:
        """Writes the state of this worker; None: the latest again, which a Redis that was restarted may have lost."""
        with self.state_lock:
            self.state |= more if state is None else {"state": state, **more}
            self.state["child_failures"] = {name: task.failures for name, task in self.supervisor.tasks.items()}
            self.registry.update(self.name, **self.state)

    def obey(self) -> None:
        """Unloads and loads the engine on command (seesr fleet unload | load), and repeats the worker's state."""
        while not self.supervisor.stopping.is_set():
            order = self.registry.order(self.name)
            if order is None:
                self.report_state()
            if order == "unload":
                self.engine.unload()
                self.report_state("unloaded")
            elif order == "load":
                self.report_state("loading")
                try:
                    self.engine.reload()
                    if self.tiles is not None:
                        self.engine.share_tiles(self.tiles)
                except Exception as error:
                    self.report_state("failed", error=f"{type(error).__name__}: {error}")
                    raise
                self.report_state("idle", error=None)

    def trim(self) -> None:
        """Removes the inputs of runs that were killed, or whose job had ended meanwhile, after SEESR_KEEP hours."""
        keep = configuration.keep * 3600
        while not self.supervisor.stopping.wait(min(LONGEST_TRIM, keep / 2)):
            self.objects.trim(keep)

    def make(self, id: str) -> None:
        """Runs one job and stores its result or error."""
        attempt = self.records.begin(id)
        if not attempt.isdigit():
            log.info("%(event)s", {"event": f"not started: {attempt}", "job": id, "worker": self.name})
            return
        job = self.records.find(id)
        if job is None:
            return
        if job.cancel:
            self.end(job, CANCELED)
        elif int(attempt) > ATTEMPTS:
            self.end(job, FAILED, error=f"the worker died {ATTEMPTS} times on this image")
        else:
            self.report_state("busy", job=id)
            self.records.hook(job, "start")
            try:
                self.run(job)
            finally:
                self.report_state("idle", job=None, rates=self.engine.rates.state())
        log.info("%(event)s", {"event": job.status, "job": id, "worker": self.name, "attempt": int(attempt)})

    def run(self, job: Job) -> None:
        def report() -> None:
            names = ("stage", "done", "total", "progress", "seconds_left", "logs")
            values = {name: getattr(job, name) for name in names}
            self.records.report(job, **values)
            self.records.hook(job, "logs")

        settings = Settings(**job.settings)
        name = f"{job.id}.{settings.suffix}"
        try:
            job.progress, job.seconds_left = 0.0, None  # of an earlier attempt
            report()
            source = self.until_stored(lambda: self.objects.get(f"in/{job.id}"))
            mask = self.until_stored(lambda: self.objects.get(f"in/{job.id}-mask")) if job.masked else None
            if self.tiles is not None:
                self.tiles.job = job.id
            with image_of(job.owner):
                output = self.engine.run(source, settings, job.limit, (Reporter(job, report, REPORT_INTERVAL),), mask)
            self.until_stored(lambda: self.objects.put(f"out/{name}", output.data, once=True))
            self.end(job, DONE, output=name, metrics=output.metrics, logs=job.logs)
        except Canceled:
            self.end(job, CANCELED)
        except FileNotFoundError:
            self.end_without_input(job, name)
        except Unavailable as error:
            self.end_without_store(job, error)
        except (ValueError, RuntimeError) as error:
            self.end(job, FAILED, error=str(error))
            if not self.engine.healthy():
                log.error("the device has failed; the worker exits so that it is started again")
                os.kill(os.getppid(), signal.SIGTERM)
        except Exception:
            log.exception("job %s", job.id)
            self.end(job, FAILED, error="internal error; see the worker's log")
        finally:
            if self.tiles is not None:
                self.tiles.end_job()

    def end_without_input(self, job: Job, name: str) -> None:
        """Ends a job whose input is gone: done if its result is there, because Redis lost its last writes."""
        try:
            done = self.until_stored(lambda: self.objects.exists(f"out/{name}"))
        except Unavailable as error:
            self.end_without_store(job, error)
            return
        if done:
            self.end(job, DONE, output=name)
        else:
            self.end(job, FAILED, error="the image has expired; send it again")

    def end_without_store(self, job: Job, error: Unavailable) -> None:
        reason = f"{error} ({configuration.store}) for {configuration.store_retry:g} s"
        self.end(job, FAILED, error=f"{reason}; send the image again, or raise SEESR_STORE_RETRY")

    def until_stored(self, work: Callable[[], T]) -> T:
        """work(), tried again with longer and longer pauses while the store is unavailable.

        Raises:
            Unavailable: it was unavailable for longer than SEESR_STORE_RETRY.
        """
        end, pause = time.monotonic() + configuration.store_retry, 0.25
        while True:
            try:
                return work()
            except Unavailable:
                if time.monotonic() + pause > end:
                    raise
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)

    def end(self, job: Job, status: str, **values: Any) -> None:
        """Only the first end counts: a second run of the same job changes nothing."""
        job.status = status
        if self.records.end(job.id, status, **values) is None:
            self.objects.forget_inputs(job)
            return
        for event in ("output", "completed") if status == DONE else ("completed",):
            self.records.hook(job, event)
        try:
            self.objects.drop_inputs(job)
        except Unavailable as error:  # they are removed with the record
            log.warning("job %s: inputs not removed; they are kept until the job expires: %s", job.id, error)


child: Child | None = None


@signals.worker_process_init.connect
def start_child(**_: Any) -> None:
    """Loads the engine before the first job; a child that cannot ends its worker with the reason in its log."""
    global child
    logs.configure(configuration.log_format)
    try:
        child = Child(load)
    except Exception:  # anything at all: a worker without an engine must not take jobs
        log.exception("the engine cannot be loaded; the worker exits")
        os.kill(os.getppid(), signal.SIGTERM)
        raise


@signals.worker_shutdown.connect
def leave(**_: Any) -> None:
    """The parent has shut down cleanly: its lease is released at once."""
    WorkerRegistry(RedisClient(configuration.redis or "")).leave(configuration.worker_name or "")


# Celery runs a task whose process was killed again after this delay (seconds), 180 by default.
@app.task(name=TASK, max_retries=2, default_retry_delay=1)  # pyright: ignore[reportUntypedFunctionDecorator]
def upscale(id: str) -> None:
    """Makes the image of a job."""
    assert child is not None
    child.make(id)


def run(module: str = __name__) -> None:
    """Becomes the worker's parent process.

    Raises:
        ValueError: the fleet is not configured, or the clock is wrong; one line.
    """
    make_private(configuration.data)
    Store.configured()
    RedisClient(configuration.redis or "").check_at_start()
    place = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(",", "-")
    name = configuration.worker_name or f"{f'gpu{place}' if place else 'cpu'}-{os.getpid()}@{os.uname()[1]}"
    os.environ["SEESR_WORKER_NAME"] = name  # for the child
    arguments = ["-A", module, "worker", "-n", name, "-Q", ",".join(queues_of(version)), "--loglevel", "INFO"]
    os.execv(sys.executable, [sys.executable, "-m", "celery", *arguments, "--without-gossip", "--without-mingle"])
