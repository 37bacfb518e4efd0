"""Replicate's API, with its official clients and with plain requests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import replicate
from cog_client import data_uri
from echo_server import serving
from replicate.exceptions import ReplicateError
from serving import ANN, LONG, QUICK, Serving, sharp

from lab.report import ROOT
from seesr import Engine, Settings

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
