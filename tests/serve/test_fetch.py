"""Downloads of image URLs: hosts, addresses, redirects and limits, without a network."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from seesr.serving import fetch
from seesr.serving.refusal import Refused


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> list[httpx.Request]:
    """The requests of a fetch; a path is the status, a query the place to go to, and the body the path."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        status = int(request.url.path.strip("/") or 200)
        headers = {"location": request.url.query.decode()} if 300 <= status < 400 else {}
        return httpx.Response(status, headers=headers, content=body())

    async def body() -> AsyncIterator[bytes]:
        yield b"image"

    real = httpx.AsyncClient

    def client(timeout: float, trust_env: bool) -> httpx.AsyncClient:
        assert trust_env is False and 1 <= timeout <= 60
        return real(transport=httpx.MockTransport(answer))

    async def public(host: str, port: int) -> str:
        return {"six.test": "2606:4700::1"}.get(host, "8.8.8.8")

    monkeypatch.setattr(fetch.httpx, "AsyncClient", client)
    monkeypatch.setattr(fetch, "public_address", public)
    return requests


def fetched(url: str, allowed: str = "*") -> bytes:
    async def work() -> bytes:
        return b"".join([chunk async for chunk in fetch.fetch(url, allowed)])

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("url", "target", "host"),
    [
        ("http://a.test/200", "http://8.8.8.8:80/200", "a.test"),
        ("https://u:p@a.test/200", "https://8.8.8.8:443/200", "a.test"),
        ("http://a.test:8080/", "http://8.8.8.8:8080/", "a.test:8080"),
        ("https://six.test/", "https://[2606:4700::1]:443/", "six.test"),
    ],
)
def test_the_address_that_was_checked_is_asked_under_the_name_of_the_host(
    url: str, target: str, host: str, web: list[httpx.Request]
) -> None:
    assert fetched(url) == b"image"
    (request,) = web
    assert request.url == httpx.URL(target) and request.headers["host"] == host
    assert request.headers["accept-encoding"] == "identity"
    assert request.extensions["sni_hostname"] == host.partition(":")[0]


def chain(length: int) -> str:
    url = "http://a.test/200"
    for _ in range(length):
        url = "http://a.test/302?" + url
    return url


def test_five_redirects_are_followed_and_each_host_is_checked(web: list[httpx.Request]) -> None:
    assert fetched(chain(fetch.REDIRECTS)) == b"image" and len(web) == 6
    with pytest.raises(ValueError, match="redirects more than 5 times"):
        fetched(chain(fetch.REDIRECTS + 1))
    assert fetched("http://a.test/301?/200") == b"image" and web[-1].url.path == "/200", "relative to the first"
    with pytest.raises(Refused, match=r"URLs of b\.test are not allowed here: set SEESR_ALLOW_URLS=b\.test") as error:
        fetched("http://a.test/302?http://b.test/200", "a.test")
    assert (error.value.code, error.value.field) == ("url_not_allowed", "image")


@pytest.mark.parametrize("status", [201, 206, 404, 500])
def test_only_a_whole_file_is_taken(status: int, web: list[httpx.Request]) -> None:
    with pytest.raises(ValueError, match=f"the image URL answers {status}"):
        fetched(f"http://a.test/{status}")


@pytest.mark.parametrize("url", ["ftp://a.test/x", "http:///x", "http://:80/x", "x"])
def test_what_is_no_web_address_is_not_asked(url: str, web: list[httpx.Request]) -> None:
    with pytest.raises(ValueError, match=r"image must be an http\(s\) URL"):
        fetched(url)
    assert not web


@pytest.mark.parametrize(
    ("seconds", "message"), [(0.02, "took longer than 0 s"), (5.0, r"cannot be fetched \(ReadError\)")]
)
def test_a_download_ends_after_its_time_or_with_its_connection(
    seconds: float, message: str, monkeypatch: pytest.MonkeyPatch, web: list[httpx.Request]
) -> None:
    async def hang(host: str, port: int) -> str:
        if seconds < 1:
            await asyncio.sleep(60)
        raise httpx.ReadError("lost")

    monkeypatch.setattr(fetch, "SECONDS", seconds)
    monkeypatch.setattr(fetch, "public_address", hang)
    with pytest.raises(ValueError, match=message):
        fetched("http://a.test/")


@pytest.mark.parametrize(
    ("allowed", "hosts", "others"),
    [
        ("", [], ["a.test"]), ("*", ["a.test"], []), ("A.test, b.test ,", ["a.TEST", "b.test"], ["c.test", "x.a.test"]),
        (".a.test", ["x.a.test", "y.x.a.test"], ["a.test", "xa.test"]), ("a.test", ["a.test"], ["x.a.test", ""]),
    ],
)  # fmt: skip
def test_the_hosts_that_are_allowed(allowed: str, hosts: list[str], others: list[str]) -> None:
    assert all(fetch.permitted(host, allowed) for host in hosts)
    assert not any(fetch.permitted(host, allowed) for host in others)


@pytest.mark.parametrize("network", fetch.TRANSLATED)
def test_an_address_that_is_translated_to_another_is_not_public(network: ipaddress.IPv6Network) -> None:
    for address in (network[2**30], network[-(2**30)]):
        assert not fetch.is_public(str(address)), address


def test_every_address_of_a_host_must_be_public(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    class Loop:
        async def getaddrinfo(self, host: str, port: int, type: int) -> list[Any]:
            return [(0, 0, 0, "", (address, port)) for address in found]

    monkeypatch.setattr(fetch.asyncio, "get_running_loop", Loop)
    address: Callable[[], str] = lambda: asyncio.run(fetch.public_address("a.test", 80))  # noqa: E731
    for addresses in ([], ["8.8.8.8", "10.0.0.1"]):
        found[:] = addresses
        with pytest.raises(ValueError, match=r"a\.test has an address that is not public"):
            address()
    found[:] = ["2606:4700::1", "8.8.8.8"]
    assert address() == "2606:4700::1"
