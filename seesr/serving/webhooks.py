"""Telling a caller's server what became of a job: signed as Standard Webhooks (and so Replicate) sign."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from seesr.serving.fetch import public_address
from seesr.serving.job import Job
from seesr.serving.middleware import Refused

EVENTS = ("start", "output", "logs", "completed")
TRIES = 5
PAUSE = 1.0  # seconds before the second try, doubled before each further one
OFTEN = 0.5  # seconds between two messages about the logs of one job
Send = Callable[[Job, str], Awaitable[bool]]  # (job, event) -> whether it was taken
log = logging.getLogger(__name__)


def check_target(url: Any) -> None:
    """Refuses a webhook that is no https URL; its address is checked when it is called.

    Raises:
        Refused: 422.
    """
    parts = urlsplit(url) if isinstance(url, str) else None
    if parts is None or parts.scheme != "https" or not parts.hostname or len(url) > 4096:
        raise Refused(422, "webhook must be an https URL")


def whsec(secret: bytes) -> str:
    """The secret as receivers want it."""
    return "whsec_" + base64.b64encode(secret).decode()


def signed(secret: bytes, id: str, body: bytes, now: float) -> dict[str, str]:
    """The headers webhook-id, webhook-timestamp, webhook-signature."""
    stamp = str(int(now))
    digest = hmac.new(secret, b".".join([id.encode(), stamp.encode(), body]), hashlib.sha256).digest()
    signature = "v1," + base64.b64encode(digest).decode()
    return {"webhook-id": id, "webhook-timestamp": stamp, "webhook-signature": signature}


async def send(secret: bytes, url: str, id: str, content: dict[str, Any]) -> bool:
    """Posts to a public address, several times if need be; whether it was taken."""
    body = json.dumps(content).encode()
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or 443
    for attempt in range(TRIES):
        if attempt:
            await asyncio.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            address = await public_address(host, port)
            netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
            headers = {"Host": parts.netloc.rpartition("@")[2], "Content-Type": "application/json"}
            headers |= signed(secret, id, body, time.time())
            async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
                target = parts._replace(netloc=netloc).geturl()
                extensions = {"sni_hostname": host}
                response = await client.post(target, content=body, headers=headers, extensions=extensions)
            if response.is_success:
                return True
            reason = str(response.status_code)
        except (ValueError, httpx.HTTPError) as error:
            reason = f"{type(error).__name__}: {error}"
        log.warning("webhook %s of %s, try %d: %s", id, host, attempt + 1, reason)
    return False
