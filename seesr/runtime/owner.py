"""The owner of the running image. A server sets it, so that images of different owners share no cached stages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

current_owner: ContextVar[str] = ContextVar("owner", default="")


@contextlib.contextmanager
def image_of(owner: str) -> Iterator[None]:
    """Runs the block for this owner."""
    token = current_owner.set(owner)
    try:
        yield
    finally:
        current_owner.reset(token)
