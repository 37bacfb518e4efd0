"""The engines of a server's bundles: each loads at its first image, and the least recently used one is unloaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from seesr.networks.weights import WeightsError

if TYPE_CHECKING:
    from seesr.engine.engine import Engine

log = logging.getLogger(__name__)


class Engines:
    """Engines by version. Only the thread of the jobs loads and unloads them.

    Args:
        loads: makes the engine of a version.
        fits: whether a version fits into the memory beside what is loaded.
    """

    def __init__(self, loads: Mapping[str, Callable[[], Engine]], fits: Callable[[str], bool]) -> None:
        self.loads, self.fits = loads, fits
        self.loaded: dict[str, Engine] = {}
        self.used: dict[str, float] = {}  # version -> when it was last used, monotonic seconds

    def get(self, version: str) -> Engine:
        """The engine of a version, loaded now if it is not.

        Raises:
            WeightsError, CannotServe, RuntimeError: it cannot be loaded, even alone; one line.
        """
        if version not in self.loaded:
            self.loaded[version] = self.load(version)
        self.used[version] = time.monotonic()
        return self.loaded[version]

    def load(self, version: str) -> Engine:
        while self.loaded and not self.fits(version):
            self.unload(min(self.loaded, key=self.used.__getitem__))
        while True:
            try:
                return self.loads[version]()
            except WeightsError:
                raise  # more memory would not help
            except (RuntimeError, MemoryError) as error:
                if not self.loaded:
                    raise
                log.warning("version %s cannot be loaded beside others: %s", version[:12], error)
                self.unload(min(self.loaded, key=self.used.__getitem__))

    def unload(self, version: str) -> None:
        """Frees the memory of a version."""
        log.info("version %s is unloaded to make room", version[:12])
        self.loaded.pop(version).unload()

    def unload_others(self, version: str) -> bool:
        """Unloads all other versions; False: there are none."""
        others = [other for other in self.loaded if other != version]
        for other in others:
            self.unload(other)
        return bool(others)
