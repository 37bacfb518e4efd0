"""Times a function on a device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch


@torch.no_grad()
def least_seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    """The shortest of `times` runs, after one to warm up."""
    wait: Callable[[], object] = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    work()
    least = float("inf")
    for _ in range(times):
        wait()
        started = time.perf_counter()
        work()
        wait()
        least = min(least, time.perf_counter() - started)
    return least
