"""The routes of inference platforms on the echo engine: base64 in and out, masks, and what is not finished."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Any

import pytest
from echo_server import serving
from serving import sharp
from starlette.testclient import TestClient

from lab.report import ROOT
from lab.serve.echo import TILES
from seesr.serving import platforms
from seesr.serving.job import Job
from seesr.serving.platforms import routes
from seesr.serving.requests import (
    LONGEST_WAIT,
    BatchRequest,
    HuggingFaceRequest,
    PredictionRequest,
    UpscaleRequest,
    VertexRequest,
    is_empty,
    parse,
    shown,
)
from seesr.settings.validation import FieldError

IMAGE = sharp()
ENCODED = base64.b64encode(IMAGE).decode()
URI = f"data:image/png;base64,{ENCODED}"
QUICK = {"num_inference_steps": 1, "seed": 5}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("platforms"), rate=100_000) as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/invocations"])
def test_an_image_in_base64_is_answered_with_one(client: TestClient, path: str) -> None:
    body = client.post(path, json={"inputs": ENCODED, "parameters": QUICK}).json()
    assert set(body) == {"image", "format", "seed", "metrics"}
    assert (base64.b64decode(body["image"]), body["format"], body["seed"]) == (IMAGE, "png", 5)
    assert body["metrics"]["tiles"] == TILES


@pytest.mark.parametrize("mask", [ENCODED, URI])
def test_a_mask_may_be_plain_base64(client: TestClient, mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    masked: list[bool] = []
    real = service.jobs.submit

    def submit(job: Job, image: Any, mask: Any) -> None:
        masked.append(job.masked and mask.read_bytes() == IMAGE)
        real(job, image, mask)

    monkeypatch.setattr(service.jobs, "submit", submit)
    body = {"instances": [{"image": ENCODED}], "parameters": {**QUICK, "mask": mask}}
    assert len(client.post("/invocations", json=body).json()["predictions"]) == 1 and masked == [True]
    client.post("/", json={"inputs": ENCODED, "parameters": {**QUICK, "mask": ""}})
    assert masked == [True, False]


def test_instances_are_answered_in_their_order(client: TestClient) -> None:
    images = [IMAGE, sharp(20, 20), sharp(30, 30)]
    instances = [{"image": base64.b64encode(image).decode()} for image in images]
    body = client.post("/invocations", json={"instances": instances, "parameters": QUICK}).json()
    assert [base64.b64decode(result["image"]) for result in body["predictions"]] == images


def test_an_image_that_fails_or_takes_too_long_is_an_error(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    (engine,) = service.jobs.engines.loaded.values()

    def fail(*values: Any) -> Any:
        raise ValueError("the image is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "run", fail)
        answer = client.post("/", json={"inputs": ENCODED, "parameters": QUICK})
        assert (answer.status_code, answer.json()["detail"]) == (422, "the image is damaged")
        assert answer.json()["code"] == "job_failed"
    monkeypatch.setattr(platforms, "LONGEST_WAIT", 0.01)
    monkeypatch.setattr(engine, "seconds", 0.5)
    answer = client.post("/", json={"inputs": ENCODED, "parameters": QUICK})
    assert (answer.status_code, answer.json()["code"]) == (503, "unavailable") and "in time" in answer.json()["detail"]
    end = time.monotonic() + 10
    while service.jobs.running is not None:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("health", "predict"), [("/h", "/p"), ("/h", None), (None, "/p"), (None, None)])
def test_vertex_names_its_routes(health: str | None, predict: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, path in (("AIP_HEALTH_ROUTE", health), ("AIP_PREDICT_ROUTE", predict)):
        monkeypatch.delenv(name, raising=False)
        if path is not None:
            monkeypatch.setenv(name, path)
    named = {(route.path, route.endpoint): route.methods for route in routes()}
    fixed = {("/", platforms.hugging_face), ("/ping", platforms.ping), ("/invocations", platforms.invocations)}
    more = {(health, platforms.ping)} if health else set()
    assert set(named) == fixed | more | ({(predict, platforms.vertex)} if predict else set())
    assert named["/invocations", platforms.invocations] == {"POST"}


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (UpscaleRequest, {"wait": 0}, None), (UpscaleRequest, {"wait": "600"}, None),
        (UpscaleRequest, {"wait": 600.1}, "wait is 600.1; it must be from 0 to 600"),
        (UpscaleRequest, {"wait": -0.1}, "wait is -0.1; it must be from 0 to 600"),
        (UpscaleRequest, {"deadline": 0.001}, None), (UpscaleRequest, {"deadline": 1e6}, None),
        (UpscaleRequest, {"deadline": 0.0009}, "deadline is 0.0009; it must be from 0.001 to 1e"),
        (UpscaleRequest, {"deadline": 1000001}, "deadline is 1000001; it must be from 0.001 to 1e"),
        (UpscaleRequest, {"wait": "nan"}, "wait is nan; it must be a finite number"),
        (UpscaleRequest, {"priority": "x"}, "priority is 'x'; it must be one of urgent, normal, low"),
        (UpscaleRequest, {"answer": ["file"]}, "answer is ['file']; it must be one of file, link"),
        (BatchRequest, {"wait": "x", "answer": 5}, None),
        (PredictionRequest, {"input": {}}, None), (PredictionRequest, {}, "input is required"),
        (PredictionRequest, {"input": [1]}, "input is [1]; it must be an object"),
        (PredictionRequest, {"input": {}, "webhook_events_filter": "start"}, "it must be a list"),
        (HuggingFaceRequest, {"inputs": 5}, "inputs is 5; it must be a string"),
        (VertexRequest, {"instances": [{"image": "x"}] * 100}, None),
        (VertexRequest, {"instances": []}, "instances is []"),
        (VertexRequest, {"instances": [{"image": "x"}] * 101}, "instances is "),
        (VertexRequest, {"instances": [{}]}, "instances.0.image is required"),
    ],
)  # fmt: skip
def test_the_fields_of_requests(model: Any, values: dict[str, Any], message: str | None) -> None:
    if message is None:
        parse(model, values)
        return
    with pytest.raises(FieldError) as error:
        parse(model, values)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FieldError, match="input\\."):
        parse(model, values, "input.")


def test_what_is_not_given_has_a_default() -> None:
    request = parse(UpscaleRequest, {"wait": "", "priority": None, "deadline": "", "seed": "3", "scale_factor": ""})
    assert (request.wait, request.priority, request.deadline, request.answer) == (60.0, "normal", None, "file")
    assert request.options() == {"priority": "normal", "deadline": None} and request.settings().seed == 3
    assert parse(UpscaleRequest, {"wait": 0}).wait == 0 and parse(UpscaleRequest, {"deadline": 5}).deadline == 5
    documented = (ROOT / "docs/server.md").read_text()
    assert f"seconds to wait for the result, 0 to {LONGEST_WAIT:g}; default {request.wait:g}." in documented


@pytest.mark.parametrize(
    ("value", "empty"), [(None, True), ("", True), (0, False), ("0", False), (False, False), ([], False)]
)
def test_which_values_are_empty(value: Any, empty: bool) -> None:
    assert is_empty(value) is empty


def test_a_value_in_a_message_is_short() -> None:
    assert shown("x" * 60) == "x" * 60 and shown("x" * 61) == "x" * 57 + "..." and len(shown(["x" * 99] * 99)) <= 60
