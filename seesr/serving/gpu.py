"""Memory and utilization of a GPU by NVML, without touching CUDA."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import TypedDict

log = logging.getLogger(__name__)


class Usage(TypedDict, total=False):
    """Attributes:
    used, total: memory, bytes.
    utilization: share of the latest sample period in which a kernel ran, 0 to 1; absent where it is not known (MIG).
    """

    used: int
    total: int
    utilization: float


def gpu_usage(index: int = 0) -> Usage | None:
    """The usage of a GPU that this process sees; None where there is none or NVML fails.

    Args:
        index: of CUDA's device, among those of CUDA_VISIBLE_DEVICES.
    """
    import pynvml

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    places = [str(index)] if visible is None else [place.strip() for place in visible.split(",")][index : index + 1]
    if not places or not places[0] or places[0].startswith("-"):  # CUDA sees no device
        return None
    place = places[0]
    try:
        pynvml.nvmlInit()
        by_index = place.isdigit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(place)) if by_index else pynvml.nvmlDeviceGetHandleByUUID(place)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        usage = Usage(used=int(memory.used), total=int(memory.total))
        with contextlib.suppress(pynvml.NVMLError):
            usage["utilization"] = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
    except pynvml.NVMLError as error:
        log.debug("the usage of the GPU is not known: %s", error)
        return None
    return usage
