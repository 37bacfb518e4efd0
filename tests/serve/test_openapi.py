"""The OpenAPI document: it lists every route, and the responses match it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from echo_server import PNG, QUICK, serving
from serving import sharp
from starlette.testclient import TestClient

from lab.report import ROOT
from seesr.images.formats import FORMATS
from seesr.images.limits import LARGEST_OUTPUT
from seesr.serving import app, openapi, platforms
from seesr.serving.refusal import CODE_OF_STATUS, ERRORS
from seesr.settings import Settings
from seesr.settings.view_specs import VIEWS

DOCUMENT = openapi.document(openapi.operations_of(app.all_routes()))
IMAGE = sharp()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("openapi")) as client:
        yield client


def check(schema: dict[str, Any], value: Any) -> None:
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(value)


def checked(client: TestClient, method: str, path: str, query: str = "", **options: Any) -> Any:
    """A request whose response must be in the document; `{...}` of the path are filled with `names`."""
    names = options.pop("names", {})
    answer = client.request(method, path.format(**names) + query, **options)
    known = DOCUMENT["paths"][path][method.lower()]["responses"]
    assert str(answer.status_code) in known, (method, path, answer.status_code, answer.text[:300])
    types = known[str(answer.status_code)].get("content", {})
    kind = answer.headers.get("content-type", "").partition(";")[0]
    assert (kind in types or "*/*" in types) if types else not answer.content, (path, kind)
    if kind == "application/json" and kind in types:
        check(types[kind]["schema"], answer.json())
        if answer.status_code >= 400:
            assert answer.json()["code"] in types[kind]["examples"], (path, answer.text)
    return answer


def test_every_route_and_method_is_in_the_document() -> None:
    for method, path, _ in openapi.operations_of(app.all_routes()):
        assert DOCUMENT["paths"][path][method.lower()]["summary"].endswith(".")
    used = {handler for _, _, handler in openapi.operations_of(app.all_routes())}
    assert set(openapi.OPERATIONS) - used == {platforms.vertex}, "an operation without a route"
    operations = openapi.operations_of(app.all_routes())
    fresh = openapi.document.__wrapped__(operations)
    assert json.loads((ROOT / "docs/openapi.json").read_text()) == fresh == DOCUMENT, "run python -m lab.docs"
    assert openapi.document(operations) is DOCUMENT, "it is made once"


def test_the_description_for_user_interfaces() -> None:
    description = openapi.description()
    fields = {field["name"]: field for field in description["fields"]}
    assert [*fields] == [field.name for field in dataclasses.fields(Settings)]
    kinds = {name: fields[name]["kind"] for name in ("scale_factor", "seed", "user_prompt", "use_kds")}
    assert kinds == {"scale_factor": "float", "seed": "int", "user_prompt": "text", "use_kds": "switch"}
    assert fields["output_format"]["choices"] == [*FORMATS] and fields["scale_factor"]["default"] == 4
    limits = description["limits"]
    assert limits["pixels"] == LARGEST_OUTPUT and set(limits["longest_side"]) == set(FORMATS)
    columns = limits["columns"]
    assert columns["all"] == max(columns.values()) and set(columns) == {*VIEWS, "all"}


def test_references_resolve_and_examples_are_valid() -> None:
    text = json.dumps(DOCUMENT)
    for place, name in set(re.findall(r'"#/components/(\w+)/(\w+)"', text)):
        assert name in DOCUMENT["components"][place]
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for methods in DOCUMENT["paths"].values():
        for about in methods.values():
            for media in about.get("requestBody", {}).get("content", {}).values():
                if "example" in media:
                    check(media["schema"], media["example"])
    for code, example in DOCUMENT["components"]["examples"].items():
        check({"$ref": "#/components/schemas/Error"}, example["value"])
        assert example["value"]["code"] == code


def test_answers_are_as_described(client: TestClient) -> None:
    files = {"image": ("a.png", IMAGE, "image/png")}
    job = checked(client, "POST", "/upscale", params=QUICK, content=IMAGE, headers=PNG).headers["x-job-id"]
    checked(client, "POST", "/upscale", params={**QUICK, "answer": "link"}, files=files)
    checked(client, "POST", "/upscale", params={**QUICK, "wait": 0}, content=IMAGE, headers=PNG)
    batch = checked(client, "POST", "/batches", params=QUICK, files=files).json()["id"]
    file = checked(client, "POST", "/v1/files", files={"content": ("a.png", IMAGE, "image/png")}).json()
    for path in ("/upscale", "/quote"):  # an upload is an image of every route that takes a URL
        assert checked(client, "POST", path, json={"image": file["urls"]["get"]}).status_code == 200
        missing = checked(client, "POST", path, json={"image": f"{file['urls']['get'][:-32]}{'0' * 32}"})
        assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    body = {"input": {"image": file["urls"]["get"], "seed": 1}, "version": "you/seesr"}
    prediction = checked(client, "POST", "/v1/predictions", json=body, headers={"Prefer": "wait"}).json()
    link = client.get(f"/jobs/{job}").json()["result"].partition("/v1/outputs/")[2]
    inference = {"inputs": "data:image/png;base64,iVBORw0KGgo=", "parameters": {"seed": 1}}
    for path in ("/", "/invocations"):
        checked(client, "POST", path, json=inference)
    names = {
        "id": job,
        "owner": "you",
        "name": "seesr",
        "version": client.get("/v1/models/you/seesr").json()["latest_version"]["id"],
    }
    for path, methods in DOCUMENT["paths"].items():
        if "get" not in methods or path == "/events":  # which does not end
            continue
        ids = {**names, "id": batch if path.startswith("/batches") else file["id"] if "files" in path else job}
        if path == "/v1/outputs/{name}":
            name, _, query = link.partition("?")
            assert checked(client, "GET", path, f"?{query}", names={"name": name}).status_code == 200
            ids["name"] = "nothing"
        if path == "/v1/predictions/{id}/stream":
            query = prediction["urls"]["stream"].partition("?")[2]
            assert checked(client, "GET", path, f"?{query}", names={"id": prediction["id"]}).status_code == 200
        if path == "/batches/{id}/result":
            while client.get(f"/batches/{batch}").json()["status"] != "ended":
                pass
        answer = checked(client, "GET", path, names=ids)
        assert answer.status_code == (404 if "signature" in str(methods["get"].get("parameters")) else 200), (
            path,
            answer.text,
        )
        if "{id}" in path:
            checked(client, "GET", path, names={**ids, "id": "nothing"})
    checked(client, "POST", "/v1/predictions/{id}/cancel", names={"id": prediction["id"]})
    checked(client, "DELETE", "/jobs/{id}", names={"id": job})
    checked(client, "DELETE", "/v1/files/{id}", names={"id": file["id"]})
    checked(client, "GET", "/v1/predictions", "?cursor=x")


def test_every_code_is_raised_and_every_raised_code_is_known() -> None:
    text = "".join(path.read_text() for path in (ROOT / "seesr/serving").glob("*.py") if path.name != "refusal.py")
    raised = set(re.findall(r'(?:Refused|answer)\(\s*"(\w+)"', text))
    used = set(re.findall(r'"(\w+)"', text)) | set(CODE_OF_STATUS.values())
    assert raised <= set(ERRORS) and len(raised) > 15
    assert set(ERRORS) <= used, set(ERRORS) - used


@pytest.mark.parametrize(
    ("path", "options", "code", "field", "setting"),
    [
        ("/nothing", {}, "not_found", None, None),
        ("/live", {}, "method_not_allowed", None, None),
        ("/upscale", {"content": b"{", "headers": {"Content-Type": "application/json"}}, "invalid_body", None, None),
        ("/upscale", {"json": {"seed": 1}}, "invalid_input", "image", None),
        ("/upscale?seed=x", {"content": IMAGE, "headers": PNG}, "invalid_input", "seed", None),
        ("/upscale?scale_factor=9", {"content": IMAGE, "headers": PNG}, "invalid_input", "scale_factor", None),
        ("/upscale?sead=1", {"content": IMAGE, "headers": PNG}, "invalid_input", "sead", None),
        ("/upscale?wait=-1", {"content": IMAGE, "headers": PNG}, "invalid_input", "wait", None),
        ("/upscale?region=9,9,900,900", {"content": IMAGE, "headers": PNG}, "invalid_input", "region", None),
        ("/upscale", {"content": b"no image", "headers": PNG}, "invalid_input", "image", None),
        ("/upscale", {"json": {"image": "http://a.test/a.png"}}, "url_not_allowed", "image", "SEESR_ALLOW_URLS"),
        ("/upscale", {"files": {"image": IMAGE, "mask": b"no"}}, "invalid_input", "mask", None),
        ("/v1/predictions", {"json": {"input": {"image": "x"}}}, "invalid_input", "version", None),
        ("/v1/predictions", {"json": {"version": "0", "input": {}}}, "version_not_found", "version", None),
        ("/v1/models/a/b/predictions", {"json": {"input": {}}}, "not_found", None, None),
        ("/v1/models/a/seesr/predictions", {"json": {"input": {"image": "x", "seed": -1}}}, "invalid_input", "seed",
         None),
        ("/v1/files", {"files": {"other": IMAGE}}, "invalid_input", "content", None),
        ("/live", {"headers": {"Host": "a.test"}}, "wrong_host", None, "SEESR_PUBLIC_URL"),
        ("/upscale", {"headers": {"Origin": "http://a.test"}}, "forbidden_origin", None, "SEESR_PUBLIC_URL"),
    ],
)  # fmt: skip
def test_an_error_names_its_code_and_what_to_change(
    client: TestClient, path: str, options: dict[str, Any], code: str, field: str | None, setting: str | None
) -> None:
    answer = client.post(path, **options)
    body = answer.json()
    check({"$ref": "#/components/schemas/Error"}, body)
    assert (body["code"], body["field"], body["setting"]) == (code, field, setting), body
    assert answer.status_code == body["status"] == ERRORS[code].status


def test_the_documentation_page_loads_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/docs")
    assert answer.status_code == 200 and "unsafe" not in answer.headers["content-security-policy"]
    assert not re.search(r'(?:src|href)="(?:https?:)?//', answer.text) and "<script" not in answer.text
    for path in DOCUMENT["paths"]:
        assert path in answer.text
    assert client.get("/docs.css").headers["content-type"].startswith("text/css")


def test_the_page_of_the_repository_is_small() -> None:
    assert sum(path.stat().st_size for path in Path(app.__file__).parent.glob("page/docs.*")) < 2000
