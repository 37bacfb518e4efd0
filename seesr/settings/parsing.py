"""Parses settings and images from JSON, query strings and forms."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Any

from seesr.settings import Settings
from seesr.settings.validation import FieldError

MASK = frozenset({"mask"})  # beside the settings
STANDARD = str.maketrans("-_", "+/")  # of the URL-safe base64 alphabet
REPLACED_INPUTS = {  # inputs of other SeeSR containers, and what replaces them here
    "sample_times": "send one request for each sample, with its own seed",
}
SHOWN = 5  # unknown names in a message
BOOLEANS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


def settings_of(inputs: Mapping[str, Any], others: frozenset[str] = frozenset()) -> Settings:
    """Settings from JSON values, or from the text values of a query or a form.

    Args:
        others: names that are not settings and are passed over.

    Raises:
        FieldError: unknown names, or values outside their range; one line that names all of them.
    """
    fields = {field.name: field.metadata for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {}
    unknown: list[str] = []
    problems: list[FieldError] = []
    for name, value in inputs.items():
        if name in others:
            continue
        if name in REPLACED_INPUTS:
            problems.append(FieldError(f"there is no input {name!r}; {REPLACED_INPUTS[name]}", name))
            continue
        if name not in fields:
            unknown.append(name[:60])
            continue
        kind = fields[name]["kind"]
        if value is None or (value == "" and (kind is not str or "choices" in fields[name])):
            continue  # null, or an empty field of a form
        if isinstance(value, str) and kind is bool and value.lower() in BOOLEANS:
            value = BOOLEANS[value.lower()]
        elif isinstance(value, str) and kind in (int, float):
            with contextlib.suppress(ValueError):  # Settings raises the error with its limit
                value = float(value)
        values[name] = value
    if unknown:
        names = ", ".join(map(repr, unknown[:SHOWN]))
        problems.append(FieldError(f"there is no input {names}; there are {', '.join(['image', *fields])}", unknown[0]))
    settings = None
    try:
        settings = Settings(**values)
    except FieldError as error:
        problems.append(error)
    if settings is None or problems:
        raise FieldError("; ".join(map(str, problems)), problems[0].field)
    return settings


def mask_of(inputs: Mapping[str, Any]) -> bytes | None:
    """The mask that stands beside the settings, in base64 or as a data URI; None if there is none.

    Raises:
        ValueError: it is neither.
    """
    value = inputs.get("mask")
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError("mask must be base64 or a data URI")
    return from_data_uri(value)


def from_data_uri(uri: str) -> bytes:
    """The bytes of a data URI, or of plain base64.

    Line breaks, spaces, percent encoding, missing padding, the URL-safe alphabet and any case of scheme and parameters
    are accepted, as browsers and programs write them.

    Raises:
        ValueError: it is no base64.
    """
    head, comma, payload = "data:;base64", ",", uri
    if uri.lstrip()[:5].lower() == "data:":
        head, comma, payload = uri.partition(",")
    if not comma:
        raise ValueError("the data URI has no data")
    if "base64" not in [parameter.strip().lower() for parameter in head.split(";")[1:]]:
        return urllib.parse.unquote_to_bytes(payload)
    if "%" in payload:
        payload = urllib.parse.unquote(payload)
    payload = "".join(payload.split()).translate(STANDARD).rstrip("=")
    try:
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the image is not valid base64") from None
