"""Sends webhooks about jobs, signed as in Standard Webhooks and Replicate."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

import httpx

from seesr.serving.access import is_loopback
from seesr.serving.fetch import public_address
from seesr.serving.job import Job
from seesr.serving.refusal import Refused
from seesr.serving.sqlite_store import SqliteStore

EVENTS = ("start", "output", "logs", "completed")
TRIES = 5
PAUSE = 1.0  # seconds before the second try, doubled before each further one
SECONDS = 20.0  # that one try may take
LANES = 64  # receivers that are sent to at the same time
POLL = 0.1  # seconds between two looks for new messages
Send = Callable[[Job, str], Awaitable[bool]]  # (job, event) -> whether the receiver took it
log = logging.getLogger(__name__)


def check_target(url: Any, local: bool = False) -> None:
    """Refuses a webhook that is no https URL; its address is checked when it is called.

    Args:
        local: SEESR_LOCAL_WEBHOOKS; http URLs of this machine are allowed too.

    Raises:
        Refused: 422.
    """
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        good = parts is not None and parts.hostname and parts.port != 0 and len(url) <= 4096
        good = good and parts is not None and (parts.scheme == "https" or (local and is_local(parts)))
    except ValueError:  # a port over 65535, brackets without an address
        good = False
    if not good:
        accepted = "an https URL, or an http URL of this machine" if local else "an https URL"
        raise Refused("invalid_input", f"webhook must be {accepted}", "webhook")


def is_local(parts: SplitResult) -> bool:
    """Whether a URL is plain http to this machine."""
    return parts.scheme == "http" and is_loopback(parts.hostname or "")


def whsec(secret: bytes) -> str:
    """The secret as receivers want it."""
    return "whsec_" + base64.b64encode(secret).decode()


def signed(secret: bytes, id: str, body: bytes, now: float) -> dict[str, str]:
    """The headers webhook-id, webhook-timestamp, webhook-signature."""
    stamp = str(int(now))
    digest = hmac.new(secret, b".".join([id.encode(), stamp.encode(), body]), hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {"webhook-id": id, "webhook-timestamp": stamp, "webhook-signature": signature}


async def send_once(secret: bytes, url: str, id: str, content: Mapping[str, Any], local: bool = False) -> bool:
    """Posts to a public address, or with `local` to this machine; whether the receiver took it."""
    body = json.dumps(content).encode()
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
        address = host if local and is_local(parts) else await public_address(host, port)
        netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
        headers = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json"}
        headers |= signed(secret, id, body, time.time())
        async with asyncio.timeout(SECONDS), httpx.AsyncClient(timeout=10, trust_env=False) as client:
            target = parts._replace(netloc=netloc).geturl()
            extensions = {"sni_hostname": host}
            response = await client.post(target, content=body, headers=headers, extensions=extensions)
        if response.is_success:
            return True
        reason = str(response.status_code)
    except (ValueError, TimeoutError, httpx.HTTPError, httpx.InvalidURL) as error:
        reason = f"{type(error).__name__}: {error}"
    log.warning("webhook %s was not accepted: %s", id, reason)
    return False


async def send(send_once: Send, job: Job, event: str) -> bool:
    """Tries a message TRIES times, with growing pauses; whether the receiver took it."""
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
        if await attempted(send_once, job, event):
            return True
    log.error("webhook %s of job %s dropped after %d tries", event, job.id, TRIES)
    return False


async def attempted(send_once: Send, job: Job, event: str) -> bool:
    """One try. An unexpected error counts as a failed one: it must not stop the messages of other callers."""
    try:
        return await send_once(job, event)
    except Exception:
        log.exception("webhook %s of job %s", event, job.id)
        return False


class WebhookQueue:
    """Sends the webhooks that the journal keeps: to each receiver in order, to different receivers at the same time.

    A message is removed once it is taken or was tried TRIES times. One that was on its way when the server died is sent
    again; receivers recognize it by its webhook-id.

    Args:
        send_once: one try; whether the receiver took it.
    """

    def __init__(self, journal: SqliteStore, send_once: Send) -> None:
        self.journal, self.send_once = journal, send_once
        self.lanes: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self.lanes = {name: task for name, task in self.lanes.items() if not task.done()}
                for receiver in self.journal.receivers():
                    if receiver not in self.lanes and len(self.lanes) < LANES:
                        self.lanes[receiver] = group.create_task(self.lane(receiver))
                await asyncio.sleep(POLL)

    async def lane(self, receiver: str) -> None:
        """Every message that waits for one receiver."""
        while message := self.journal.next_webhook(receiver):
            await asyncio.sleep(max(0.0, message.due - time.time()))
            if await attempted(self.send_once, message.job, message.event):
                self.journal.drop_webhook(message.number)
            elif message.tries + 1 >= TRIES:
                log.error("webhook %s of job %s dropped after %d tries", message.event, message.job.id, TRIES)
                self.journal.drop_webhook(message.number)
            else:
                self.journal.delay_webhook(message.number, time.time() + PAUSE * 2**message.tries)

    async def drained(self, seconds: float) -> None:
        """Returns once every message was tried, or after `seconds`; the others are sent by the next server."""
        end = time.monotonic() + seconds
        while self.journal.untried_webhooks() and time.monotonic() < end:
            await asyncio.sleep(POLL)
