"""Replicate's API, with its official clients and with plain requests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import replicate
from cog_client import data_uri
from echo_server import serving
from replicate.exceptions import ReplicateError
from serving import ANN, LONG, QUICK, Serving, sharp
from starlette.testclient import TestClient

from lab.report import ROOT
from seesr import Engine, Settings
from seesr.serving import replicate as api
from seesr.serving.job import Job
from seesr.serving.refusal import Refused

CLIENT = ROOT / "build/js/node_modules/replicate"


@contextlib.contextmanager
def connected(service: Serving, token: str) -> Iterator[replicate.Client]:
    client = replicate.Client(api_token=token, base_url=service.url)
    yield client
    client._client.close()


@pytest.fixture
def client(service: Serving) -> Iterator[replicate.Client]:
    with connected(service, ANN) as client:
        yield client


def test_the_official_python_client_runs_the_readmes_example(client: replicate.Client, engine: Engine) -> None:
    image = sharp()
    output = client.run("you/seesr", input={"image": io.BytesIO(image), "scale_factor": 4, **QUICK})
    assert output.read() == engine.run(image, Settings(**QUICK)).data  # pyright: ignore[reportAttributeAccessIssue]
    version = client.models.get("you/seesr").latest_version
    assert version is not None
    assert "scale_factor" in version.openapi_schema["components"]["schemas"]["Input"]["properties"]
    again = client.run(f"you/seesr:{version.id}", input={"image": io.BytesIO(image), **QUICK})
    assert len(again.read()) > 0  # pyright: ignore[reportAttributeAccessIssue]


def test_it_creates_polls_follows_progress_and_cancels(client: replicate.Client) -> None:
    prediction = client.predictions.create(model="you/seesr", input={"image": io.BytesIO(sharp()), **LONG})
    seen, deadline = [], time.monotonic() + 60
    while len({progress.percentage for progress in seen}) < 3:
        assert time.monotonic() < deadline
        prediction.reload()
        if prediction.progress:
            seen.append(prediction.progress)
        time.sleep(0.05)
    prediction.cancel()
    prediction.wait()
    assert prediction.status == "canceled"
    assert prediction.id in [result.id for result in client.predictions.list()]


def test_it_uploads_lists_and_deletes_files(client: replicate.Client) -> None:
    image = sharp()
    file = client.files.create(io.BytesIO(image))
    assert client.files.get(file.id).size == len(image)
    assert file.id in [result.id for result in client.files.list()]
    output = client.run("you/seesr", input={"image": file.urls["get"], **QUICK})
    assert len(output.read()) > 0  # pyright: ignore[reportAttributeAccessIssue]
    client.files.delete(file.id)
    with pytest.raises(ReplicateError, match="no file has this ID"):
        client.files.get(file.id)


def test_a_wrong_token_a_missing_id_and_another_model(service: Serving, client: replicate.Client) -> None:
    with connected(service, "wrong") as stranger, pytest.raises(ReplicateError, match="valid authentication"):
        stranger.predictions.list()
    with pytest.raises(ReplicateError, match="no job has this ID"):
        client.predictions.get("nothing")
    with pytest.raises(ReplicateError, match="no model you/other here"):
        client.run("you/other", input={"image": io.BytesIO(sharp())})
    with pytest.raises(ReplicateError, match="does not exist; use"):
        client.predictions.create(version="0" * 64, input={"image": io.BytesIO(sharp())})


def test_a_failed_prediction_raises_with_its_reason(client: replicate.Client) -> None:
    with pytest.raises(ReplicateError, match="not an image"):
        client.run("you/seesr", input={"image": io.BytesIO(b"no image")})


def test_the_official_javascript_client(service: Serving, tmp_path: Path) -> None:
    if not CLIENT.exists() or not shutil.which("node"):
        message = "needs node, and the client: npm install --prefix build/js replicate"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    (tmp_path / "photo.png").write_bytes(sharp())
    script = Path(__file__).with_name("client.mjs")
    environment = {**os.environ, "CLIENT": str(CLIENT), "URL": service.url, "TOKEN": ANN, "FOLDER": str(tmp_path)}
    done = subprocess.run(["node", str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (tmp_path / "photo-x4.png").read_bytes() == service.upscale().content
    assert result == {
        "progress": True,
        "canceled": "canceled",
        "listed": True,
        "wrong": 401,
        "missing": 404,
        "uploaded": True,
        "streamed": ["output", "done"],
    }


def create(service: Serving, prefer: str | None, **changes: object) -> dict:
    headers = {} if prefer is None else {"Prefer": prefer}
    body = {"input": {"image": data_uri(sharp()), **QUICK, **changes}}
    answer = service.ask("POST", "/v1/models/you/seesr/predictions", json=body, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()


def test_prefer_wait_never_answers_processing(service: Serving) -> None:
    assert create(service, "wait")["status"] == "succeeded"
    short = create(service, "wait=1", **LONG)
    assert short["status"] == "starting"
    assert service.ask("GET", f"/v1/predictions/{short['id']}").json()["status"] == "processing"
    assert service.ask("POST", f"/v1/predictions/{short['id']}/cancel").json()["status"] == "canceled"
    assert create(service, None)["status"] == "starting"


def test_the_python_client_streams_logs_output_and_the_end(client: replicate.Client, engine: Engine) -> None:
    image = sharp()
    events = list(client.stream("you/seesr", input={"image": io.BytesIO(image), **QUICK}))
    kinds = [event.event.value for event in events]
    assert kinds[-2:] == ["output", "done"] and set(kinds[:-2]) <= {"logs"} and events[-1].data == "{}"
    assert events[-2].data.read() == engine.run(image, Settings(**QUICK)).data  # type: ignore[attr-defined]


def test_a_stream_of_a_failed_and_a_canceled_prediction(service: Serving) -> None:
    def stream(prediction: dict) -> str:
        return service.ask("GET", prediction["urls"]["stream"].removeprefix(service.url), None).text

    slow = create(service, None, **LONG)
    service.ask("POST", f"/v1/predictions/{slow['id']}/cancel")
    assert stream(slow).endswith('data: {"reason": "canceled"}\n\n')
    job = service.upscale(sharp()[:-40], wait=0).json()  # its header is whole
    service.until(job["id"], "failed")
    text = stream(service.ask("GET", f"/v1/predictions/{job['id']}").json())
    assert "event: error\n" in text and "damaged" in text and text.endswith('data: {"reason": "error"}\n\n')
    assert service.ask("GET", f"/v1/predictions/{job['id']}/stream").status_code == 404


def test_what_a_prediction_holds(service: Serving) -> None:
    result = create(service, "wait")
    assert set(result) >= {"id", "model", "version", "status", "input", "output", "error", "logs", "metrics", "urls"}
    assert result["output"].startswith("data:image/png;base64,") and result["metrics"]["predict_time"] > 0
    assert result["created_at"].endswith("Z") and result["logs"].splitlines()[-1].startswith("100%|##########| ")
    secret = service.ask("GET", "/v1/webhooks/default/secret").json()["key"]
    assert secret.startswith("whsec_")


def test_over_https_the_output_is_a_signed_link(tmp_path: Path) -> None:
    with serving(tmp_path, public_url="https://pictures.example") as client:
        body = {"input": {"image": data_uri(sharp()), **QUICK}}
        answer = client.post("/v1/models/you/seesr/predictions", json=body, headers={"Prefer": "wait"})
        output = answer.json()["output"]
        assert output.startswith("https://pictures.example/v1/outputs/")
        assert client.get(output.removeprefix("https://pictures.example")).content == sharp()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "input is required"),
        ({"input": 5}, "input is 5; it must be an object"),
        ({"input": {}}, "input.image is required"),
        ({"input": {"image": 5}}, "image must be a data URI"),
        ({"input": {"image": "/etc/passwd"}}, "image must be a data URI"),
        ({"input": {"image": "file:///etc/passwd"}}, "image must be a data URI"),
        ({"input": {"image": "data:image/png;base64,@@"}}, "not valid base64"),
        ({"input": {"image": "http://127.0.0.1:1/x.png"}}, "not allowed here"),
        ({"input": {"image": "data:,x", "scale_factor": 9}}, "must be from 1 to 8"),
        ({"input": {"image": "data:,x"}, "webhook": "http://example.com"}, "webhook must be an https URL"),
        (
            {"input": {"image": "data:,x"}, "webhook_events_filter": ["all"]},
            "must be one of start, output",
        ),
    ],
)
def test_a_bad_prediction_is_refused_in_one_line(service: Serving, body: dict, message: str) -> None:
    answer = service.ask("POST", "/v1/models/you/seesr/predictions", json=body)
    assert answer.status_code == 422 and message in answer.json()["detail"]


@pytest.fixture(scope="module")
def app_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server in this process whose engine gives its input back."""
    with serving(tmp_path_factory.mktemp("replicate"), rate=100_000) as client:
        yield client


def service_of(client: TestClient) -> Any:
    return client.app.state.service  # type: ignore[attr-defined]


def test_predictions_are_listed_page_by_page(app_client: TestClient) -> None:
    journal, now = service_of(app_client).jobs.journal, time.time()
    settings = Job.of("local", Settings(seed=1)).settings
    expected = [Job("local", settings, status="failed", created=now - number) for number in range(2 * api.PAGE + 1)]
    for job in [*expected, Job("another", settings, status="failed", created=now)]:
        journal.keep(job)
    path, pages = "/v1/predictions", list[list[str]]()
    while path:
        page = app_client.get(path).json()
        pages.append([result["id"] for result in page["results"]])
        assert page["previous"] is None
        path = (page["next"] or "").removeprefix("http://127.0.0.1:5000")
    assert [len(page) for page in pages] == [100, 100, 1] and [id for page in pages for id in page] == [
        job.id for job in expected
    ]
    journal.run("DELETE FROM jobs WHERE id = ?", expected[-1].id)
    page = app_client.get(f"/v1/predictions?cursor={expected[api.PAGE - 1].created!r}").json()
    assert len(page["results"]) == 100 and page["next"] is None
    for cursor in ("x", "nan", "inf"):
        answer = app_client.get("/v1/predictions", params={"cursor": cursor})
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")
    journal.run("DELETE FROM jobs")


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        ("wait", 60.0), ("wait=5", 5.0), ("wait=2.5", 2.5), ("wait=61", 60.0), ("respond-async, wait=7", 7.0),
        ("respond-async", 0.0), ("", 0.0), ("wait=x", 60.0), ("wait=999999999", 60.0), ("wait=0", 0.0),
        ("waiting=5", 0.0),
    ],
)  # fmt: skip
def test_how_long_a_request_wants_to_wait(prefer: str, seconds: float) -> None:
    request: Any = SimpleNamespace(headers={"prefer": prefer} if prefer else {})
    assert api.preferred_wait(request) == seconds
    document = json.loads((ROOT / "docs/openapi.json").read_text())
    headers = document["paths"]["/v1/predictions"]["post"]["parameters"]
    (about,) = [header["description"] for header in headers if header["name"] == "Prefer"]
    assert f"({api.LONGEST_WAIT:g} at most)" in about


def test_a_prediction_has_times_of_its_own_in_its_metrics(app_client: TestClient) -> None:
    service = service_of(app_client)
    settings = Job.of("ann", Settings(seed=1)).settings
    job = Job("ann", settings, name="a.png", created=100.0, started=101.0, completed=104.0, metrics={"seed": 1})
    shown = api.prediction(service, "http://here", job)
    assert shown["metrics"] == {"seed": 1, "predict_time": 3.0, "total_time": 4.0}
    assert (shown["created_at"], shown["started_at"]) == ("1970-01-01T00:01:40.000Z", "1970-01-01T00:01:41.000Z")
    assert shown["input"] == {"image": "a.png", **settings} and shown["model"] == "ann/seesr"
    assert (shown["output"], shown["data_removed"], shown["urls"]["web"]) == (None, False, "http://here/")
    for missing in ("started", "completed"):
        waiting = api.prediction(service, "http://here", dataclasses.replace(job, **{missing: None}))
        assert waiting["metrics"] == {"seed": 1}
    unknown = api.prediction(service, "http://here", dataclasses.replace(job, version="0" * 64))
    assert unknown["version"] == "0" * 64 and unknown["model"] == "ann/seesr"


def test_the_output_is_a_link_over_https_and_the_data_over_http() -> None:
    service: Any = SimpleNamespace(link=lambda base, job: f"{base}/link", data_uri=lambda job: "data:")
    done = Job("ann", {}, status="succeeded", output="a.png")
    assert api.output_of(service, "https://here", done) == ("https://here/link", False)
    assert api.output_of(service, "http://here", done) == ("data:", False)
    assert api.output_of(service, "http://here", done, whole=False) == ("http://here/link", False)
    for other in (dataclasses.replace(done, status="failed"), dataclasses.replace(done, output=None)):
        assert api.output_of(service, "https://here", other) == (None, False)


def test_a_canceled_prediction_is_shown_as_canceled_before_its_next_tile(app_client: TestClient) -> None:
    engine = service_of(app_client).jobs.engines.loaded[service_of(app_client).jobs.version]
    body = {"version": "you/seesr", "input": {"image": data_uri(sharp()), **QUICK}}
    done = app_client.post("/v1/predictions", json=body, headers={"Prefer": "wait"}).json()
    assert done["status"] == "succeeded"
    assert app_client.post(f"/v1/predictions/{done['id']}/cancel").json()["status"] == "succeeded"
    engine.seconds = 5.0
    running = app_client.post("/v1/predictions", json=body).json()
    answer = app_client.post(f"/v1/predictions/{running['id']}/cancel")
    assert answer.json()["status"] == "canceled"
    engine.seconds = 0.0


def test_models_and_versions(app_client: TestClient) -> None:
    model = app_client.get("/v1/models/anyone/seesr").json()
    version = model["latest_version"]
    assert (model["owner"], model["name"], model["run_count"]) == ("anyone", "seesr", 0)
    assert model["url"] == "http://127.0.0.1:5000/" and version["created_at"].endswith("Z")
    assert app_client.get(f"/v1/models/anyone/seesr/versions/{version['id']}").json() == version
    assert app_client.get("/v1/models/anyone/seesr/versions").json()["results"] == [version]
    body = {"input": {"image": data_uri(sharp()), **QUICK}}
    for name in (version["id"], "you/seesr", f"you/seesr:{version['id']}"):
        assert app_client.post("/v1/predictions", json={**body, "version": name}).status_code == 201
    for name, code in (("you/other", "version_not_found"), ("0" * 200, "version_not_found"), (None, "invalid_input")):
        answer = app_client.post("/v1/predictions", json={**body, "version": name})
        assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, code, "version")
        assert len(answer.json()["detail"]) < 300


def streamed(*changes: Any, removed: bool = False, closing: bool = False) -> list[dict[str, str]]:
    """The events of a prediction whose job changes so; None: nothing changes for a while."""
    first, *later = changes

    async def changed(id: str, revision: int, seconds: float) -> Any:
        return later.pop(0)

    def result(job: Job) -> str:
        if removed:
            raise Refused("expired", "the result was removed")
        return "data:image/png;base64,AA=="

    jobs = SimpleNamespace(find=lambda id: first, changed=changed, closing=closing)
    service = SimpleNamespace(jobs=jobs, base=lambda request: "http://here", data_uri=result,
                              check_link=lambda name, query: None)  # fmt: skip
    request: Any = SimpleNamespace(
        app=SimpleNamespace(state=SimpleNamespace(service=service)), path_params={"id": "a"}, query_params={}
    )

    async def read() -> list[str]:
        response: Any = await api.stream(request)
        return [part async for part in response.body_iterator]

    events = []
    for part in asyncio.run(read()):
        lines = [line.partition(": ") for line in part.strip().split("\n")]
        events.append({name or "comment": value for name, _, value in lines if name != "data"}
                      | {"data": "|".join(value for name, _, value in lines if name == "data")})  # fmt: skip
    return events


def change(status: str, revision: int, **values: Any) -> Job:
    return Job("ann", {}, id="a", status=status, revision=revision, **values)


def test_a_stream_sends_each_line_of_the_logs_once() -> None:
    running = change("processing", 1, logs="one\n")
    events = streamed(
        change("starting", 0), running, dataclasses.replace(running), change("processing", 2, logs="one\ntwo\nthree\n"),
        change("succeeded", 3, logs="one\ntwo\nthree\n", output="a.png"),
    )  # fmt: skip
    assert [(event.get("event"), event["data"], event.get("id")) for event in events] == [
        ("logs", "one", "1"), (None, "", None), ("logs", "two|three", "2"),
        ("output", "data:image/png;base64,AA==", "3"), ("done", "{}", "3"),
    ]  # fmt: skip


def test_a_stream_says_why_it_ends() -> None:
    failed = streamed(change("failed", 4, error="too large"))
    assert [(event["event"], event["data"]) for event in failed] == [
        ("error", "too large"), ("done", '{"reason": "error"}')
    ]  # fmt: skip
    canceled = streamed(change("canceled", 4))
    assert [(event["event"], event["data"]) for event in canceled] == [("done", '{"reason": "canceled"}')]
    removed = streamed(change("succeeded", 4, output="a.png"), removed=True)
    assert [(event["event"], event["data"]) for event in removed] == [
        ("error", "the result was removed"), ("done", '{"reason": "error"}')
    ]  # fmt: skip
    stopping = streamed(change("starting", 4), closing=True)
    assert [(event["event"], event["data"], event["id"]) for event in stopping] == [
        ("error", "the server is shutting down", "4")
    ]  # fmt: skip
