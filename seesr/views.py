"""What the output file can show, in one table: a new view is one row here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from seesr.images.picture import Picture, enlarge

if TYPE_CHECKING:
    from seesr.result import Result


def enlarged(result: Result) -> Picture:
    """The result itself."""
    return result.picture


def comparison(result: Result) -> Picture:
    """The plain bicubic enlargement left, the result right; opaque."""
    plain = enlarge(result.source.visible, result.picture.size)
    return dataclasses.replace(result.picture, rgb=np.concatenate([plain, result.picture.rgb], axis=1), alpha=None)


def uncertainty(result: Result) -> Picture:
    """The uncertainty map as a grey picture of 16 bits.

    Raises:
        ValueError: there is no map without steering.
    """
    if result.uncertainty is None:
        raise ValueError("there is no uncertainty map without steering")
    return Picture(np.repeat(result.uncertainty[..., None], 3, axis=2), record=result.picture.record)


class View(NamedTuple):
    """One way to show a result.

    Attributes:
        draw: makes the picture to write.
        columns: how many pictures stand side by side; the size limits count them.
        deep: whether it needs a format of 16 bits.
        steered: whether it needs particles that can disagree.
    """

    draw: Callable[[Result], Picture]
    columns: int = 1
    deep: bool = False
    steered: bool = False


VIEWS = {
    "image": View(enlarged),
    "comparison": View(comparison, columns=2),
    "uncertainty": View(uncertainty, deep=True, steered=True),
}
