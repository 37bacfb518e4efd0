"""SeeSR super-resolution: `Upscaler`, `Settings`, `Result`. Heavy libraries load when `Upscaler` is first touched."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seesr.progress import Progress
from seesr.settings import Settings
from seesr.weights import WeightsError

if TYPE_CHECKING:
    from seesr.upscaler import Result, Upscaler

__version__ = "0.1.0"
__all__ = ["Progress", "Result", "Settings", "Upscaler", "WeightsError"]


def __getattr__(name: str) -> Any:
    if name in ("Result", "Upscaler"):
        from seesr import upscaler

        return getattr(upscaler, name)
    raise AttributeError(name)
