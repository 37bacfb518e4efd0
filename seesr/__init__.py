"""SeeSR super-resolution: `upscale` for one call, `Engine` for files, `Upscaler` for images. Libraries load lazily."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# OpenMP reads this when torch loads. By default its threads wait for work by spinning, some milliseconds each time, and
# two processes on the same cores then take seven times as long; a shorter spin costs one process 3 %
# (docs/configuration.md, results/contention.json).
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "5000"

from seesr.networks.weights import WeightsError
from seesr.runtime.progress import Progress
from seesr.settings import Settings
from seesr.version import __version__

if TYPE_CHECKING:
    from seesr.engine.api import upscale
    from seesr.engine.engine import Engine
    from seesr.pipeline.result import Metrics, Output
    from seesr.pipeline.upscaler import Upscaler

__all__ = [
    "Engine",
    "Metrics",
    "Output",
    "Progress",
    "Settings",
    "Upscaler",
    "WeightsError",
    "__version__",
    "upscale",
]
LAZY = {
    "Engine": "engine.engine",
    "Metrics": "pipeline.result",
    "Output": "pipeline.result",
    "Upscaler": "pipeline.upscaler",
    "upscale": "engine.api",
}


def __getattr__(name: str) -> Any:
    if name in LAZY:
        import importlib

        return getattr(importlib.import_module(f"seesr.{LAZY[name]}"), name)
    raise AttributeError(name)
