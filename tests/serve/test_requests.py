"""Requests with odd values on every route: a correct one-line error, no 5xx, no files left; on the echo engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from echo_server import PNG, QUICK, serving
from PIL import Image
from serving import sharp
from starlette.responses import JSONResponse
from starlette.testclient import TestClient

from lab.report import ROOT
from seesr.settings import Settings
from seesr.settings.parsing import from_data_uri

CASES = ROOT / "tests" / "data" / "http"
JSON = {"Content-Type": "application/json"}
IMAGE = sharp()
WORDS = base64.b64encode(IMAGE).decode()
URI = f"data:image/png;base64,{WORDS}"
DEEP = "[" * 100_000
ODD = [  # JSON texts that are no good value of any number, choice or list
    "9" * 400, "-" + "9" * 400, "1e999", "-1e999", "NaN", "Infinity", '"nan"', '"1e999"', '"' + "9" * 400 + '"', "[]",
    "[1]", "{}", '{"a": 1}', '"x"', '"\\u0000"', '"\\ud800"', "[[[[1]]]]", "-1", "1" + "0" * 5000, '"\u00b2"',
    DEEP, '{"a":' * 5000, '"' + "x" * 100_000 + '"',
]  # fmt: skip
SETTINGS = ("seed", "bandwidth", "scale_factor", "target_side", "num_inference_steps", "use_kds", "color_fix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("requests")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder, rate=1_000_000) as client:
        yield client


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path, client: TestClient) -> Iterator[None]:
    yield
    assert list((folder / "parts").iterdir()) == []


def refused(answer: Any, *statuses: int) -> str:
    """The one line of a refused request."""
    assert answer.status_code in (statuses or (400, 422)), (answer.status_code, answer.text[:300])
    detail = answer.json()["detail"]
    assert "\n" not in detail and len(detail) < 500, detail
    return detail


def post(client: TestClient, path: str, text: str) -> Any:
    return client.post(path, content=text.encode(), headers=JSON)


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_values_are_refused_in_one_line_on_every_route(client: TestClient, number: int) -> None:
    odd = ODD[number]
    statuses = (400, 413, 422) if odd == DEEP else ()  # 413: more values than a JSON body may hold
    image, quick = f'"image": "{URI}"', '"num_inference_steps": 1, "seed": 1'
    for name in ("wait", "deadline", "priority", "answer", *SETTINGS):
        if (name == "deadline" and odd == "-1") or (name == "color_fix" and odd == "x"):
            continue
        refused(post(client, "/upscale", f'{{{image}, "{name}": {odd}}}'), *statuses)
    for name in SETTINGS:
        refused(post(client, "/v1/models/x/seesr/predictions", f'{{"input": {{{image}, "{name}": {odd}}}}}'), *statuses)
        refused(post(client, "/", f'{{"inputs": "{WORDS}", "parameters": {{"{name}": {odd}}}}}'), *statuses)
        refused(
            post(client, "/invocations", f'{{"instances": [{{{image}}}], "parameters": {{"{name}": {odd}}}}}'),
            *statuses,
        )
    for name in ("image", "mask"):
        refused(post(client, "/upscale", f'{{{image}, {quick}, "{name}": {odd}}}'), *statuses)
        refused(
            post(client, "/v1/models/x/seesr/predictions", f'{{"input": {{{image}, {quick}, "{name}": {odd}}}}}'),
            *statuses,
        )
    for name in ("webhook", "webhook_events_filter", "input", "version"):
        if name == "webhook_events_filter" and odd == "[]":
            continue
        refused(
            post(client, "/v1/predictions", f'{{"version": "x", "input": {{{image}}}, "{name}": {odd}}}'), *statuses
        )
    for text in (f'{{"inputs": {odd}}}', f'{{"inputs": "{WORDS}", "parameters": [{odd}]}}', f'{{"instances": {odd}}}',
                 f'{{"instances": [{odd}]}}', f'{{"instances": [{{"image": {odd}}}]}}', odd):  # fmt: skip
        refused(post(client, "/invocations", text), *statuses)
        refused(post(client, "/upscale", text), *statuses)
    files = {"content": ("a.png", IMAGE, "image/png")}
    answer = client.post("/v1/files", files=files, data={"metadata": odd})
    assert answer.status_code in (201, 400, 413, 422), answer.text
    assert client.get("/v1/files").status_code == 200 and client.get("/v1/predictions").status_code == 200


@pytest.mark.parametrize("value", ["1e999", "nan", "9" * 400, "\u00b2", "x", "[1]", "\u0000", "-1", "True", "0x10"])
def test_odd_values_of_queries_and_forms(client: TestClient, value: str) -> None:
    for name in ("wait", "deadline", "priority", "answer", "seed", "scale_factor", "bandwidth"):
        refused(client.post("/upscale", params={name: value}, content=IMAGE, headers=PNG))
        refused(client.post("/upscale", data={name: value}, files={"image": ("a.png", IMAGE, "image/png")}))
    for name in ("deadline", "priority", "seed"):
        refused(client.post("/batches", data={name: value}, files={"image": ("a.png", IMAGE, "image/png")}))
    assert client.get("/v1/predictions", params={"cursor": value}).status_code in (200, 400)
    answer = post(client, "/v1/models/x/seesr/predictions", json.dumps({"input": {"image": URI}}))
    assert answer.status_code == 201


@pytest.mark.parametrize("id", ["x", "\u00e9" * 16, "0" * 5000, "%2e%2e", "%00", "a.b", "\u00b2", "0" * 32])
def test_odd_ids_are_not_found(client: TestClient, id: str) -> None:
    for path in ("/jobs/{}", "/jobs/{}/result", "/jobs/{}/events", "/batches/{}", "/batches/{}/result",
                 "/v1/predictions/{}", "/v1/files/{}", "/v1/files/{}/download", "/v1/outputs/{}"):  # fmt: skip
        assert client.get(path.format(id), follow_redirects=False).status_code in (404, 405, 200, 307), path
    body = {"input": {"image": f"http://127.0.0.1:5000/v1/files/{id}"}}
    assert client.post("/v1/models/x/seesr/predictions", json=body).status_code in (404, 422)


@pytest.mark.parametrize(
    "prefer", ["wait=1e999", "wait=\u00b2", "wait=-1", "wait=9" + "9" * 400, "wait=", "wait=x", ";"]
)
def test_odd_preferences(client: TestClient, prefer: str) -> None:
    body = {"input": {"image": URI, **{name: int(value) for name, value in QUICK.items()}}}
    headers = {"Prefer": prefer.encode()}
    assert client.post("/v1/models/x/seesr/predictions", json=body, headers=headers).status_code == 201


@pytest.mark.parametrize("path", sorted(CASES.iterdir()), ids=lambda path: path.name)
def test_the_requests_that_once_failed(client: TestClient, path: Path) -> None:
    if path.name.startswith("events"):
        refused(client.post("/v1/models/x/seesr/predictions", content=path.read_bytes(), headers=JSON), 422)
    elif path.name.startswith(("huge", "priority", "deadline")):
        refused(client.post("/upscale", content=path.read_bytes(), headers=JSON), 422)
    else:
        kind = JSON if path.suffix == ".json" else {"Content-Type": "multipart/form-data; boundary=xyz"}
        answer = client.post("/upscale", params=QUICK, content=path.read_bytes(), headers=kind)
        assert answer.status_code == 200, answer.text


def wrapped(text: str, width: int, end: str) -> str:
    return end.join(text[start : start + width] for start in range(0, len(text), width))


@pytest.mark.parametrize(
    "uri",
    [
        URI, WORDS, URI + "\n", "\n " + URI, WORDS + "\r\n",
        "data:image/png;base64," + wrapped(WORDS, 76, "\n"),
        "data:image/png;base64,\r\n" + wrapped(WORDS, 64, "\r\n") + "\r\n",
        "data:image/png;base64, " + wrapped(WORDS, 60, "\n  "),
        wrapped(WORDS, 76, "\n"),
        "data:image/png;base64," + urllib.parse.quote(WORDS, safe=""),
        "data:image/png;base64," + urllib.parse.quote(wrapped(WORDS, 76, "\r\n"), safe=""),
        "data:image/png;base64," + WORDS.rstrip("="),
        "data:image/png;base64," + WORDS.replace("+", "-").replace("/", "_"),
        "data:image/png;base64," + WORDS.replace("+", "-").replace("/", "_").rstrip("="),
        WORDS.replace("+", "-").replace("/", "_").rstrip("="),
        "DATA:image/png;base64," + WORDS, "Data:IMAGE/PNG;BASE64," + WORDS, "data:image/png; base64," + WORDS,
        "data:image/png ;base64 ," + WORDS, "data:image/png;charset=utf-8;base64," + WORDS,
        'data:image/png; name="a.png"; Base64,' + WORDS, "data:;base64," + WORDS, "data:image/png;base64;x=1," + WORDS,
        "data:image/png," + urllib.parse.quote_from_bytes(IMAGE),
    ],
)  # fmt: skip
def test_data_uris_are_read_as_programs_write_them(client: TestClient, uri: str) -> None:
    assert from_data_uri(uri) == IMAGE
    assert client.post("/", json={"inputs": uri, "parameters": {"seed": 1}}).status_code == 200
    body = {"instances": [{"image": uri}], "parameters": {"seed": 1, "mask": uri}}
    assert client.post("/invocations", json=body).status_code == 200
    if uri.strip()[:5].lower() == "data:":
        assert client.post("/upscale", json={"image": uri, "mask": uri, "seed": 1}).status_code == 200
        prediction = {"input": {"image": uri, "mask": uri, "seed": 1}}
        assert client.post("/v1/models/x/seesr/predictions", json=prediction).status_code == 201


@pytest.mark.parametrize(
    "uri", ["data:image/png;base64,@@", "data:image/png;base64,A", "data:", "data:image/png;base64"]
)
def test_what_is_no_data_uri_is_refused(client: TestClient, uri: str) -> None:
    assert "base64" in (detail := refused(client.post("/upscale", json={"image": uri}))) or "no data" in detail


def test_empty_fields_count_as_not_given(client: TestClient) -> None:
    empty = dict.fromkeys(("wait", "deadline", "priority", "answer", *SETTINGS, "mask"), "")
    files: dict[str, Any] = {"image": ("a.png", IMAGE, "image/png")}
    assert client.post("/upscale", data=empty, files=files).status_code == 200
    assert client.post("/upscale", params=empty, content=IMAGE, headers=PNG).status_code == 200
    assert client.post("/upscale", json={**empty, "image": URI}).status_code == 200
    assert client.post("/upscale", json={"image": URI, "mask": None, "wait": None, "deadline": None}).status_code == 200
    for name in ("", "mask.png"):
        form = {**files, "mask": (name, b"", "application/octet-stream")}
        assert client.post("/upscale", files=form).status_code == 200
    del empty["mask"]
    assert client.post("/batches", data=empty, files=files).json()["refused"] == []
    inputs = {**dict.fromkeys((*SETTINGS, "mask"), ""), "image": URI}
    assert client.post("/v1/models/x/seesr/predictions", json={"input": inputs}).status_code == 201
    face = {"inputs": WORDS, "parameters": dict.fromkeys((*SETTINGS, "mask"), "")}
    assert client.post("/", json=face).status_code == 200
    metadata = {"content": ("a.png", IMAGE, "image/png"), "metadata": ("", b"", "application/json")}
    assert client.post("/v1/files", files=metadata).status_code == 201


def test_large_images_in_base64_do_not_block_the_event_loop(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, encoding and the JSON around them run on worker threads."""
    on_loop: list[str] = []

    def watched(name: str, function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            result = function(*args, **more)
            with contextlib.suppress(RuntimeError):
                asyncio.get_running_loop()
                if len(result) > 10_000:
                    on_loop.append(name)
            return result

        return call

    for owner, name in ((base64, "b64encode"), (base64, "b64decode"), (JSONResponse, "render")):
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name)))
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    uri = f"data:image/png;base64,{encoded}"
    for path, body in (
        ("/", {"inputs": encoded}),
        ("/invocations", {"instances": [{"image": encoded}]}),
        ("/upscale", {"image": uri, "mask": uri}),
        ("/v1/models/x/seesr/predictions", {"input": {"image": uri}}),
    ):
        answer = client.post(path, json=body, headers={"Prefer": "wait=30"})
        assert answer.status_code in (200, 201) and len(answer.content) > 10_000
    assert on_loop == []


def test_null_counts_as_not_given(client: TestClient) -> None:
    names = [field.name for field in dataclasses.fields(Settings)]
    null = dict.fromkeys((*names, "mask"))
    options = dict.fromkeys(("wait", "deadline", "priority", "answer"))
    plain = client.post("/upscale", json={**null, **options, "image": URI, "seed": 1})
    assert plain.status_code == 200, plain.text
    job = client.get(f"/jobs/{plain.headers['x-job-id']}").json()
    assert job["settings"] == dataclasses.asdict(Settings(seed=1))
    prediction = {"input": {**null, "image": URI}, "webhook": None, "webhook_events_filter": None, "version": None}
    for path in ("/v1/models/x/seesr/predictions", "/v1/deployments/x/seesr/predictions"):
        assert client.post(path, json=prediction).status_code == 201
    version = client.get("/status").json()["version"]
    assert client.post("/v1/predictions", json={**prediction, "version": version}).status_code == 201
    for path in ("/", "/invocations"):
        for parameters in (null, None):
            assert client.post(path, json={"inputs": WORDS, "parameters": parameters}).status_code == 200
    instances = [{"image": WORDS}]
    for parameters in (null, None):
        assert client.post("/invocations", json={"instances": instances, "parameters": parameters}).status_code == 200
    file = {"content": ("a.png", IMAGE, "image/png")}
    assert client.post("/v1/files", files=file, data={"metadata": "null"}).status_code == 201


@pytest.mark.parametrize("path", ["/upscale", "/", "/invocations"])
def test_a_post_without_an_image_says_so(client: TestClient, path: str) -> None:
    key = "image" if path == "/upscale" else "inputs"
    requests: list[dict[str, Any]] = [
        {}, {"content": b"", "headers": PNG}, {"files": {"image": ("a.png", b"", "image/png")}},
        {"data": {"seed": "1"}, "files": {"x": ("", b"")}}, {"json": {}}, {"json": {key: ""}}, {"json": {key: None}},
        {"json": {key: "data:image/png;base64,"}},
    ]  # fmt: skip
    for options in requests:
        detail = refused(client.post(path, **options), 422)
        assert "is required" in detail or "no input 'x'" in detail, (options, detail)
    for body in ({}, {"image": ""}, {"image": None}):
        assert "image is required" in refused(client.post("/v1/models/x/seesr/predictions", json={"input": body}), 422)


def test_a_host_that_is_not_allowed_is_answered_with_the_setting(client: TestClient) -> None:
    for scheme in ("http", "https", "HTTPS"):
        detail = refused(client.post("/upscale", json={"image": f"{scheme}://example.com/a.png"}), 422)
        assert "SEESR_ALLOW_URLS=example.com" in detail


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_json_needs_its_content_type(client: TestClient, kind: str) -> None:
    body = json.dumps({"input": {"image": URI}}).encode()
    headers = {"Content-Type": kind} if kind else {}
    answer = client.post("/v1/models/x/seesr/predictions", content=body, headers=headers)
    assert "application/json" in refused(answer, 415)


def test_a_result_that_was_removed_is_not_found(client: TestClient, folder: Path) -> None:
    job = client.post("/upscale", params=QUICK, content=IMAGE, headers=PNG).headers["x-job-id"]
    batch = client.post("/batches", params=QUICK, files={"image": ("a.png", IMAGE, "image/png")}).json()
    while client.get(f"/batches/{batch['id']}").json()["status"] != "ended":
        pass
    link = client.get(f"/jobs/{job}").json()["result"]
    file = client.post("/v1/files", files={"content": ("a.png", IMAGE, "image/png")}).json()
    for path in [*(folder / "outputs").iterdir(), *(folder / "uploads").iterdir()]:
        path.unlink()
    for path in (f"/jobs/{job}/result", link, f"/v1/files/{file['id']}/download"):
        assert "removed" in refused(client.get(path), 404)
    prediction = client.get(f"/v1/predictions/{job}").json()
    assert prediction["data_removed"] is True and prediction["output"] is None
    answer = client.post("/v1/models/x/seesr/predictions", json={"input": {"image": file["urls"]["get"]}})
    assert "removed" in refused(answer, 404)
    assert client.get(f"/batches/{batch['id']}/result").status_code == 200
