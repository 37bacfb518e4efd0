"""HTTP client for downloads: retries that respect the server, and a one-line error for every refusal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from httpx import codes
from huggingface_hub import get_token

from seesr.networks.weights import WeightsError

log = logging.getLogger(__name__)
TIMEOUT = 60  # seconds without an answer or a byte
TRIES = 5  # in a row without a new byte
PAUSE = 2.0  # seconds before the second try, doubled before each further one
LONGEST_WAIT = 300  # seconds that a server may ask to wait
BUSY = (
    codes.REQUEST_TIMEOUT,
    codes.TOO_MANY_REQUESTS,
    codes.INTERNAL_SERVER_ERROR,
    codes.BAD_GATEWAY,
    codes.SERVICE_UNAVAILABLE,
    codes.GATEWAY_TIMEOUT,
)


class Unavailable(WeightsError):
    """A source does not have something or does not give it; another source may."""


class Missing(Unavailable):
    """There is no such file or repository."""


class NoRanges(Unavailable):
    """The server ignores Range headers."""


class Head(NamedTuple):
    """What a HEAD request says: bytes (None: not said), and the address after redirects."""

    size: int | None
    url: str


def hub() -> str:
    """Base address of the model hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def github() -> str:
    """Base address of raw GitHub files."""
    return os.environ.get("SEESR_GITHUB", "https://raw.githubusercontent.com").rstrip("/")


class Web:
    """An HTTP client; `with Web() as web`."""

    def __enter__(self) -> Web:
        headers = {"Accept-Encoding": "identity"}
        self.client = httpx.Client(follow_redirects=True, timeout=TIMEOUT, headers=headers)
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()

    def headers(self, url: str) -> dict[str, str]:
        """The hub's token for the hub alone; the client drops it when another host is redirected to."""
        token = get_token() if url.startswith(hub() + "/") else None
        return {"Authorization": f"Bearer {token}"} if token else {}

    def json(self, url: str) -> dict[str, Any]:
        """The JSON at `url`.

        Raises:
            Unavailable: it is missing, refused, not JSON, or could not be fetched.
        """
        try:
            return json.loads(self._body(url)[1])
        except ValueError as error:
            raise Unavailable(f"{url} did not answer with JSON: is HF_ENDPOINT the address of a hub?") from error

    def head(self, url: str) -> Head:
        """Size and final address of a file.

        Raises:
            Unavailable: it is missing, refused or could not be reached.
        """
        with self._request("HEAD", url) as response:
            size = response.headers.get("X-Linked-Size") or response.headers.get("Content-Length")
            return Head(int(size) if size else None, str(response.url))

    def read(self, url: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file.

        Raises:
            NoRanges: the server sends whole files only.
            Unavailable: as for `head`.
        """
        status, data = self._body(url, {"Range": f"bytes={start}-{end - 1}"})
        if status != codes.PARTIAL_CONTENT:
            raise NoRanges(f"{url}: the server does not send parts of files")
        if len(data) != end - start:
            raise Unavailable(f"{url}: {len(data)} bytes came for a range of {end - start}")
        return data

    def _body(self, url: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
        """Status and body of a small answer; the body is empty if a range was asked for and is ignored."""
        reason = ""
        for attempt in range(1, TRIES + 1):
            try:
                with self._request("GET", url, headers) as response:
                    if headers is not None and response.status_code != codes.PARTIAL_CONTENT:
                        return response.status_code, b""
                    return response.status_code, response.read()
            except httpx.TransportError as error:
                reason = str(error)
            if attempt < TRIES:
                pause(attempt, f"{url}: {reason}")
        raise Unavailable(f"{url} could not be fetched in {TRIES} tries ({reason}): run the command again")

    def download(self, url: str, path: Path, spans: Sequence[tuple[int, int]], prefix: int) -> Iterator[int]:
        """Appends the spans [start, end) of a file to `path`, from where it stops; yields the bytes of each chunk.

        Args:
            spans: parts of the file, or one span with all of it.
            prefix: bytes of `path` that are in front of the first span; 0 for a whole file.

        Raises:
            NoRanges: a part was asked for, and the server sends whole files only; the file is left as it was.
            Unavailable: refused, missing, or no new byte came in five tries.
        """
        whole, failures = not prefix, 0
        while (place := _place(spans, path.stat().st_size - prefix)) is not None:
            start, end = place
            try:
                header = {} if whole and start == 0 else {"Range": f"bytes={start}-{end - 1}"}
                with self._request("GET", url, header) as response:
                    restart = bool(header) and response.status_code != codes.PARTIAL_CONTENT
                    if restart and not whole:
                        raise NoRanges(f"{url}: the server does not send parts of files")
                    if restart:
                        log.warning("%s: the server cannot resume; starting again", url)
                    with path.open("wb" if restart else "ab") as file:
                        left = end - (0 if restart else start)
                        for chunk in response.iter_raw():
                            file.write(chunk[:left])
                            left -= len(chunk[:left])
                            if not restart:  # else a server that always restarts would be asked for ever
                                failures = 0
                            yield len(chunk)
                if left:
                    raise httpx.ReadError("the connection ended early")
            except httpx.TransportError as error:
                failures += 1
                if failures == TRIES:
                    raise Unavailable(
                        f"{url} could not be fetched in {TRIES} tries ({error}): run the command again to resume"
                    ) from error
                pause(failures, f"{url}: {error}")

    @contextlib.contextmanager
    def _request(self, method: str, url: str, headers: dict[str, str] | None = None) -> Iterator[httpx.Response]:
        """An answer of 2xx, asked for again while the server is busy or away."""
        reason = ""
        for attempt in range(1, TRIES + 1):
            wait = ""
            try:
                request = self.client.build_request(method, url, headers=self.headers(url) | (headers or {}))
                response = self.client.send(request, stream=True)
            except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
                raise Unavailable(f"{url} is not a URL that can be fetched ({error})") from error
            except httpx.TooManyRedirects as error:
                raise Unavailable(f"{url} redirects too often") from error
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
            else:
                try:
                    if response.is_success:
                        yield response
                        return
                    reason, wait = f"HTTP {response.status_code}", response.headers.get("Retry-After", "")
                    if response.status_code not in BUSY:
                        raise refusal(url, response)
                finally:
                    response.close()
            if wait.isdigit() and int(wait) > LONGEST_WAIT:
                raise Unavailable(f"{url}: the server limits the request rate ({reason}): run it again in {wait} s")
            if attempt < TRIES:
                pause(attempt, f"{url}: {reason}", float(wait) if wait.isdigit() else None)
        raise Unavailable(f"{url} could not be reached in {TRIES} tries ({reason}): check the network and run it again")


def pause(attempt: int, reason: str, seconds: float | None = None) -> None:
    """Waits before the next try: as long as the server asked, or longer each time."""
    wait = PAUSE * 2 ** (attempt - 1) if seconds is None else seconds
    log.warning("%s; trying again in %.0f s", reason, wait)
    time.sleep(wait)


def refusal(url: str, response: httpx.Response) -> Unavailable:
    """The error for an answer that trying again does not change."""
    status, code = response.status_code, response.headers.get("X-Error-Code", "")
    if status == codes.NOT_FOUND or code in ("RepoNotFound", "EntryNotFound", "RevisionNotFound"):
        return Missing(f"{url} does not exist (HTTP {status})")
    if status in (codes.UNAUTHORIZED, codes.FORBIDDEN):
        return Unavailable(
            f"{url} is gated (HTTP {status}): accept its terms on its page, create a token at {hub()}/settings/tokens "
            "and set HF_TOKEN"
        )
    return Unavailable(f"{url} was refused (HTTP {status})")


def _place(spans: Sequence[tuple[int, int]], done: int) -> tuple[int, int] | None:
    """Where the file goes on after `done` bytes of its spans; None at the end."""
    for start, end in spans:
        if done < end - start:
            return start + done, end
        done -= end - start
    return None
