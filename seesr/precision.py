"""Half or single precision: which one a device computes in, the check for overflow, and the second try."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from seesr.budget import Budget

T = TypeVar("T")
log = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """A network gave NaN or infinity, in single precision too."""


def working_dtype(device: torch.device) -> torch.dtype:
    """What the networks run in: half precision on a GPU, single precision on a CPU."""
    return torch.float32 if device.type == "cpu" else torch.float16


def check_finite(values: Tensor, stage: str) -> None:
    """Refuses values of which one is NaN or infinite.

    Raises:
        NotFinite: names the stage.
    """
    if not torch.isfinite(values).all():
        raise NotFinite(f"the networks gave values that are not finite ({stage}); nothing is returned")


def again_in_float32(work: Callable[[], T], budget: Budget, *networks: Any) -> T:
    """Returns work(); if that was not finite in half precision, casts the networks up for a second try.

    Raises:
        NotFinite: not finite in single precision either.
    """
    dtype = networks[0].dtype
    try:
        return work()
    except NotFinite as error:
        if dtype == torch.float32:
            raise
        log.warning("%s: again in single precision", error)
    budget.redone += 1
    try:
        for network in networks:
            network.float()
        return work()
    finally:
        for network in networks:
            network.to(dtype)  # exact: the values came from there
