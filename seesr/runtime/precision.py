"""Working precision: dtype per device, the check for NaN and infinity, and the retry in float32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from seesr.runtime.memory import Budget

T = TypeVar("T")
log = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """A network gave NaN or infinity, in single precision too."""


def working_dtype(device: torch.device, name: str = "auto") -> torch.dtype:
    """What the networks run in.

    Args:
        name: "auto": half precision on a GPU, single precision on a CPU. "float32": single precision. "bfloat16": on a
            CPU only.

    Raises:
        ValueError: bfloat16 on a GPU; one line.
    """
    if name == "bfloat16":
        if device.type != "cpu":
            raise ValueError("SEESR_PRECISION is bfloat16, which is for CPUs: unset it on a GPU")
        return torch.bfloat16
    return torch.float32 if device.type == "cpu" or name == "float32" else torch.float16


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as the configuration has it."""
    return str(dtype).removeprefix("torch.")


def chosen_precision(device: torch.device, dtype: torch.dtype) -> str:
    """The name of a dtype that is not the device's own; otherwise empty."""
    return "" if dtype == working_dtype(device) else name_of(dtype)


def check_finite(values: Tensor, stage: str) -> None:
    """Refuses values of which one is NaN or infinite. On a GPU the host waits for the answer.

    Raises:
        NotFinite: names the stage.
    """
    if not torch.isfinite(values).all():
        raise NotFinite(f"values that are not finite in stage {stage}; check the weights with `seesr doctor`")


def retry_in_float32(work: Callable[[], T], budget: Budget, *networks: nn.Module) -> T:
    """Returns work(); if it was not finite in half precision, casts the networks to float32 and retries.

    The networks stay in float32 for the rest of the image; the caller ends it with budget.restore(). The half-precision
    parameters stay at their addresses, which CUDA graphs read.

    Raises:
        NotFinite: not finite in single precision either.
    """
    try:
        return work()
    except NotFinite as error:
        if next(networks[0].parameters()).dtype == torch.float32:
            raise
        log.warning("%s; retrying in float32", error)
    budget.redone += 1
    for network in networks:
        for value in (*network.parameters(), *network.buffers()):
            if value.is_floating_point():
                budget.cast.append((value, value.data))
                value.data = value.data.float()
    return work()
