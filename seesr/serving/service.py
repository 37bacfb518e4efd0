"""The `Service` that all routes share: submits requests as jobs and waits for their results."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from seesr.config import Configuration
from seesr.images import limits
from seesr.images.formats import MEDIA_TYPES
from seesr.images.mask import check_aspect
from seesr.images.read import open_header, read_file
from seesr.serving.identity import derived
from seesr.serving.job import CANCELED, PRIORITIES, WAITING, Job, Jobs
from seesr.serving.keys import Key, today
from seesr.serving.metadata_store import MetadataStore
from seesr.serving.middleware import key_of, owner
from seesr.serving.models import Models
from seesr.serving.refusal import Refused
from seesr.serving.supervisor import Supervisor
from seesr.serving.uploads import Stored, Uploaded
from seesr.settings import Settings
from seesr.settings.validation import FieldError

HEADER_SECONDS = 10.0  # that reading the header of an image may take
HEADER_READERS = ThreadPoolExecutor(4, "image-header")
POLL = 0.25  # seconds between two looks whether the caller is still there
LINK_SECONDS = 3600  # that a link to a result is good for


@dataclasses.dataclass(frozen=True)
class Service:
    """One server.

    Attributes:
        models: the bundles by the names and versions of Replicate's API.
        secret: the keys of links and webhooks are derived from it.
        supervisor: runs the background tasks.
        registry: metrics that the parts of this process count themselves.
    """

    jobs: Jobs
    store: MetadataStore
    configuration: Configuration
    models: Models
    secret: bytes
    supervisor: Supervisor
    registry: CollectorRegistry

    def ready(self) -> str | None:
        """None if images can be upscaled and every background task runs, else why not, in one line."""
        return self.jobs.ready() or self.supervisor.down()

    def part(self, request: Request) -> Path:
        """A new path for an incoming file. A file that is still there at the end of the request is removed."""
        path = self.store.file("parts", secrets.token_hex(16))
        request.scope["state"].setdefault("parts", []).append(path)
        return path

    def base(self, request: Request) -> str:
        """The address of this server as clients see it, without a slash at its end."""
        return (self.configuration.public_url or str(request.base_url)).rstrip("/")

    def submit(
        self,
        request: Request,
        stored: Stored,
        settings: Settings,
        options: dict[str, Any],
        mask: Stored | None = None,
        **more: Any,
    ) -> Job:
        """Queues an image, or finds the job of the same Idempotency-Key.

        Args:
            options: "priority" and "deadline" in seconds, both checked.
            mask: was sent beside the image.

        Raises:
            ValueError, Refused, QueueFull, Late, Unavailable: it is not taken; its file is removed.
        """
        try:
            key, seconds, name = key_of(request), options.get("deadline"), check_priority(request, options)
            job = Job.of(
                key.name, settings, share=key.share, masked=mask is not None, name=stored.name,
                priority=PRIORITIES[name], deadline=seconds, **more,
            )  # fmt: skip
            if job.deadline is not None or self.jobs.quotes_every_job:
                quote = self.jobs.quote(job, stored.path)
                job.quote = None if quote is None else dataclasses.asdict(quote)
            files = (stored.path, mask.path if mask else None)
            if job.batch is not None:  # the batch has the key
                self.queue(key, job, settings, *files)
                return job
            requested = [stored.digest, mask and mask.digest, dataclasses.asdict(settings), name, seconds]
            if job.version not in (None, self.models.default.version):
                requested.append(job.version)
            before = self.claim(request, requested, job.id)
            if before is not None:
                known = self.jobs.find(before)
                if known is not None:
                    return known
                job.id = before  # the request before has not come that far, or its server was killed
            try:
                self.queue(key, job, settings, *files)
            except BaseException:
                self.release(request, job.id)
                raise
            return job
        finally:
            drop(stored, mask)

    def queue(self, key: Key, job: Job, settings: Settings, image: Path, mask: Path | None) -> None:
        """Queues a job and counts it for its key.

        Raises:
            Refused: 429, the key has used its quota of the day.
            QueueFull, Unavailable: it is not taken, and not counted.
        """
        megapixels = limits.megapixels(*settings.output_size(*open_header(read_file(image)).size))
        day, quota = today().isoformat(), key.megapixels_per_day
        if not self.store.add_usage(key.name, day, 1, megapixels, quota):
            detail = f"the result has {megapixels:.1f} MP and would exceed the {quota:g} MP of this key for {day} (UTC)"
            seconds = 86400 - int(time.time()) % 86400
            raise Refused("quota_exceeded", f"{detail}; try again tomorrow", **{"Retry-After": str(seconds)})
        try:
            self.jobs.submit(job, image, mask)
        except BaseException:
            self.store.add_usage(key.name, day, -1, -megapixels, None)
            raise

    def claim(self, request: Request, requested: list[Any], id: str) -> str | None:
        """Gives the Idempotency-Key of a request to a job or batch, unless one has it that was not canceled.

        Args:
            requested: what the request asks for, as JSON; the same key goes with the same values.

        Returns:
            The id that has the key already, or None: the request has no key, or it is this one's now.

        Raises:
            Refused: 422, the key was used for other values.
        """
        key = request.headers.get("idempotency-key")
        if not key:
            return None
        digest = hashlib.sha256(json.dumps(requested).encode()).hexdigest()
        while before := self.store.claim(owner(request), key, digest, id):
            if not self.canceled(owner(request), before[1]):
                break
            self.store.release(owner(request), key, before[1])
        if before is None:
            return None
        if before[0] != digest:
            raise Refused("idempotency_reused", "this Idempotency-Key was used for a different request; use a new key")
        return before[1]

    def release(self, request: Request, id: str) -> None:
        """Takes the Idempotency-Key of a request from the job or batch that got it."""
        key = request.headers.get("idempotency-key")
        if key:
            self.store.release(owner(request), key, id)

    def canceled(self, owner: str, id: str) -> bool:
        """Whether a job, or every job of a batch, was canceled or will be at its next tile."""
        job = self.jobs.find(id)
        jobs = [job] if job else self.jobs.batch(owner, id)
        return bool(jobs) and all(job.status == CANCELED or (job.cancel and not job.ended) for job in jobs)

    async def wait(self, job: Job, seconds: float, request: Request | None = None) -> Job:
        """The job once it has ended, or as it is after `seconds`, or when it will not begin any more.

        Args:
            request: whose caller, by hanging up, cancels the job.
        """
        end = time.monotonic() + seconds
        while not job.ended and time.monotonic() < end and not (self.jobs.closing and job.status == WAITING):
            change = asyncio.ensure_future(self.jobs.changed(job.id, job.revision, end - time.monotonic()))
            try:
                while not change.done():
                    await asyncio.wait([change], timeout=None if request is None else POLL)
                    if request is not None and await request.is_disconnected():
                        await run_in_threadpool(self.jobs.cancel, job.id)
                        request = None
            finally:
                change.cancel()
            job = change.result() or job
        return job

    async def check(self, stored: Stored, settings: Settings, mask: Stored | None = None) -> None:
        """Rejects unusable files before they enter the queue; checks only header, format and size.

        Files are read on a worker thread, for HEADER_SECONDS at most.

        Raises:
            ValueError: one line; the files are removed.
        """
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(HEADER_READERS, self.check_files, stored, settings, mask)
        try:
            await asyncio.wait_for(work, HEADER_SECONDS)
        except TimeoutError:
            raise ValueError(f"the image file's header could not be read in {HEADER_SECONDS:.0f} s") from None

    def check_files(self, stored: Stored, settings: Settings, mask: Stored | None) -> None:
        """The work of `check`."""
        try:
            if not stored.path.stat().st_size:
                raise ValueError("image is required: the file is empty")
            size = size_of(stored)
            settings.output_size(*size)
            if mask is not None:
                check_mask(mask, size)
        except ValueError as error:
            drop(stored, mask)
            raise FieldError(str(error), getattr(error, "field", "image")) from error

    def owned(self, request: Request, id: str) -> Job:
        """The job of this id.

        Raises:
            Refused: 404, there is none, or it is another's.
        """
        job = self.jobs.find(id) if is_id(id) else None
        if job is None or job.owner != owner(request):
            raise Refused("not_found", "no job has this ID; jobs expire after SEESR_KEEP hours")
        return job

    def upload(self, request: Request, id: str) -> dict[str, Any]:
        """The caller's upload of this id.

        Raises:
            Refused: 404, there is none.
        """
        uploads = self.store.uploads(owner(request), id) if is_id(id) else []
        if not uploads:
            raise Refused("not_found", "no file has this ID; upload it with POST /v1/files")
        return uploads[0]

    def upload_file(self, record: dict[str, Any]) -> Path:
        """The file of an upload.

        Raises:
            Refused: 404, it was removed.
        """
        with contextlib.suppress(FileNotFoundError):
            path = self.store.upload_file(record["id"])
            if path.is_file():
                return path
        raise Refused("expired", "this file was removed; send it again")

    def source(self, request: Request, source: Any) -> Any:
        """The file of an upload of this server, if the source is its URL; else the source itself.

        Raises:
            Refused: 404, there is no such upload.
        """
        begin = f"{self.base(request)}/v1/files/"
        if not (isinstance(source, str) and source.startswith(begin)):
            return source
        id = source.removeprefix(begin).partition("?")[0].partition("/")[0]
        record = self.upload(request, id)
        return Uploaded(self.upload_file(record), record)

    def link(self, base: str, job: Job) -> str:
        """A signed link to the result, valid for LINK_SECONDS."""
        assert job.output
        return f"{base}/v1/outputs/{job.output}?{self.signed_query(job.output)}"

    def signature(self, name: str, expires: int) -> str:
        return hmac.new(derived(self.secret, "links"), f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()

    def webhook_secret(self, owner: str) -> bytes:
        """What an owner's webhooks are signed with."""
        return derived(self.secret, f"webhooks:{owner}")

    def signed_query(self, name: str) -> str:
        """The query of a link to `name` that is good for LINK_SECONDS, for whoever holds it."""
        expires = int(time.time()) + LINK_SECONDS
        return f"expires={expires}&signature={self.signature(name, expires)}"

    def check_link(self, name: str, query: Mapping[str, str]) -> None:
        """Refuses a link that is forged or has expired.

        Raises:
            Refused: 404.
        """
        expires, signature = query.get("expires", ""), query.get("signature", "")
        seconds = int(expires) if expires.isascii() and expires.isdigit() and len(expires) <= 12 else 0
        good = hmac.compare_digest(self.signature(name, seconds).encode(), signature.encode())
        if not good or seconds < time.time():
            raise Refused("expired", "the link is invalid or has expired; request the job for a new link")

    def linked(self, name: str, query: Mapping[str, str]) -> Path:
        """The file that a link names.

        Raises:
            Refused: the link is forged or has expired.
        """
        self.check_link(name, query)
        job = self.jobs.find(name.partition(".")[0])
        if job is None or job.output != name:
            raise Refused("expired", "the result has expired; send the image again")
        return self.result(job)

    def result(self, job: Job) -> Path:
        """The file of a job that succeeded.

        Raises:
            Refused: 404, the file was removed.
        """
        with contextlib.suppress(FileNotFoundError):
            path = self.jobs.result(job)
            if path.is_file():
                return path
        raise Refused("expired", "the result was removed; send the image again")

    def data_uri(self, job: Job) -> str:
        """The result inside of a data URI."""
        data = self.result(job).read_bytes()
        return f"data:{media_type(job)};base64,{base64.b64encode(data).decode()}"


def is_id(text: str) -> bool:
    """Whether a text can be an id of a job, a batch or an upload; it may be used as a file name then."""
    return text.isascii() and text.isalnum() and len(text) <= 64


def drop(*files: Stored | None) -> None:
    for stored in files:
        if stored is not None:
            stored.path.unlink(missing_ok=True)


def size_of(stored: Stored) -> tuple[int, int]:
    """(width, height) of the upright image, from the header of its file.

    Raises:
        ValueError: no image of a known kind, or too large; one line.
    """
    return open_header(read_file(stored.path)).size


def check_mask(mask: Stored, size: tuple[int, int]) -> None:
    """Refuses a mask that is no image, or has another aspect ratio than the image.

    Raises:
        FieldError: one line.
    """
    try:
        masked = size_of(mask)
    except ValueError as error:
        raise FieldError(f"the mask cannot be used: {error}", "mask") from None
    try:
        check_aspect(masked, size)
    except ValueError as error:
        raise FieldError(str(error), "mask") from None


def check_priority(request: Request, options: Mapping[str, Any]) -> str:
    """The priority of a request.

    Raises:
        Refused: 403, its key may not use it.
    """
    name, key = options.get("priority", "normal"), key_of(request)
    if name not in key.priorities:
        allowed = ", ".join(key.priorities)
        raise Refused("priority_not_allowed", f"priority is {name}; this key may use {allowed}", "priority")
    return name


def media_type(job: Job) -> str:
    return MEDIA_TYPES[job.suffix]


def when(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return (
        datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    )
