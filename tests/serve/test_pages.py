"""The page of the API's documentation, made of a small document."""

from __future__ import annotations

import re
from typing import Any

import pytest

from seesr.serving import pages
from seesr.serving.pages import content_kinds, documentation, kind


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"$ref": "#/components/schemas/Job"}, "Job"),
        ({"anyOf": [{"$ref": "#/x/A"}, {"type": "string"}]}, "A or string"),
        ({"enum": ["a", 5]}, "a, 5"), ({"type": "string", "format": "uri"}, "uri"), ({}, "any"),
        ({"type": ["number", "null"], "minimum": 1.0, "maximum": 8.5}, "number or null, 1 to 8.5"),
        ({"type": "integer", "minimum": 1}, "integer"), ({"type": "integer", "maximum": 1}, "integer"),
    ],
)  # fmt: skip
def test_a_schema_in_a_few_words(schema: dict[str, Any], words: str) -> None:
    assert kind(schema) == words


def test_the_bodies_of_an_answer_are_named_once() -> None:
    media = {"a/b": {"schema": {"type": "string"}}, "c/d": {"schema": {"type": "string"}}, "e/f": {"schema": {}}}
    assert content_kinds({"content": media}) == "any, string" and content_kinds({}) == ""


def operation(tag: str, **more: Any) -> dict[str, Any]:
    return {"tags": [tag], "summary": f"Does <{tag}>.", "operationId": f"id_{tag}",
            "responses": {"200": {"description": "OK"}}, **more}  # fmt: skip


def test_the_page_has_every_operation_under_its_tag() -> None:
    parameter = {"name": "a", "in": "query", "schema": {"type": "string"}}
    body = {"content": {"application/json": {"schema": {"$ref": "#/x/Body"}, "example": {"b": 1}},
                        "image/*": {"schema": {}}}}  # fmt: skip
    document = {
        "info": {"title": "T", "version": "1", "description": "About <it>"}, "tags": [{"name": "One"}, {"name": "Two"}],
        "paths": {"/a": {"get": operation("One", parameters=[parameter])},
                  "/b": {"post": operation("Two", requestBody=body), "get": operation("One")}},
        "components": {"schemas": {"Body": {"type": "object"}}},
    }  # fmt: skip
    response = documentation(document)
    text = bytes(response.body).decode()
    order = re.findall(r"<h2>(\w+)</h2>|<b>(\w+)</b> (\S+)</code>", text)
    assert order == [("One", "", ""), ("", "GET", "/a"), ("", "GET", "/b"), ("Two", "", ""), ("", "POST", "/b"),
                     ("Schemas", "", "")]  # fmt: skip
    assert "About &lt;it&gt;" in text and "Does &lt;One&gt;." in text and "<title>T 1</title>" in text
    assert text.count("<th>parameter</th>") == 1 and "<td>a</td><td>query</td><td>string</td><td></td>" in text
    assert text.count("<th>request</th>") == 1 and "<td>application/json</td><td>Body</td>" in text
    assert text.count("&quot;b&quot;: 1") == 1 and text.count("<td>200</td><td>OK</td><td></td>") == 3
    assert '<details id="Body">' in text and response.headers["content-security-policy"] == pages.POLICY
    assert "\n &quot;type&quot;" in text, "one value a line"
