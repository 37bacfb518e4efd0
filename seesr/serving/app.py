"""Puts the server together and runs it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

from seesr.config import Configuration
from seesr.networks import weights
from seesr.serving import api, batches, health, openapi, platforms, replicate, webhooks
from seesr.serving.identity import read_secret, version_of
from seesr.serving.job import Job, Jobs
from seesr.serving.local import FAILURE, LocalJobs
from seesr.serving.metadata_store import Ledger
from seesr.serving.middleware import Gate, answer, read_keys
from seesr.serving.service import Service
from seesr.serving.sqlite_store import Journal

if TYPE_CHECKING:
    from seesr.engine.engine import Engine

PAGE = Path(__file__).parent / "page"
LOOPBACK = {"127.0.0.1", "::1", "localhost"}
EXPIRY = 60.0  # seconds between two looks for what has expired
log = logging.getLogger(__name__)


class Teller:
    """Sends webhooks of jobs, in their order, from the server's event loop."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None
        self.tasks: set[asyncio.Task[bool]] = set()
        self.latest: dict[str, float] = {}
        self.service: Service | None = None
        self.base = ""

    def __call__(self, job: Job, event: str) -> None:
        """Called on the worker's thread."""
        if not job.webhook or event not in (job.events or webhooks.EVENTS) or self.loop is None or self.service is None:
            return
        now = time.monotonic()
        if event == "logs" and now - self.latest.get(job.id, 0) < webhooks.OFTEN:
            return
        self.latest[job.id] = now
        if job.ended:
            self.latest.pop(job.id, None)
        self.loop.call_soon_threadsafe(self.begin, dataclasses.replace(job), event)

    def begin(self, job: Job, event: str) -> None:
        task = asyncio.ensure_future(self.send(job, event))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def send(self, job: Job, event: str) -> bool:
        """Tells the job's webhook how it stands; whether that was taken."""
        assert self.service is not None and job.webhook
        content = replicate.prediction(self.service, self.base, job, whole=False)
        return await webhooks.send(self.service.secret, job.webhook, f"{job.id}-{job.revision}-{event}", content)


async def page(request: Request) -> Response:
    return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY})


async def asset(request: Request) -> Response:
    return FileResponse(PAGE / request.url.path.removeprefix("/"))


POLICY = "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; frame-ancestors 'none'"


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return answer(error.status_code, error.detail or "there is nothing here", dict(error.headers or {}))


class Parts(NamedTuple):
    """What makes the pictures behind the routes, and what has to run beside them.

    Attributes:
        beside: runs while the server runs, until it is cancelled; it is given the sender of webhooks.
    """

    jobs: LocalJobs | Any
    ledger: Ledger
    secret: bytes
    beside: Callable[[webhooks.Send], Coroutine[Any, Any, None]] | None = None


def local(configuration: Configuration, load: Callable[[], Engine], teller: Teller) -> Parts:
    """Pictures are made in this process."""
    journal = Journal(configuration.data)
    jobs = LocalJobs(load, journal, configuration.max_queue, teller)
    return Parts(jobs, journal, read_secret(configuration.data))


def build(configuration: Configuration, base: str, bundle: Path, assemble: Callable[[Teller], Parts]) -> Starlette:
    """The application.

    Args:
        base: the address that webhooks name where no public one is configured.
        bundle: whose version the API shows.
        assemble: makes the parts.
    """
    teller = Teller()
    jobs, ledger, secret, beside = assemble(teller)
    made = (bundle / weights.MANIFEST).stat().st_mtime
    service = Service(jobs, ledger, configuration, version_of(bundle), secret, made)
    teller.service, teller.base = service, (configuration.public_url or base).rstrip("/")

    async def housekeeping() -> None:
        while True:
            await asyncio.to_thread(ledger.expire, configuration.keep * 3600)
            await asyncio.sleep(EXPIRY)

    @contextlib.asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        teller.loop = asyncio.get_running_loop()
        jobs.start()
        tasks = [asyncio.ensure_future(housekeeping())]
        if beside is not None:
            tasks.append(asyncio.ensure_future(beside(teller.send)))
        yield
        await asyncio.to_thread(jobs.close)
        for task in tasks:
            task.cancel()
        if teller.tasks:
            await asyncio.wait(teller.tasks, timeout=10)
        ledger.close()

    assets = [Route(f"/{name}", asset) for name in ("page.css", "page.js")]
    routes = [
        Route("/", page), *assets, *openapi.ROUTES, *health.ROUTES, *api.ROUTES, *batches.ROUTES,
        *replicate.ROUTES, *platforms.routes(),
    ]  # fmt: skip
    keys = read_keys(configuration.api_keys.get_secret_value())
    gate = Middleware(Gate, keys=keys, per_minute=configuration.rate)
    app = Starlette(routes=routes, middleware=[gate], lifespan=life, exception_handlers={HTTPException: refused})
    app.state.service = service
    return app


class Server(uvicorn.Server):
    """Stops taking work at the signal, not when the last connection is closed."""

    jobs: Jobs

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends in order, with exit code 0; uvicorn's own would raise the signal again at the end."""
        self.jobs.stop()
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True


def serve(
    configuration: Configuration,
    host: str,
    port: int,
    bundle: Path | None,
    device: str | None,
    fleet: Callable[[Configuration, Path], Parts] | None = None,
) -> int:
    """Runs the server until it is told to stop; returns the exit code.

    Args:
        fleet: makes the parts of a gateway; None: pictures are made in this process.

    Raises:
        ValueError: it would be open to everybody, or the port is taken; one line.
    """
    keys = read_keys(configuration.api_keys.get_secret_value())
    if not keys and host not in LOOPBACK:
        raise ValueError(f"--host {host} can be reached from outside: set SEESR_API_KEYS, or stay at 127.0.0.1")
    if not keys:
        log.warning("no SEESR_API_KEYS: everybody on this machine may use the server")
    path = bundle or configuration.weights or weights.locate()

    def load() -> Engine:
        from seesr.engine.engine import Engine

        try:
            return Engine.load(path, device)
        except Exception:
            server.should_exit = True  # it would never be ready
            raise

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)  # who reads the address below may ask at once
    except OSError as error:
        raise ValueError(f"--port {port} cannot be used: {error.strerror}") from error
    base = f"http://{host}:{listener.getsockname()[1]}"
    app = build(
        configuration,
        base,
        path,
        lambda teller: fleet(configuration, path) if fleet else local(configuration, load, teller),
    )
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, server_header=False, date_header=False))
    server.jobs = app.state.service.jobs
    print(f"seesr at {base}/", flush=True)
    server.run(sockets=[listener])
    return 3 if (server.jobs.ready() or "").startswith(FAILURE) else 0
