"""Access control: every route without a key, with a wrong one and with another owner's; hosts and origins."""

from __future__ import annotations

import base64
import hmac
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from echo_server import PNG, QUICK, serving
from pydantic import SecretStr
from serving import ANN, BOB, sharp
from starlette.routing import BaseRoute, Mount, Route
from starlette.testclient import TestClient

from seesr.config import Configuration
from seesr.serving import access, health, identity
from seesr.serving.keys import Keys
from seesr.serving.refusal import Refused

OPEN, KEY, OWN = "open", "key", "own"  # needs nothing; needs a key; shows only what belongs to the key
ROUTES = {
    ("GET", "/"): OPEN,
    ("GET", "/docs"): OPEN,
    ("GET", "/docs.css"): OPEN,
    ("GET", "/page.css"): OPEN,
    ("GET", "/texts.json"): OPEN,
    ("GET", "/blend.js"): OPEN,
    ("GET", "/editor.js"): OPEN,
    ("GET", "/page.js"): OPEN,
    ("GET", "/sample.webp"): OPEN,
    ("GET", "/settings"): OPEN,
    ("GET", "/openapi.json"): OPEN,
    ("GET", "/live"): OPEN,
    ("GET", "/ready"): OPEN,
    ("GET", "/health"): OPEN,
    ("GET", "/ping"): OPEN,
    ("GET", "/v1/outputs/{name}"): OPEN,  # to whoever has the signed link
    ("GET", "/v1/predictions/{id}/stream"): OPEN,  # to whoever has the signed link
    ("GET", "/status"): KEY,
    ("GET", "/metrics"): KEY,
    ("GET", "/usage"): KEY,
    ("POST", "/"): KEY,
    ("POST", "/invocations"): KEY,
    ("POST", "/upscale"): KEY,
    ("POST", "/quote"): KEY,
    ("GET", "/events"): KEY,
    ("GET", "/jobs/{id}"): OWN,
    ("DELETE", "/jobs/{id}"): OWN,
    ("GET", "/jobs/{id}/result"): OWN,
    ("GET", "/jobs/{id}/events"): OWN,
    ("POST", "/batches"): KEY,
    ("GET", "/batches/{id}"): OWN,
    ("GET", "/batches/{id}/result"): OWN,
    ("POST", "/v1/predictions"): KEY,
    ("GET", "/v1/predictions"): KEY,
    ("GET", "/v1/predictions/{id}"): OWN,
    ("POST", "/v1/predictions/{id}/cancel"): OWN,
    ("GET", "/v1/models/{owner}/{name}"): KEY,
    ("POST", "/v1/models/{owner}/{name}/predictions"): KEY,
    ("GET", "/v1/models/{owner}/{name}/versions"): KEY,
    ("GET", "/v1/models/{owner}/{name}/versions/{version}"): KEY,
    ("POST", "/v1/deployments/{owner}/{name}/predictions"): KEY,
    ("POST", "/v1/files"): KEY,
    ("GET", "/v1/files"): KEY,
    ("GET", "/v1/files/{id}"): OWN,
    ("DELETE", "/v1/files/{id}"): OWN,
    ("GET", "/v1/files/{id}/download"): OWN,
    ("GET", "/v1/webhooks/default/secret"): KEY,
}


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server with two keys, called under a name that is not this machine's."""
    with serving(tmp_path_factory.mktemp("keys"), "http://images.test", api_keys=f"ann:{ANN},bob:{BOB}") as client:
        yield client


@pytest.fixture(scope="module")
def ids(client: TestClient) -> dict[str, str]:
    """What Ann owns: {"jobs": id, "files": id, "batches": id}."""
    image = {"content": ("a.png", sharp(), "image/png")}
    job = client.post("/upscale", params=QUICK, content=sharp(), headers={**PNG, **bearer(ANN)})
    assert job.status_code == 200
    file = client.post("/v1/files", files=image, headers=bearer(ANN)).json()
    batch = client.post("/batches", params=QUICK, files=image, headers=bearer(ANN)).json()
    return {"jobs": job.headers["x-job-id"], "files": file["id"], "batches": batch["id"]}


def walked(client: TestClient) -> list[tuple[str, str]]:
    """Every (method, route) of the application."""
    routes: Any = client.app
    return [
        (method, route.path)
        for route in routes.routes
        if isinstance(route, Route)
        for method in sorted((route.methods or set()) - {"HEAD"})
    ]


ENDLESS = {("GET", "/events")}  # ends when the caller hangs up, which this client cannot; test_plain_api.py reads it


def path_of(route: str, ids: dict[str, str]) -> str:
    kind = route.split("/")[2 if route.startswith("/v1") else 1].replace("predictions", "jobs")
    path = route.replace("{id}", ids.get(kind, "0" * 32)).replace("{owner}", "x").replace("{name}", "seesr")
    return path.replace("{version}", "1" * 64)


def test_every_route_is_classified_and_asks_for_a_key(client: TestClient, ids: dict[str, str]) -> None:
    routes = walked(client)
    assert set(routes) == set(ROUTES), "a new route: say in ROUTES who may call it"
    for method, route in routes:
        path, kind = path_of(route, ids), ROUTES[method, route]
        body = {"content": sharp(), "headers": PNG} if method == "POST" else {}
        for token in (None, "wrong-token-0123456789", ANN[:-1], ""):
            headers = {**body.get("headers", {}), **({} if token is None else bearer(token))}
            answer = client.request(method, path, **{**body, "headers": headers})
            assert (answer.status_code == 401) == (kind != OPEN), (method, route, token, answer.status_code)
        if kind == OWN:
            answer = client.request(method, path, headers=bearer(BOB))
            assert answer.status_code == 404, (method, route, answer.text)
        elif kind == KEY and method == "GET" and (method, route) not in ENDLESS:
            answer = client.request(method, path, headers=bearer(BOB))
            assert not any(id in answer.text for id in ids.values()), (method, route)
    for method, route in (
        ("HEAD", "/upscale"),
        ("PUT", "/"),
        ("POST", "/live"),
        ("POST", "/ping"),
        ("GET", "/nothing"),
    ):
        assert client.request(method, route).status_code == 401, (method, route)
    for route in ("jobs", "files"):  # what is refused has changed nothing
        prefix = "/v1" if route == "files" else ""
        assert client.get(f"{prefix}/{route}/{ids[route]}", headers=bearer(ANN)).status_code == 200


def test_an_anonymous_body_is_refused_before_it_is_stored(client: TestClient) -> None:
    files = {"image": ("a.png", sharp(), "image/png")}
    for token in ({}, bearer("wrong-token-0123456789")):
        for options in ({"files": files}, {"content": sharp(), "headers": PNG}, {"json": {"inputs": "AAAA"}}):
            headers = {**options.get("headers", {}), **token}
            assert client.post("/", **{**options, "headers": headers}).status_code == 401


def vertex_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/v1/endpoints/1/health")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/v1/endpoints/1:predict")


@pytest.mark.parametrize("platform", ["vertex", "sagemaker", "huggingface"])
@pytest.mark.parametrize("keys", ["", f"ann:{ANN}"])
def test_a_platform_opens_exactly_the_routes_that_it_calls(
    platform: str, keys: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vertex_environment(monkeypatch)
    expected = access.platform_routes(platform, os.environ) - access.OPEN
    with serving(tmp_path, "http://10.1.2.3:8080", platform=platform, api_keys=keys) as client:
        results = set()
        for method, route in walked(client):
            answer = client.request(method, path_of(route, {}), headers={"Content-Type": "text/plain"})
            if answer.status_code != 401 and (method, route) not in access.OPEN:
                results.add((method, route))
        assert results == expected
        predict = next(route for method, route in expected if method == "POST")
        body = {"inputs": "!", "instances": [{"image": "!"}]}
        assert client.post(predict, json=body, headers=bearer("a token of the platform")).status_code == 422


def test_without_the_setting_no_platform_route_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vertex_environment(monkeypatch)
    with serving(tmp_path, api_keys=f"ann:{ANN}") as client:
        for method, route in set().union(*(access.platform_routes(name, os.environ) for name in
                                           ("vertex", "sagemaker", "huggingface"))) - access.OPEN:  # fmt: skip
            assert client.request(method, route, content=sharp(), headers=PNG).status_code == 401, route


def test_vertex_needs_its_variables() -> None:
    with pytest.raises(ValueError, match="SEESR_PLATFORM=vertex needs AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE"):
        access.platform_routes("vertex", {})


@pytest.fixture(scope="module")
def open_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server without keys."""
    with serving(tmp_path_factory.mktemp("open"), public_url="https://images.example") as client:
        yield client


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:5000", 200), ("localhost", 200), ("LOCALHOST:5000", 200), ("[::1]:5000", 200), ("127.9.9.9", 200),
        ("images.example", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("evil@localhost", 421),
        ("localhost.evil.example", 421), ("0.0.0.0", 421), ("169.254.169.254", 421), ("[::1", 421), ("x y", 421),
    ],
)  # fmt: skip
def test_a_server_without_keys_checks_the_host_header(open_client: TestClient, host: str, status: int) -> None:
    for path in ("/live", "/status", "/"):
        assert open_client.get(path, headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("client", "status"), [("203.0.113.9", 401), ("10.0.0.2", 401), ("127.0.0.1", 200), ("::1", 200)]
)
def test_a_server_without_keys_refuses_what_a_proxy_forwards(open_client: TestClient, client: str, status: int) -> None:
    forwarded = TestClient(open_client.app, "http://localhost", client=(client, 5))
    paths = "/live", "/status", "/v1/predictions"
    assert [forwarded.get(path).status_code for path in paths] == [200, status, status]


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example", "file://", "x"])
@pytest.mark.parametrize("keyed", [False, True])
def test_cross_origin_writes_are_refused(open_client: TestClient, client: TestClient, origin: str, keyed: bool) -> None:
    requested = client if keyed else open_client
    headers = {"Origin": origin, **(bearer(ANN) if keyed else {})}
    for method, route in ROUTES:
        if method != "GET":
            answer = requested.request(method, path_of(route, {}), content=sharp(), headers={**PNG, **headers})
            assert answer.status_code == 403, (method, route)
    assert requested.get("/settings", headers=headers).status_code == 200


@pytest.mark.parametrize("origin", ["http://127.0.0.1:5000", "https://images.example"])
def test_the_page_of_this_server_may_post(open_client: TestClient, origin: str) -> None:
    answer = open_client.post("/upscale", params=QUICK, content=sharp(), headers={**PNG, "Origin": origin})
    assert answer.status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP, identity"])
def test_an_encoded_body_is_refused(client: TestClient, encoding: str) -> None:
    headers = {**PNG, **bearer(ANN), "Content-Encoding": encoding}
    answer = client.post("/upscale", content=b"\x1f\x8b", headers=headers)
    assert answer.status_code == 415 and "Content-Encoding" in answer.json()["detail"]


def test_every_answer_has_the_headers_that_protect_browsers(client: TestClient, ids: dict[str, str]) -> None:
    for token in ({}, bearer(ANN)):
        for method, route in set(ROUTES) - (ENDLESS if token else set()):
            answer = client.request(method, path_of(route, ids), headers=token)
            assert answer.headers["x-content-type-options"] == "nosniff", (method, route)
            assert answer.headers["referrer-policy"] == "no-referrer", (method, route)
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"], (method, route)
            assert answer.headers["content-security-policy"].startswith("default-src"), (method, route)


def secret_of(client: TestClient, token: str) -> bytes:
    secret = client.get("/v1/webhooks/default/secret", headers=bearer(token)).json()["key"]
    return base64.b64decode(secret.removeprefix("whsec_"))


def test_a_webhook_secret_is_its_owners_alone_and_forges_no_link(client: TestClient, ids: dict[str, str]) -> None:
    """Links and webhooks are signed with keys of their own, which tell nothing of each other."""
    service = client.app.state.service  # type: ignore[attr-defined]
    ann, bob = secret_of(client, ANN), secret_of(client, BOB)
    keys = [ann, bob, identity.derived(service.secret, "links"), service.secret]
    assert all(len(key) == 32 for key in keys) and len(set(keys)) == 4
    assert ann == service.webhook_secret("ann")  # what they are signed with
    job = service.jobs.find(ids["jobs"])
    link = service.link("", job)
    assert client.get(link).status_code == 200
    for key in (ann, bob, service.secret):
        expires = int(time.time()) + 1000
        signature = hmac.new(key, f"{job.output}:{expires}".encode(), "sha256").hexdigest()
        forged = f"/v1/outputs/{job.output}?expires={expires}&signature={signature}"
        assert client.get(forged).status_code == 404


@pytest.mark.parametrize(
    ("expires", "signature"),
    [
        ("9999999999", "\u00e9"),
        ("\u00b2", "x"),
        ("9" * 5000, "x"),
        ("", ""),
        ("-1", "x"),
        ("1e9", "x"),
    ],
)
def test_a_forged_link_finds_nothing(client: TestClient, expires: str, signature: str) -> None:
    answer = client.get("/v1/outputs/x.png", params={"expires": expires, "signature": signature})
    assert answer.status_code == 404


@pytest.mark.parametrize("size", [0, 1, 31])
def test_a_short_secret_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * size)
    with pytest.raises(ValueError, match=f"secret has {size} bytes and needs 32"):
        identity.read_secret(tmp_path)


def test_the_status_shows_no_foreign_ids() -> None:
    def own(id: str) -> bool:
        return id == "mine"

    for running, seen in (({"id": "mine"}, "mine"), ({"id": "theirs"}, None)):
        assert health.without_foreign({"running": running}, own)["running"]["id"] == seen  # type: ignore[index]
    assert health.without_foreign({"running": None}, own) == {"running": None}
    status = {
        "running": [{"id": "theirs"}, {"id": "mine"}],
        "workers": {"a": {"job": "theirs"}, "b": {"state": "idle"}},
    }
    result = health.without_foreign(status, own)
    assert [entry["id"] for entry in result["running"]] == [None, "mine"] and result["workers"]["a"]["job"] is None


def test_data_files_are_readable_only_by_the_server_user(tmp_path: Path) -> None:
    """Also those that a server before this one wrote."""
    data = tmp_path / "data"
    (data / "inputs").mkdir(parents=True)
    data.chmod(0o755)
    (data / "jobs.sqlite").touch(0o644)
    before = os.umask(0o022)
    try:
        identity.make_private(data)
        with serving(data) as client:
            image = {"content": ("a.png", sharp(), "image/png")}
            assert client.post("/v1/files", files=image).status_code == 201
            assert client.post("/upscale", params=QUICK, content=sharp(), headers=PNG).status_code == 200
            paths = [data, *data.rglob("*")]
            modes = {path.relative_to(tmp_path): stat.S_IMODE(path.stat().st_mode) for path in paths}
    finally:
        os.umask(before)
    assert len(modes) > 10
    for path, mode in modes.items():
        assert mode == (0o700 if (tmp_path / path).is_dir() else 0o600), (path, oct(mode))


def test_the_scrape_token_reads_metrics_and_nothing_else(tmp_path: Path) -> None:
    with serving(tmp_path, api_keys=f"ann:{ANN}", metrics_token="scrape-me") as client:
        assert client.get("/metrics", headers=bearer("scrape-me")).status_code == 200
        for path in ("/status", "/usage", "/v1/predictions", "/jobs/x"):
            assert client.get(path, headers=bearer("scrape-me")).status_code == 401
        for token in ("", "scrape", "scrape-me2"):
            assert client.get("/metrics", headers=bearer(token)).status_code == 401
    with serving(tmp_path / "none", api_keys=f"ann:{ANN}") as client:
        assert client.get("/metrics", headers=bearer("")).status_code == 401


def admitting(public_url: str | None = None, scrape: str = "", **values: Any) -> access.Access:
    return access.Access(Keys(Configuration(**values)), [], None, public_url, {}, scrape)


@pytest.mark.parametrize(
    ("client", "remote"),
    [
        (None, False),
        (("testclient", 5), False),
        (("127.0.0.1", 5), False),
        (("::1", 5), False),
        (("10.0.0.1", 5), True),
    ],
)
def test_where_a_request_comes_from(client: Any, remote: bool) -> None:
    assert access.is_remote({"client": client}) is remote and access.is_remote({}) is False


@pytest.mark.parametrize(
    ("host", "own"), [("localhost", True), ("127.0.0.1", True), ("::1", True), ("10.0.0.1", False), ("a.test", False)]
)
def test_the_names_of_this_machine(host: str, own: bool) -> None:
    assert access.is_loopback(host) is own


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [("GET", "/a", ("GET", "/a")), ("HEAD", "/a", ("GET", "/a")), ("POST", "/a", ("POST", "/a")), ("PUT", "/a", None),
     ("GET", "/b/5", ("GET", "/b/{id}")), ("GET", "/c", None), ("GET", "/a/x", None)],
)  # fmt: skip
def test_the_route_that_answers(method: str, path: str, found: tuple[str, str] | None) -> None:
    def handler() -> None: ...

    routes: list[BaseRoute] = [Mount("/a", app=handler)]  # type: ignore[arg-type]
    routes += [Route("/a", handler), Route("/a", handler, methods=["POST"]), Route("/b/{id}", handler)]
    scope = {"type": "http", "method": method, "path": path, "headers": []}
    assert access.route_of(routes[1:], scope) == found == access.route_of(routes, scope)


def test_a_host_header_may_be_missing_and_is_cut_in_the_message() -> None:
    local = admitting(public_url="https://images.example:8443")
    for host in ("", "images.example:8443", "images.example", "127.0.0.1:5"):
        local.check_host(host)
    with pytest.raises(Refused, match="set SEESR_PUBLIC_URL") as error:
        local.check_host("x" * 5000)
    assert len(error.value.detail) < 300 and error.value.code == "wrong_host"


def test_an_origin_is_that_of_the_host_or_of_the_public_address() -> None:
    local = admitting(public_url="https://Images.example:8443")
    for origin in ("https://images.EXAMPLE:8443", "http://here:5"):
        local.check_origin(origin, "here:5")
    for origin in ("https://images.example", "http://here", "here:5", "://", "x" * 5000):
        with pytest.raises(Refused, match="may not call this server") as error:
            local.check_origin(origin, "here:5")
        assert len(error.value.detail) < 300


@pytest.mark.parametrize(
    ("header", "scrape", "key"),
    [
        ("Bearer scrape-me", True, False), ("bearer  scrape-me ", True, False), ("Token scrape-me", False, False),
        ("scrape-me", False, False), ("", False, False), (f"Bearer {ANN}", False, True), (f"token {ANN}", False, True),
        (f"Basic {ANN}", False, False), (ANN, False, False),
    ],
)  # fmt: skip
def test_tokens_come_in_the_authorization_header(header: str, scrape: bool, key: bool) -> None:
    keyed = admitting(api_keys=SecretStr(f"ann:{ANN}"), scrape="scrape-me")
    assert keyed.may_scrape(header) is scrape and (keyed.key(header) is not None) is key
    assert not admitting(api_keys=SecretStr(f"ann:{ANN}")).may_scrape("Bearer ")


def test_the_owner_of_a_server_without_keys_has_no_token() -> None:
    local = admitting()
    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    assert local.local and local.admit(scope) is access.LOCAL_KEY
    assert not admitting(api_keys=SecretStr(f"ann:{ANN}")).local and access.LOCAL_KEY.sha256 == ""
