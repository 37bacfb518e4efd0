"""Builds the ASGI application from its parts and runs the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import uvicorn
from prometheus_client import CollectorRegistry, disable_created_metrics
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from seesr.config import Configuration
from seesr.networks import weights
from seesr.serving import api, batches, health, openapi, pages, platforms, replicate, webhooks
from seesr.serving.access import Access, is_loopback
from seesr.serving.identity import make_private, read_secret
from seesr.serving.job import Job, Jobs
from seesr.serving.keys import Keys
from seesr.serving.local import FAILURE, LocalJobs
from seesr.serving.metadata_store import MetadataStore
from seesr.serving.middleware import Gate, Traffic, answer
from seesr.serving.models import Models
from seesr.serving.protocol import LimitedProtocol
from seesr.serving.refusal import CODE_OF_STATUS
from seesr.serving.service import Service
from seesr.serving.sqlite_store import SqliteStore
from seesr.serving.supervisor import Supervisor

if TYPE_CHECKING:
    from seesr.engine.engine import Engine

EXPIRY = 60.0  # seconds between two checks for expired jobs and files, at most
LAST_WEBHOOKS = 10.0  # seconds for which a stopping server still sends webhooks
log = logging.getLogger(__name__)


class WebhookSender:
    """Sends the message of one webhook, once the service is there."""

    service: Service
    base: str

    async def __call__(self, job: Job, event: str) -> bool:
        """Tells the job's webhook about the job; whether the receiver took it."""
        assert job.webhook
        content = replicate.prediction(self.service, self.base, job, whole=False)
        secret = self.service.webhook_secret(job.owner)
        local = self.service.configuration.local_webhooks
        return await webhooks.send_once(secret, job.webhook, f"{job.id}-{job.revision}-{event}", content, local)


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = CODE_OF_STATUS.get(error.status_code, "internal_error")
    return answer(code, error.detail or "there is no such route", dict(error.headers or {}))


class Parts(NamedTuple):
    """The job queue behind the routes, and the tasks that run beside it.

    Attributes:
        background: tasks by name, each of which runs until it is cancelled.
        drained: waits at the end, for that many seconds at most, until no webhook is unsent.
        collectors: metrics of the parts.
    """

    jobs: LocalJobs | Any
    store: MetadataStore
    secret: bytes
    background: dict[str, Callable[[], Coroutine[Any, Any, None]]]
    drained: Callable[[float], Coroutine[Any, Any, None]] | None = None
    collectors: tuple[Collector, ...] = ()


class Addition(NamedTuple):
    """Routes beside those of every server.

    Attributes:
        context: entered while the server runs.
    """

    routes: Sequence[Route] = ()
    context: Callable[[], contextlib.AbstractAsyncContextManager[None]] = contextlib.nullcontext


def load_engine(bundle: Path, device: str | None, rates: Path) -> Engine:
    """The engine of this process, which keeps its rates in a folder; its import loads torch."""
    from seesr.engine.engine import Engine

    return Engine.load(bundle, device, rates)


def has_room(bundle: Path, device: str | None, precision: str) -> bool:
    """Whether a bundle fits into the memory beside what this process holds."""
    from seesr.engine import preflight

    return preflight.has_room(bundle, device, precision)


def local(
    configuration: Configuration,
    load: Callable[[], Engine],
    bundle: Path,
    send_once: webhooks.Send,
    load_other: Callable[[Path], Engine] | None = None,
    fits: Callable[[Path], bool] = lambda bundle: True,
) -> Parts:
    """Images are made in this process.

    Args:
        load: makes the engine of the default bundle.
        load_other: makes that of a bundle of SEESR_BUNDLES; None: there are none.
        fits: whether a bundle fits into the memory beside what is loaded.
    """
    models = Models(bundle, configuration.bundles if load_other else "")
    journal = SqliteStore(configuration.data)
    try:
        known = models.by_version
        others = (
            {version: functools.partial(load_other, known[version].bundle) for version in known} if load_other else {}
        )
        jobs = LocalJobs(
            load, journal, configuration.max_queue, models.default.version, configuration.queue_share, others,
            lambda version: fits(known[version].bundle),
        )  # fmt: skip
        queue = webhooks.WebhookQueue(journal, send_once)
        secret, metrics = read_secret(configuration.data), (journal.seconds,)
        return Parts(jobs, journal, secret, {"webhooks": queue.run}, queue.drained, metrics)
    except BaseException:
        journal.close()
        raise


def all_routes() -> list[Route]:
    """The routes of the server."""
    return [
        *pages.ROUTES, *openapi.ROUTES, *health.ROUTES, *api.ROUTES, *batches.ROUTES, *replicate.ROUTES,
        *platforms.routes(),
    ]  # fmt: skip


def build(
    configuration: Configuration,
    base: str,
    bundle: Path,
    assemble: Callable[[webhooks.Send], Parts],
    addition: Addition = Addition(),  # noqa: B008
) -> Starlette:
    """The application.

    Args:
        base: the address that webhooks name where no public one is configured.
        bundle: whose version the API shows.
        assemble: makes the parts.
        addition: more routes.
    """
    sender, supervisor = WebhookSender(), Supervisor()
    jobs, store, secret, background, drained, collectors = assemble(sender)
    disable_created_metrics()
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    models = Models(bundle, configuration.bundles)
    service = Service(jobs, store, configuration, models, secret, supervisor, registry)
    sender.service, sender.base = service, (configuration.public_url or base).rstrip("/")

    async def housekeeping() -> None:
        while True:
            await asyncio.to_thread(store.expire, configuration.keep * 3600)
            await asyncio.sleep(min(EXPIRY, max(1.0, configuration.keep * 1800)))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        jobs.start(supervisor)
        named = {"housekeeping": housekeeping, **background}
        tasks = [asyncio.ensure_future(supervisor.run(name, work)) for name, work in named.items()]
        async with addition.context():
            yield
        supervisor.stop()
        stop_by = getattr(app.state, "stop_by", None)  # set by the signal
        await asyncio.to_thread(jobs.close, None if stop_by is None else max(0.0, stop_by - time.monotonic()))
        if drained is not None:
            await drained(LAST_WEBHOOKS)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=10)
        store.close()

    routes = [*all_routes(), *addition.routes]
    scrape = configuration.metrics_token.get_secret_value()
    access = Access(Keys(configuration), routes, configuration.platform, configuration.public_url, os.environ, scrape)
    gate = Middleware(
        Gate, access=access, per_minute=configuration.rate, closing=lambda: jobs.closing, traffic=Traffic(registry)
    )
    app = Starlette(routes=routes, middleware=[gate], lifespan=lifespan, exception_handlers={HTTPException: refused})
    app.state.service = service
    return app


class Server(uvicorn.Server):
    """Stops taking work at the signal, not when the last connection is closed."""

    app: Starlette
    jobs: Jobs
    limit: float  # seconds from the signal to the end

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends in order, with exit code 0; uvicorn's own would raise the signal again at the end."""
        if not self.should_exit:
            self.app.state.stop_by = time.monotonic() + self.limit
        self.jobs.stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(
    configuration: Configuration,
    host: str,
    port: int,
    bundle: Path | None,
    device: str | None,
    fleet: Callable[[Configuration, Path, webhooks.Send], Parts] | None = None,
    addition: Addition = Addition(),  # noqa: B008
) -> int:
    """Runs the server until a signal stops it; returns the exit code.

    Args:
        fleet: makes the parts of a gateway; None: images are made in this process.
        addition: more routes.

    Raises:
        ValueError: other machines could reach it without keys, or the port is in use; one line.
    """
    keys = Keys(configuration)
    if not keys and not configuration.platform and not is_loopback(host):
        remedy = "set SEESR_API_KEYS or SEESR_KEYS_FILE, or use --host 127.0.0.1"
        raise ValueError(f"--host {host} can be reached from outside: {remedy}")
    if configuration.local_webhooks and not is_loopback(host):
        raise ValueError("SEESR_LOCAL_WEBHOOKS is for a server on this machine: unset it, or use --host 127.0.0.1")
    if not keys and not configuration.platform:
        log.warning("SEESR_API_KEYS is not set: every user of this machine can use the server")
    path = bundle or configuration.weights or weights.locate()
    make_private(configuration.data)
    chosen = device or configuration.device

    def load_other(bundle: Path) -> Engine:
        return load_engine(bundle, device, configuration.data / "rates")

    def load() -> Engine:
        try:
            return load_other(path)
        except Exception:
            server.should_exit = not jobs.loaded  # it would never be ready
            raise

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # who reads the address below may ask at once
    except OSError as error:
        listener.close()
        raise ValueError(f"--port {port} cannot be used: {error.strerror}") from error
    base = f"http://{host}:{listener.getsockname()[1]}"
    app = build(
        configuration,
        base,
        path,
        lambda send: (
            fleet(configuration, path, send)
            if fleet
            else local(
                configuration,
                load,
                path,
                send,
                load_other,
                lambda bundle: has_room(bundle, chosen, configuration.precision),
            )
        ),
        addition,
    )
    options: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False, "date_header": False}
    limit = configuration.shutdown
    server = Server(
        uvicorn.Config(app, http=LimitedProtocol, ws="none", timeout_graceful_shutdown=max(1, int(limit)), **options)
    )
    server.app, server.jobs, server.limit = app, (jobs := app.state.service.jobs), limit
    print(f"seesr at {base}/", flush=True)
    server.run(sockets=[listener])
    return 3 if (server.jobs.ready() or "").startswith(FAILURE) else 0
