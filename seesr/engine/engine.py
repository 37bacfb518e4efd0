"""The one door to the machine: bytes and Settings in, the bytes of a file and metrics out. All else calls this."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from seesr.config import Configuration
from seesr.engine import preflight
from seesr.engine.worker_thread import OneThread
from seesr.images.mask import read_mask
from seesr.images.read import decode, read_file
from seesr.networks import hardware, weights
from seesr.pipeline.upscaler import Upscaler
from seesr.runtime.progress import Deadline, Progress, Watcher
from seesr.settings import Settings

log = logging.getLogger(__name__)


class Output(NamedTuple):
    """What one call gives.

    Attributes:
        data: the bytes of the file that the settings ask for.
        metrics: what happened: seed, tags, sizes, steps, tiles, seconds per stage, memory, device, bundle.
        seed: the seed that was used.
    """

    data: bytes
    metrics: dict[str, Any]
    seed: int


class Engine:
    """A loaded bundle that takes one picture at a time, from any thread.

    All of torch runs on one thread of its own; callers wait for their turn. Cancelling a waiting caller (an exception
    that is sent to it) ends its picture at the next tile.

    engine = Engine.load("weights/pocket")
    output = engine.run(Path("photo.jpg"), Settings(scale_factor=4, seed=1))
    """

    def __init__(self, bundle: Path, device: str | None, configuration: Configuration) -> None:
        self.bundle, self.device, self.configuration = bundle, device, configuration
        self.thread = OneThread()
        self.turn = threading.Lock()
        self.upscaler: Upscaler | None = None

    @classmethod
    def load(cls, bundle: str | Path | None = None, device: str | None = None) -> Engine:
        """Loads a bundle and runs one small picture through it.

        Args:
            bundle: the folder; None: SEESR_WEIGHTS, the full bundle or the pocket one, whichever is there.
            device: a torch device; None: SEESR_DEVICE, or the GPU if there is one.

        Raises:
            WeightsError: the bundle is missing, damaged or does not fit.
            ValueError: a variable of the environment, or the device, is not right; one line.
            CannotServe: this machine cannot run this bundle; one line.
        """
        configuration = Configuration.read()
        path = Path(bundle) if bundle is not None else configuration.weights or weights.locate()
        preflight.require(path, device or configuration.device)
        engine = cls(path, device or configuration.device, configuration)
        engine.reload()
        return engine

    @property
    def loaded(self) -> weights.Bundle:
        """The bundle that is loaded.

        Raises:
            RuntimeError: none is.
        """
        if self.upscaler is None:
            raise RuntimeError("the engine is unloaded")
        return self.upscaler.networks.bundle

    def reload(self) -> None:
        """Loads the bundle again after `unload`; nothing where it is loaded."""
        with self.turn:
            if self.upscaler is None:
                self.upscaler = self.thread.run(self._loaded)

    def _loaded(self) -> Upscaler:
        started = time.perf_counter()
        given = self.configuration
        upscaler = Upscaler.load(self.bundle, self.device, given.attention, given.cuda_graphs)
        loaded = time.perf_counter()
        upscaler.warm_up()
        log.info("setup: load %.1f s, warm-up %.1f s", loaded - started, time.perf_counter() - loaded)
        if upscaler.networks.bundle.kind == "pocket":
            log.warning("the small pocket bundle is loaded: fetch the full weights for full quality")
        return upscaler

    def run(
        self,
        data: bytes | Path,
        settings: Settings | None = None,
        deadline: float | None = None,
        watchers: tuple[Watcher, ...] = (),
        mask: bytes | Path | None = None,
    ) -> Output:
        """Upscales one picture.

        Args:
            data: the bytes of an image file, or its path.
            settings: None: the defaults.
            deadline: seconds for this picture once its turn has come; None: SEESR_DEADLINE, or any time.
            watchers: told of every tile; one that raises ends the work.
            mask: an image file of the same aspect: white is enhanced, black stays the plain enlargement.

        Raises:
            ValueError: the file or the settings cannot be used; one line.
            DeadlineExceeded: the time was over; says how far the picture came.
            RuntimeError: there is no usable result, or the engine is unloaded.
        """
        settings = settings or Settings()
        with self.turn:
            upscaler = self.upscaler
            if upscaler is None:
                raise RuntimeError("the engine is unloaded")
            seconds = deadline if deadline is not None else self.configuration.deadline
            told = watchers if seconds is None else (*watchers, Deadline(seconds))
            return self.thread.run(lambda: upscale(upscaler, data, settings, Progress(*told), mask))

    def healthy(self) -> bool:
        """Whether a bundle is loaded and its device still computes. Answers while a picture is made, too."""
        upscaler = self.upscaler
        return upscaler is not None and upscaler.healthy()

    def about(self) -> dict[str, Any]:
        """What is loaded, and where: bundle with its hashes, device, attention kernel, GPU memory in bytes."""
        upscaler = self.upscaler
        if upscaler is None:
            return {"loaded": False}
        networks = upscaler.networks
        found = {"loaded": True, "bundle": {**networks.bundle._asdict(), "path": str(networks.bundle.path)}}
        return {**found, "attention": networks.attention, **hardware.about(networks.device)}

    def unload(self) -> None:
        """Frees the memory of the bundle; `reload` brings it back."""
        with self.turn:
            self.upscaler = None
            self.thread.run(free_memory)


def upscale(
    upscaler: Upscaler, data: bytes | Path, settings: Settings, progress: Progress, mask: bytes | Path | None
) -> Output:
    """file -> picture -> file, with the seconds of both ends."""
    started = time.perf_counter()
    progress.start("read")
    picture = decode(read_file(data) if isinstance(data, Path) else data, settings.output_size)
    shape = None
    if mask is not None:
        shape = read_mask(read_file(mask) if isinstance(mask, Path) else mask, picture.size)
    progress.finish()
    read = time.perf_counter()
    result = upscaler(picture, settings, progress, shape)
    upscaled = time.perf_counter()
    progress.start("file")
    encoded = result.encode()
    progress.finish()
    seconds = {"read": read - started, **result.metrics["seconds"], "file": time.perf_counter() - upscaled}
    metrics = {**result.metrics, "seconds": {name: round(value, 3) for name, value in seconds.items()}}
    return Output(encoded, metrics, result.seed)


def free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
