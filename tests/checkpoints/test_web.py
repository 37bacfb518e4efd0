"""The HTTP client of downloads: what is tried again, how long it waits, and what a refusal says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from seesr.checkpoints import web
from seesr.checkpoints.web import Missing, NoRanges, Unavailable, Web

URL = "https://hub.example/file"
DATA = bytes(range(10))


class Body(httpx.SyncByteStream):
    """Bytes of an answer; `broken`: the connection then ends early."""

    def __init__(self, data: bytes, broken: bool) -> None:
        self.data, self.broken = data, broken

    def __iter__(self) -> Iterator[bytes]:
        yield self.data
        if self.broken:
            raise httpx.ReadError("broken off")


def answer(status: int, data: bytes = b"", broken: bool = False, **headers: str) -> Callable[[], httpx.Response]:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda: httpx.Response(status, headers=names, stream=Body(data, broken))


class Server:
    """Gives its answers in turn, the last one again and again.

    Attributes:
        requests: what was asked.
        slept: seconds that the client waited.
    """

    def __init__(self, *answers: Callable[[], httpx.Response] | Exception) -> None:
        self.answers, self.requests = list(answers), list[httpx.Request]()
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        result = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(result, Exception):
            raise result
        return result()

    @property
    def ranges(self) -> list[str | None]:
        return [request.headers.get("Range") for request in self.requests]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Server, Web]]:
    def serve(*answers: Any) -> tuple[Server, Web]:
        server, client = Server(*answers), Web()
        monkeypatch.setattr(web.time, "sleep", server.slept.append)
        client.client = httpx.Client(transport=httpx.MockTransport(server), follow_redirects=True)
        return server, client

    return serve


@pytest.mark.parametrize("call", [lambda c: c.json(URL), lambda c: c.head(URL), lambda c: c.read(URL, 0, 8)])
@pytest.mark.parametrize(
    ("error", "reason"), [(httpx.ConnectError("no route"), "no route"), (httpx.ConnectTimeout(""), "ConnectTimeout")]
)
def test_a_server_that_is_away_is_asked_five_times(serve: Any, call: Any, error: Exception, reason: str) -> None:
    server, client = serve(error)
    with pytest.raises(Unavailable, match=rf"could not be reached in 5 tries \({reason}\)"):
        call(client)
    assert len(server.requests) == 5 and server.slept == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("status", "code", "tries", "kind", "message"),
    [
        (503, "", 5, Unavailable, r"could not be reached in 5 tries \(HTTP 503\)"),
        (404, "", 1, Missing, r"does not exist \(HTTP 404\)"),
        (401, "RepoNotFound", 1, Missing, r"does not exist \(HTTP 401\)"),
        (401, "GatedRepo", 1, Unavailable, r"is gated \(HTTP 401\): accept its terms"),
        (403, "", 1, Unavailable, r"is gated \(HTTP 403\)"),
        (410, "", 1, Unavailable, r"was refused \(HTTP 410\)"),
    ],
)
def test_what_an_error_of_the_server_means(
    serve: Any, status: int, code: str, tries: int, kind: type, message: str
) -> None:
    server, client = serve(answer(status, X_Error_Code=code))
    with pytest.raises(Unavailable, match=message) as caught:
        client.head(URL)
    assert type(caught.value) is kind and len(server.requests) == tries


@pytest.mark.parametrize(
    ("wait", "slept"), [("7", [7.0]), ("300", [300.0]), ("301", None), ("Wed, 21 Oct 2026 07:28:00 GMT", [2.0])]
)
def test_the_time_that_a_server_asks_to_wait(serve: Any, wait: str, slept: list[float] | None) -> None:
    server, client = serve(answer(429, Retry_After=wait), answer(200, Content_Length="3"))
    if slept is None:
        with pytest.raises(Unavailable, match=r"limits the request rate \(HTTP 429\): run it again in 301 s"):
            client.head(URL)
        assert server.slept == [] and len(server.requests) == 1
    else:
        assert client.head(URL).size == 3 and server.slept == slept


def test_a_body_that_breaks_off_is_asked_for_again(serve: Any) -> None:
    server, client = serve(answer(200, b"{", True), answer(200, b"{", True), answer(200, b"{}"))
    assert client.json(URL) == {} and server.slept == [2, 4]
    server, client = serve(answer(200, b"{", True))
    with pytest.raises(Unavailable, match=r"could not be fetched in 5 tries \(broken off\)"):
        client.json(URL)
    assert len(server.requests) == 5 and server.slept == [2, 4, 8, 16]
    _, client = serve(answer(200, b"<html>"))
    with pytest.raises(Unavailable, match="did not answer with JSON"):
        client.json(URL)


def test_a_part_of_a_file(serve: Any) -> None:
    server, client = serve(answer(206, DATA[2:5]))
    assert client.read(URL, 2, 5) == DATA[2:5] and server.ranges == ["bytes=2-4"]
    with pytest.raises(Unavailable, match="3 bytes came for a range of 4"):
        client.read(URL, 2, 6)
    _, client = serve(answer(200, DATA))
    with pytest.raises(NoRanges):
        client.read(URL, 2, 5)


@pytest.mark.parametrize(
    ("headers", "size"),
    [({"X_Linked_Size": "7", "Content_Length": "3"}, 7), ({"Content_Length": "3"}, 3), ({}, None)],
)
def test_the_size_is_that_of_the_object_behind_a_redirect(serve: Any, headers: dict[str, str], size: int) -> None:
    _, client = serve(answer(302, Location="https://cdn.example/x"), answer(200, **headers))
    assert client.head(URL) == (size, "https://cdn.example/x")


def download(client: Web, path: Path, spans: Any = ((0, 10),), prefix: bytes = b"") -> bytes:
    if not path.exists():
        path.write_bytes(prefix)
    list(client.download(URL, path, spans, len(prefix)))
    return path.read_bytes()


def test_a_download_ends_after_five_tries_in_a_row_without_a_new_byte(serve: Any, tmp_path: Path) -> None:
    nothing = answer(206, b"", True)
    server, client = serve(answer(200, DATA[:4], True), nothing, nothing, nothing, answer(206, DATA[4:]))
    assert download(client, tmp_path / "a") == DATA
    assert server.ranges == [None, *["bytes=4-9"] * 4] and server.slept == [2, 4, 8, 16]
    server, client = serve(answer(200, DATA[:4], True), nothing)
    with pytest.raises(Unavailable, match=r"could not be fetched in 5 tries \(broken off\): run the command again to"):
        download(client, tmp_path / "b")
    assert len(server.requests) == 5 and (tmp_path / "b").read_bytes() == DATA[:4]


def test_a_server_that_cannot_resume_starts_again(serve: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, client = serve(answer(200, DATA[:4], True), answer(200, DATA))
    assert download(client, tmp_path / "a") == DATA and "the server cannot resume" in caplog.text
    assert server.ranges == [None, "bytes=4-9"]
    server, client = serve(answer(200, DATA[:4], True))
    with pytest.raises(Unavailable, match="in 5 tries"):
        download(client, tmp_path / "b")
    assert len(server.requests) == 5


def test_parts_are_appended_to_their_prefix(serve: Any, tmp_path: Path) -> None:
    spans = ((2, 4), (6, 9))
    server, client = serve(answer(206, DATA[2:]), answer(206, DATA[6:9]))  # the first answer has too much
    assert download(client, tmp_path / "a", spans, b"PP") == b"PP" + DATA[2:4] + DATA[6:9]
    assert server.ranges == ["bytes=2-3", "bytes=6-8"]
    (tmp_path / "b").write_bytes(b"PP" + DATA[2:4] + DATA[6:7])
    server, client = serve(answer(206, DATA[7:9]))
    assert download(client, tmp_path / "b", spans, b"PP") == b"PP" + DATA[2:4] + DATA[6:9]
    assert server.ranges == ["bytes=7-8"]
    _, client = serve(answer(200, DATA))
    with pytest.raises(NoRanges):
        download(client, tmp_path / "c", spans, b"PP")
    assert (tmp_path / "c").read_bytes() == b"PP"
