"""The server behind the real Caddy and nginx, with TLS and the files of deploy/proxy."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import ANN, sharp

from lab.fleet.servers import free_port
from lab.report import ROOT
from seesr.networks import weights
from seesr.serving.middleware import LARGEST_BODY

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore::ResourceWarning")]
FILES = ROOT / "deploy/proxy"
CALLER, SPOOFED = "127.0.0.2", "203.0.113.9"
QUICK = {"num_inference_steps": 1, "seed": 1}
HEADERS = {"Authorization": f"Bearer {ANN}", "X-Forwarded-For": SPOOFED, "Content-Type": "image/png"}


class Behind(NamedTuple):
    """A server and its proxy."""

    server: str  # address
    proxy: str
    client: httpx.Client  # calls from CALLER, and trusts the proxy's certificate
    log: Path

    def address_of(self, response: httpx.Response) -> str:
        """The client of a request, by the server's log."""
        id, end = response.headers["x-request-id"], time.monotonic() + 10
        while True:
            entries = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
            for entry in entries:
                if entry.get("request") == id:
                    return entry["client"]
            assert time.monotonic() < end
            time.sleep(0.05)


def nginx(folder: Path, upstream: str, port: int) -> tuple[list[str], Path, dict[str, str]]:
    """The command, the certificate to trust, and the environment."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    site = (FILES / "nginx.conf").read_text()
    for pattern, value in (
        (r"listen 80;", f"listen 127.0.0.1:{free_port()};"), (r"listen 443 ssl;", f"listen 127.0.0.1:{port} ssl;"),
        (r"/etc/letsencrypt\S+/fullchain.pem", str(certificate)), (r"/etc/letsencrypt\S+/privkey.pem", str(key)),
        (r"seesr\.example\.com;", "localhost;"), (r"127\.0\.0\.1:5000", upstream),
    ):  # fmt: skip
        site, count = re.subn(pattern, value, site)
        assert count, pattern
    places = "".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    main = (
        f"{user} daemon off; pid {folder}/pid; events {{}} http {{ access_log off; {places} include {folder}/site; }}"
    )
    (folder / "site").write_text(site)
    (folder / "nginx.conf").write_text(main)
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "errors")], certificate, {}


def caddy(folder: Path, upstream: str, port: int) -> tuple[list[str], Path, dict[str, str]]:
    """The same for Caddy, which makes its certificate for localhost itself."""
    options = f"{{\nadmin off\nskip_install_trust\nhttp_port {free_port()}\n}}\n"
    (folder / "Caddyfile").write_text(options + (FILES / "Caddyfile").read_text())
    environment = {"DOMAIN": f"https://localhost:{port}", "UPSTREAM": upstream, "XDG_DATA_HOME": str(folder)}
    command = ["caddy", "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]
    return command, folder / "caddy/pki/authorities/local/root.crt", {**environment, "XDG_CONFIG_HOME": str(folder)}


@pytest.fixture(scope="module", params=[nginx, caddy], ids=["nginx", "caddy"])
def behind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    name = request.param.__name__
    if shutil.which(name) is None and "CI" not in os.environ:
        pytest.skip(f"{name}: apt-get install caddy nginx-light")
    folder, port = tmp_path_factory.mktemp(name), free_port()
    environment = {**os.environ, "SEESR_DATA": str(folder / "data"), "SEESR_API_KEYS": f"ann:{ANN}",
                   "ECHO_SECONDS": "2", "LOG_FORMAT": "json", "PYTHONPATH": str(ROOT)}  # fmt: skip
    server_command = [sys.executable, "-m", "lab.serve.echo", "--port", "0", "--bundle", str(weights.POCKET)]
    with (folder / "log").open("w") as log, (folder / "proxy-log").open("w") as proxy_log:
        server = subprocess.Popen(server_command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        assert server.stdout
        url = server.stdout.readline().split()[-1].rstrip("/")
        command, certificate, more = request.param(folder, url.removeprefix("http://"), port)
        proxy = subprocess.Popen(command, env={**os.environ, **more}, stdout=proxy_log, stderr=proxy_log)
        try:
            behind = connected(Behind(url, f"https://localhost:{port}", None, folder / "log"), certificate)  # type: ignore[arg-type]
            yield behind
            behind.client.close()
        finally:
            for process in (proxy, server):
                process.terminate()
                process.wait(30)
            server.stdout.close()


def connected(behind: Behind, certificate: Path) -> Behind:
    """With a client, once the server answers through the proxy."""
    end = time.monotonic() + 60
    while True:
        try:
            trust = ssl.create_default_context(cafile=str(certificate))
            transport = httpx.HTTPTransport(verify=trust, local_address=CALLER)
            client = httpx.Client(transport=transport, timeout=60, headers=HEADERS)
            if client.get(f"{behind.proxy}/ready").status_code == 200:
                return behind._replace(client=client)
        except (OSError, httpx.TransportError):
            pass
        assert time.monotonic() < end, behind.log.with_name("proxy-log").read_text()
        time.sleep(0.1)


def test_an_upload_its_large_result_and_its_link(behind: Behind) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), np.uint8)).save(
        buffer, "PNG", compress_level=0
    )
    data = buffer.getvalue()
    answer = behind.client.post(f"{behind.proxy}/upscale", params={**QUICK, "scale_factor": 1}, content=data)
    assert answer.status_code == 200 and len(data) > 35e6 and answer.content == data  # the engine gives its input back
    link = behind.client.get(f"{behind.proxy}/jobs/{answer.headers['x-job-id']}").json()["result"]
    assert link.startswith(f"{behind.proxy}/v1/outputs/")
    assert behind.client.get(link, headers={"Authorization": ""}).content == data


def test_events_come_at_once(behind: Behind) -> None:
    job = behind.client.post(f"{behind.proxy}/upscale", params={**QUICK, "wait": 0}, content=sharp()).json()["id"]
    statuses = []
    with behind.client.stream("GET", f"{behind.proxy}/jobs/{job}/events") as stream:
        assert stream.status_code == 200 and stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("data:"):  # what the server says when the event arrives
                now = httpx.get(f"{behind.server}/jobs/{job}", headers={"Authorization": f"Bearer {ANN}"}).json()
                statuses.append((json.loads(line.removeprefix("data:"))["status"], now["status"]))
    assert ("processing", "processing") in statuses and statuses[-1] == ("succeeded", "succeeded")


def test_the_server_sees_the_client_and_no_address_that_the_client_made_up(behind: Behind) -> None:
    assert behind.address_of(behind.client.get(f"{behind.proxy}/status")) == CALLER
    with httpx.Client(transport=httpx.HTTPTransport(local_address=CALLER), headers=HEADERS) as direct:
        assert behind.address_of(direct.get(f"{behind.server}/status")) == CALLER  # not a trusted proxy


def test_a_body_over_the_limit_is_refused(behind: Behind) -> None:
    size = re.compile(r"(?:client_max_body_size|max_size) (\d+)(m|MiB)\b")
    for name in ("Caddyfile", "nginx.conf"):
        match = size.search((FILES / name).read_text())
        assert match and int(match[1]) * 2**20 == LARGEST_BODY
    trust = ssl.create_default_context()
    trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    port = int(behind.proxy.rpartition(":")[2])
    plain = socket.create_connection(("127.0.0.1", port))
    with trust.wrap_socket(plain, server_hostname="localhost") as connection:
        head = f"POST /batches HTTP/1.1\r\nHost: localhost:{port}\r\nAuthorization: Bearer {ANN}\r\n"
        length = f"Content-Type: application/zip\r\nContent-Length: {LARGEST_BODY + 1}\r\n\r\n"
        connection.sendall((head + length).encode())
        sent, answer = 0, b""
        while not answer and sent < LARGEST_BODY / 10:  # as a client that looks for an answer while it sends
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                answer = connection.recv(200)
            connection.settimeout(20)
            if not answer:
                sent += connection.send(bytes(2**16))
    assert b" 413 " in answer.partition(b"\r\n")[0], answer
