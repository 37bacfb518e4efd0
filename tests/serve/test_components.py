"""Components of the server one by one: keys, rate limits, file names, image URLs and webhooks."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import SecretStr

from lab.report import ROOT
from seesr.config import Configuration
from seesr.serving import api, app, fetch, keys, middleware, requests, uploads, webhooks
from seesr.serving.job import DONE, RUNNING, Job
from seesr.serving.refusal import Refused


def test_the_server_loads_without_torch() -> None:
    script = "import seesr.serving.app, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_keys_have_names_and_are_long() -> None:
    result = keys.read_tokens("ann:0123456789abcdef, 0123456789abcdeg")
    assert [key.name for key in result] == ["ann", "key2"] and result[0].sha256 == keys.digest("0123456789abcdef")
    assert keys.read_tokens("") == []
    with pytest.raises(ValueError, match="key 1 of SEESR_API_KEYS is shorter than 16"):
        keys.read_tokens("ann:short")


def test_rate_limits_refill(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(middleware.time, "monotonic", lambda: now[0])
    rates = middleware.RateLimits(2)
    assert [rates.take("ann"), rates.take("ann")] == [0, 0] and rates.take("ann") == pytest.approx(30)
    assert rates.take("bob") == 0
    now[0] = 30.5
    assert rates.take("ann") == 0 < rates.take("ann")


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("../../etc/passwd", "passwd"), ("C:\\temp\\x.png", "x.png"),
        ("a\r\nSet-Cookie: b.png", "aSet-Cookie b.png"),
        ('q"uote.png', "quote.png"), ("..", "image"), ("", "image"), ("x" * 500, "x" * 120),
        ("\u202egnp.exe", "gnp.exe"),
    ],
)  # fmt: skip
def test_names_are_cleaned(name: str, clean: str) -> None:
    assert uploads.clean_name(name) == clean


def test_only_named_hosts_are_contacted() -> None:
    assert fetch.permitted("example.com", "*") and fetch.permitted("Example.com", "a.org, example.com")
    assert fetch.permitted("cdn.example.com", ".example.com") and not fetch.permitted("evilexample.com", ".example.com")
    assert not fetch.permitted("example.com", "")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "::1", "0.0.0.0",
             "2130706433", "0x7f.1", "::ffff:127.0.0.1", "fe80::1", "100.64.0.1", "no-such-host.invalid",
             "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1",
             "fec0::1", "feff::1", "::7f00:1", "::10.0.0.1", "::8.8.8.8", "224.0.0.1", "239.1.2.3", "ff02::1",
             "fd00::1", "::", "255.255.255.255", "192.0.2.1", "198.18.0.1", "2001:db8::1", "::ffff:10.0.0.1"],
)  # fmt: skip
def test_private_addresses_are_refused_in_any_spelling(host: str) -> None:
    with pytest.raises(ValueError, match=r"not public|cannot be found"):
        asyncio.run(fetch.public_address(host, 80))


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses_are_contacted(address: str) -> None:
    assert asyncio.run(fetch.public_address(address, 443)) == address


class Answers(ThreadingHTTPServer):
    """A server on this machine that answers by path, and keeps what it was sent."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.failures = 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://images.test:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_GET(self) -> None:
        if self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
        elif self.path == "/inside":
            self.send_response(302)
            self.send_header("Location", "http://internal.test/secret")
        else:
            packed = "gzip" in self.headers.get("Accept-Encoding", "")  # as many servers would
            body = gzip.compress(b"image") if packed else b"image"
            self.send_response(200 if self.path == "/image" else 404)
            self.send_header("Content-Length", str(len(body)))
            if packed:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body)
            return
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.got.append((dict(self.headers), body))
        self.server.failures -= 1
        self.send_response(500 if self.server.failures >= 0 else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answers]:
    """Reached under a name that seems public; every other name is what it is."""
    real = fetch.public_address

    async def address(host: str, port: int) -> str:
        if host == "images.test":
            return "127.0.0.1"
        return await real("10.0.0.1" if host == "internal.test" else host, port)

    monkeypatch.setattr(fetch, "public_address", address)
    monkeypatch.setattr(webhooks, "public_address", address)
    with Answers() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def fetched(url: str, allowed: str = "*") -> bytes:
    async def work() -> bytes:
        return b"".join([chunk async for chunk in fetch.fetch(url, allowed)])

    return asyncio.run(work())


def test_a_url_is_fetched_and_its_redirects_are_checked(answers: Answers) -> None:
    assert fetched(f"{answers.url}/image") == b"image"
    for path, message in {"loop": "more than 5 times", "inside": "not public", "nothing": "answers 404"}.items():
        with pytest.raises(ValueError, match=message):
            fetched(f"{answers.url}/{path}")
    with pytest.raises(Refused, match=r"URLs of internal\.test are not allowed"):
        fetched(f"{answers.url}/inside", "images.test")
    for url in ("ftp://images.test/x", "http://", "http://[::1"):
        with pytest.raises(ValueError):
            fetched(url)


def test_webhooks_are_signed_as_the_standard_says_and_tried_again(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSE", 0.01)
    answers.failures, secret = 2, b"s" * 32

    def sent(id: str, content: dict) -> bool:
        async def once(job: Job, event: str) -> bool:
            return await webhooks.send_once(secret, f"{answers.url}/hook", id, content)

        return asyncio.run(webhooks.send(once, Job("ann", {}), "completed"))

    assert sent("msg_1", {"status": "succeeded"})
    assert len(answers.got) == 3
    headers, body = answers.got[-1]
    assert json.loads(body) == {"status": "succeeded"}
    key = base64.b64decode(webhooks.whsec(secret).removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}" and headers["webhook-id"] == "msg_1"
    answers.failures = 99
    assert not sent("msg_2", {})
    assert len(answers.got) == 3 + webhooks.TRIES


@pytest.mark.parametrize(
    "url", [5, "http://a.org", "https://", "x", "https://" + "a" * 5000, "https://a.org:99999/", "https://[::1"]
)
def test_a_webhook_must_be_https(url: object) -> None:
    with pytest.raises(Refused, match="https URL"):
        webhooks.check_target(url)


def test_webhooks_to_this_machine_need_the_switch(answers: Answers) -> None:
    local = f"http://127.0.0.1:{answers.server_address[1]}/hook"
    webhooks.check_target(local, local=True)
    for url in ("http://a.org/", "http://10.0.0.1/", "ftp://localhost/", "http://localhost.a.org/"):
        with pytest.raises(Refused, match="of this machine"):
            webhooks.check_target(url, local=True)
    with pytest.raises(Refused):
        webhooks.check_target(local)
    assert asyncio.run(webhooks.send_once(b"s" * 32, local, "id", {}, local=True)) and len(answers.got) == 1
    assert not asyncio.run(webhooks.send_once(b"s" * 32, local, "id", {}))
    assert not asyncio.run(webhooks.send_once(b"s" * 32, "http://10.0.0.1/hook", "id", {}, local=True))
    assert len(answers.got) == 1
    with pytest.raises(ValueError, match="SEESR_LOCAL_WEBHOOKS"):
        app.serve(Configuration(local_webhooks=True, api_keys=SecretStr("a:" + "0" * 16)), "0.0.0.0", 0, None, None)


def test_webhooks_of_a_job_follow_its_filter(answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole server in this process, its engine made of a copy."""
    import time
    from types import SimpleNamespace

    from starlette.testclient import TestClient

    from seesr.config import Configuration
    from seesr.engine.rates import Quote
    from seesr.networks import weights
    from seesr.runtime.progress import Position
    from seesr.serving import app

    class Copy:
        def run(
            self, data: Path, settings: object, deadline: float | None, watchers: tuple, mask: Path | None
        ) -> SimpleNamespace:
            for done in range(3):
                watchers[0](Position("denoise", done, 2))
            metrics = {
                "seconds": {"denoise": 0.1},
                "tiles": 1,
                "steps": 1,
                "out_of_memory_retries": 0,
                "float32_retries": 0,
                "output_size": "1x1",
            }
            return SimpleNamespace(data=data.read_bytes(), metrics=metrics)

        def quote(self, data: Path, settings: object) -> Quote:
            return Quote("1x1", 1, 0.1, 0.1, 1, {}, None, 9)

        def healthy(self) -> bool:
            return True

        def about(self) -> dict:
            return {}

    monkeypatch.setenv("SEESR_LOCAL_WEBHOOKS", "1")
    answers.url = answers.url.replace("images.test", "localhost")
    monkeypatch.setenv("SEESR_DATA", str(tmp_path))
    from serving import sharp

    uri = "data:image/png;base64," + base64.b64encode(sharp()).decode()
    configuration = Configuration.read()
    built = app.build(
        configuration,
        "http://seesr.test",
        weights.POCKET,
        lambda send: app.local(configuration, Copy, weights.POCKET, send),  # type: ignore[arg-type]
    )
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        for events in (["completed"], None):
            answers.got.clear()
            body = {"input": {"image": uri}, "webhook": f"{answers.url}/hook", "webhook_events_filter": events}
            created = client.post("/v1/models/you/seesr/predictions", json=body).json()
            deadline = time.monotonic() + 10
            while not any(json.loads(sent)["status"] == "succeeded" for _, sent in list(answers.got)):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            time.sleep(0.3)
            statuses = [json.loads(sent)["status"] for _, sent in answers.got]
            assert statuses == ["succeeded"] if events else "processing" in statuses
            last = json.loads(answers.got[-1][1])
            assert last["id"] == created["id"]
            assert last["urls"]["get"] == f"http://seesr.test/v1/predictions/{created['id']}"


def test_changes_of_jobs_are_reported_once_and_page_by_page() -> None:
    jobs = [Job("ann", {}, id=str(number), created=number, status=RUNNING) for number in range(205)]

    class Jobs:
        def recent(self, owner: str, limit: int, before: float | None) -> list[Job]:
            pages.append(limit)
            return [job for job in reversed(jobs) if before is None or job.created < before][:limit]

        def find(self, id: str) -> Job | None:
            return next((job for job in jobs if job.id == id), None)

    pages: list[int] = []
    revisions: dict[str, int] = {}
    active: dict[str, Job] = {}

    def changed() -> list[str]:
        pages.clear()
        return [job.id for job in api.changes(SimpleNamespace(jobs=Jobs()), "ann", revisions, active)]  # type: ignore[arg-type]

    assert changed() == [str(number) for number in range(5, 205)] and pages == [200]
    assert changed() == [] and pages == [10]
    jobs[7].revision, jobs[8].revision, jobs[8].status = 1, 1, DONE
    jobs += [Job("ann", {}, id=str(number), created=number, status=DONE) for number in range(205, 230)]
    assert changed() == ["7", "8", *(str(number) for number in range(205, 230))] and pages == [10, 10, 10]
    assert set(active) == {str(number) for number in range(5, 205)} - {"8"}


def test_a_long_value_is_cut_in_a_message() -> None:
    assert requests.shown("a" * 60) == "a" * 60 and requests.shown("a" * 61) == "a" * 57 + "..."
    assert requests.shown([1, 2]) == "[1, 2]"
