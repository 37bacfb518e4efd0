"""The errors of the HTTP API are those that docs/http-api.md lists."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from starlette.exceptions import HTTPException

from lab.report import ROOT
from seesr.serving import app
from seesr.serving.middleware import answer
from seesr.serving.refusal import CODE_OF_STATUS, ERRORS, Refused

ROW = re.compile(r"^\| `(\w+)` \| (\d{3}) \| (.*?) \| (.*?) \| (?:`(\w+)`)? ?\|$", re.M)
DOCUMENTED = {row[0]: row[1:] for row in ROW.findall((ROOT / "docs/http-api.md").read_text())}


@pytest.mark.parametrize("code", ERRORS)
def test_an_error_is_as_documented(code: str) -> None:
    status, meaning, remedy, setting = DOCUMENTED[code]
    assert ERRORS[code][1:] == (meaning, remedy, setting or None)
    response = answer(code, "detail", field="image", more=1)
    body = json.loads(bytes(response.body))
    assert response.status_code == body["status"] == Refused(code, "x").status == int(status)
    assert (body["code"], body["detail"], body["field"], body["setting"]) == (code, "detail", "image", setting or None)
    assert body["more"] == 1


def test_every_documented_error_exists() -> None:
    assert set(DOCUMENTED) == set(ERRORS)


@pytest.mark.parametrize("status", [400, 404, 405, 418])
def test_errors_of_the_framework_have_codes_of_the_same_status(status: int) -> None:
    error = HTTPException(status, "what was wrong", {"Allow": "GET"})
    response = asyncio.run(app.refused(None, error))  # type: ignore[arg-type]
    body = json.loads(bytes(response.body))
    assert body["status"] == (status if status in CODE_OF_STATUS else 500) == ERRORS[body["code"]].status
    assert body["detail"] == "what was wrong" and response.headers["allow"] == "GET"
    assert asyncio.run(app.refused(None, HTTPException(404, ""))).status_code == 404  # type: ignore[arg-type]


def test_a_message_is_one_line() -> None:
    error = Refused("not_found", "two\n lines", "image", Allow="GET")
    assert (error.detail, error.field, error.headers) == ("two lines", "image", {"Allow": "GET"})
