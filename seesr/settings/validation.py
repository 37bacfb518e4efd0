"""Validates one value of a setting: the value in its type, or a one-line error."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any


class FieldError(ValueError):
    """A field of a request has a value that it cannot have.

    Attributes:
        field: its name.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


def checked(name: str, value: Any, about: Mapping[str, Any]) -> Any:
    """The value as its kind, or a FieldError that names field, value and limit."""
    kind = about["kind"]
    value = typed(name, value, kind)
    if "choices" in about and value not in about["choices"]:
        raise FieldError(f"{name} is {reprlib.repr(value)}; it must be one of {', '.join(about['choices'])}", name)
    if "ge" in about and not about["ge"] <= value <= about["le"]:
        raise FieldError(f"{name} is {value}; it must be from {about['ge']} to {about['le']}", name)
    if kind is str and len(value) > about.get("max_length", math.inf):
        raise FieldError(f"{name} has {len(value)} characters; at most {about['max_length']} are allowed", name)
    if kind is str and not is_text(value):
        raise FieldError(f"{name} contains a NUL character or an unpaired surrogate; remove it", name)
    return value


def typed(name: str, value: Any, kind: Any) -> Any:
    """The value in its type. JSON has one number type: 1.0 is also an int and 4 a float. NumPy's types count."""
    if kind is bool:
        good = type(value).__name__ in ("bool", "bool_")  # of NumPy too
    elif kind is str:
        good = isinstance(value, str)
    else:
        good = not isinstance(value, bool) and isinstance(value, numbers.Real) and is_finite(value)
        good = good and (kind is float or float(value) == int(float(value)))
    if not good:
        raise FieldError(
            f"{name} is {reprlib.repr(value)}; it must be {'an' if kind is int else 'a'} {kind.__name__}", name
        )
    return kind(value)


def is_finite(value: Any) -> bool:
    """Whether a number is finite in double precision; an integer of 400 digits is not."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
