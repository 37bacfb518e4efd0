"""What callers send in JSON, queries and forms -> Settings and bytes. For every door that speaks in words."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import urllib.parse
from collections.abc import Mapping
from typing import Any

from seesr.settings import Settings

MASK = frozenset({"mask"})  # beside the settings
BOOLEANS = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}


def settings_of(given: Mapping[str, Any], others: frozenset[str] = frozenset()) -> Settings:
    """Settings from JSON values, or from the words of a query or a form.

    Args:
        others: names that are not settings and are passed over.

    Raises:
        ValueError: an unknown name, or a value outside its range; one line.
    """
    kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(Settings)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        if name in others:
            continue
        if name not in kinds:
            raise ValueError(f"there is no input {name!r}; there are {', '.join(['image', *kinds])}")
        kind = kinds[name]
        if isinstance(value, str) and kind is bool and value.lower() in BOOLEANS:
            value = BOOLEANS[value.lower()]
        elif isinstance(value, str) and kind in (int, float) and value:
            with contextlib.suppress(ValueError):  # Settings says what is wrong with it
                value = float(value)
        elif value == "" and kind is not str:
            continue  # an empty field of a form
        values[name] = value
    return Settings(**values)


def mask_of(given: Mapping[str, Any]) -> bytes | None:
    """The mask that stands beside the settings, in base64 or as a data URI; None if there is none.

    Raises:
        ValueError: it is neither.
    """
    words = given.get("mask")
    if words is None:
        return None
    if not isinstance(words, str):
        raise ValueError("mask must be base64 or a data URI")
    return from_data_uri(words)


def from_data_uri(uri: str) -> bytes:
    """The bytes of a data URI, or of plain base64.

    Raises:
        ValueError: it is no base64.
    """
    head, comma, words = uri.partition(",") if uri.startswith("data:") else ("data:;base64", ",", uri)
    if not comma:
        raise ValueError("the data URI has no data")
    if not head.endswith(";base64"):
        return urllib.parse.unquote_to_bytes(words)
    try:
        return base64.b64decode(words, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the image is no valid base64") from None
