"""The `Engine`: loads a bundle and upscales images to encoded files with metrics, one at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, cast, overload

import torch

from seesr.config import Configuration
from seesr.engine import preflight
from seesr.engine.helper_processes import HelperProcesses, helper_devices
from seesr.engine.quote import make_quote, size_of
from seesr.engine.rates import Measured, Quote, Rates, rates_file, user_folder
from seesr.engine.worker_thread import WorkerThread
from seesr.images.content_credentials import Signer
from seesr.images.limits import megapixels
from seesr.images.mask import read_mask
from seesr.images.source import LoadedImage, Source, is_file, is_many, load_source, read_bytes
from seesr.networks import hardware, weights
from seesr.pipeline.outline import outline_of
from seesr.pipeline.result import Metrics, Output
from seesr.pipeline.tile_helper import TileHelper
from seesr.pipeline.upscaler import Upscaler
from seesr.pipeline.work import count, plan, shown_megapixels, terms, units
from seesr.runtime.estimate import Forecast, Speed, stage_of
from seesr.runtime.memory import return_freed_memory
from seesr.runtime.precision import chosen_precision, name_of
from seesr.runtime.process import check_process
from seesr.runtime.progress import Deadline, Position, Progress, Watcher
from seesr.runtime.tile_batches import TilePool
from seesr.settings import Settings

log = logging.getLogger(__name__)


class Engine:
    """A loaded bundle that takes one image at a time, from any thread.

    All of torch runs on one worker thread; callers wait for their turn. If an exception is
    raised in a waiting caller, its image ends at the next tile.

    with Engine.load() as engine:
        output = engine.run("photo.jpg", Settings(scale_factor=4, seed=1))
        output.save("photo-x4.png")
    """

    def __init__(
        self,
        bundle: Path,
        device: str | None,
        configuration: Configuration,
        rates: Path | None = None,
        workers: int | None = None,
    ) -> None:
        self.workers = configuration.tile_workers if workers is None else workers
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}: it must be at least 1, for this process")
        self.helpers: HelperProcesses | None = None
        self.helper: TileHelper | None = None  # computes tiles of other processes' images
        self.bundle, self.device, self.configuration = bundle, device, configuration
        self.rates_folder, self.rates = rates or user_folder(), Rates()
        self.thread, self.process = WorkerThread(), os.getpid()
        self.turn = threading.Lock()
        self.upscaler: Upscaler | None = None
        self.signer = signer_of(configuration)
        self.speed = Speed()

    @classmethod
    def load(
        cls,
        bundle: str | Path | None = None,
        device: str | None = None,
        rates: Path | None = None,
        workers: int | None = None,
    ) -> Engine:
        """Loads a bundle and runs one small image through it.

        Args:
            bundle: the folder; None: SEESR_WEIGHTS, the full bundle or the pocket one, whichever is there.
            device: a torch device; None: SEESR_DEVICE, or the GPU if there is one.
            rates: folder of the measured rates for quotes; None: seesr/rates in the user's cache folder.
            workers: processes that share the tiles of each image, this one included; None: SEESR_TILE_WORKERS. The
                others end with `unload`, or with this process.

        Raises:
            WeightsError: the bundle is missing, damaged or does not fit.
            ValueError: an environment variable or the device cannot be used; one line.
            CannotServe: this machine cannot run this bundle, or not in so many processes; one line.
        """
        configuration = Configuration.read()
        path = Path(bundle) if bundle is not None else configuration.weights or weights.locate()
        device = device or configuration.device
        preflight.require(path, device, configuration.precision)
        engine = cls(path, device, configuration, rates, workers)
        engine.reload()
        return engine

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.unload()

    @property
    def loaded(self) -> weights.Bundle:
        """The bundle that is loaded.

        Raises:
            RuntimeError: no bundle is loaded.
        """
        return self._ready.networks.bundle

    @property
    def _ready(self) -> Upscaler:
        if self.upscaler is None:
            raise RuntimeError("the engine is unloaded: call Engine.reload() first")
        return self.upscaler

    def reload(self) -> None:
        """Loads the bundle again after `unload`; does nothing if it is loaded."""
        check_process(self.process)
        with self.turn:
            if self.upscaler is None:
                self.upscaler = self.thread.run(self._loaded)

    def _loaded(self) -> Upscaler:
        started = time.perf_counter()
        configuration = self.configuration
        upscaler = Upscaler.load(
            self.bundle,
            self.device,
            configuration.attention,
            configuration.cuda_graphs,
            cache=configuration.cache_mb * 10**6,
            precision=configuration.precision,
        )
        loaded = time.perf_counter()
        networks, outline = upscaler.networks, outline_of(upscaler.networks)
        name, threads = hardware.name(networks.device), torch.get_num_threads()
        if precision := chosen_precision(networks.device, networks.dtype):
            name = f"{name} {precision}"
        self.rates = Rates(rates_file(self.rates_folder, networks.bundle.digest, name, threads, self.workers))
        self.helpers = self._helpers(upscaler, threads)
        self.rates.begin(hardware.peak_memory(networks.device), outline)
        first = upscaler.warm_up()
        planned = plan(outline, first.settings, first.source.size)
        self.speed.learn(units(outline, first.settings, first.source.size, planned), first.metrics["seconds"])
        self.rates.warm(terms(outline, first.settings, first.source.size, planned), first.metrics["seconds"])
        if self.helpers is not None:
            self.helpers.wait()
            upscaler.pools.append(self.helpers)
        log.info("setup: load %.1f s, warm-up %.1f s", loaded - started, time.perf_counter() - loaded)
        if upscaler.networks.bundle.kind == "pocket":
            log.warning("the small pocket bundle is loaded; run ./scripts/weights for full quality")
        return upscaler

    def _helpers(self, upscaler: Upscaler, threads: int) -> HelperProcesses | None:
        """Starts the processes that share the tiles of this engine's images; None: there are none."""
        if self.workers == 1:
            return None
        device, cores = upscaler.networks.device, len(os.sched_getaffinity(0))
        devices = helper_devices(self.workers, device, threads, cores, torch.cuda.device_count())
        return HelperProcesses(self.bundle, devices, threads, self.configuration)

    @property
    def busy(self) -> bool:
        """Whether an image is made now."""
        return self.turn.locked()

    @property
    def machine(self) -> str:
        """What the bytes of a tile depend on beside the bundle and this program: equal ones give equal bytes.

        Raises:
            RuntimeError: the engine is unloaded.
        """
        networks = self._ready.networks
        processor = f"{torch.backends.cpu.get_cpu_capability()}, {self.thread.run(torch.get_num_threads)} threads"
        place = processor if networks.device.type == "cpu" else hardware.name(networks.device)
        dtype = name_of(networks.dtype)
        return f"{place}, torch {torch.__version__}, {networks.attention} attention, {dtype}"

    def share_tiles(self, pool: TilePool) -> None:
        """Shares the tiles of all later images with the helpers of a pool, until the engine is unloaded."""
        if self.upscaler is not None:
            self.upscaler.pools.append(pool)

    def compute_tiles(self, image: str, context: Callable[[], bytes], task: bytes) -> bytes | None:
        """Computes a tile batch of an image that another process has.

        Args:
            image: identifies its run.
            context: fetches what is needed once for each image.
            task: the batch.

        Returns:
            The prediction; None: an image of this engine is made, or it is unloaded.
        """
        if not self.turn.acquire(blocking=False):
            return None
        try:
            upscaler = self.upscaler
            if upscaler is None:
                return None
            if self.helper is None or self.helper.networks is not upscaler.networks:
                self.helper = TileHelper(upscaler.networks, upscaler.graphs)
            helper = self.helper
            if not helper.knows(image):
                helper.learn(image, context())
            return self.thread.run(lambda: helper(image, task))
        finally:
            self.turn.release()

    @overload
    def run(
        self,
        source: Source,
        settings: Settings | None = None,
        deadline: float | Deadline | None = None,
        watchers: tuple[Watcher, ...] = (),
        mask: Source | None = None,
    ) -> Output: ...

    @overload
    def run(
        self,
        source: Iterable[Source],
        settings: Settings | None = None,
        deadline: float | Deadline | None = None,
        watchers: tuple[Watcher, ...] = (),
        mask: Source | None = None,
    ) -> Iterator[Output]: ...

    def run(
        self,
        source: Source | Iterable[Source],
        settings: Settings | None = None,
        deadline: float | Deadline | None = None,
        watchers: tuple[Watcher, ...] = (),
        mask: Source | None = None,
    ) -> Output | Iterator[Output]:
        """Upscales one image, or lazily each of several.

        Args:
            source: path, bytes of an image file, binary file object, PIL image or NumPy array (see
                `seesr.images.source.load_source`), or an iterable of these, which gives an iterator of outputs.
            settings: None: the defaults.
            deadline: seconds for one image from this call on, its wait included; None: SEESR_DEADLINE, which counts
                from the image's turn, or no limit.
            watchers: called at every tile; one that raises ends the work.
            mask: an image of the same aspect, of any kind that `source` can be: white is enhanced, black stays the
                bicubic upscale.

        Raises:
            TypeError: the source is of a type that is not accepted.
            ValueError: the image or the settings cannot be used; one line.
            OSError: a file cannot be read.
            DeadlineExceeded: the deadline has passed; the message says how far the image got.
            RuntimeError: there is no usable result, the engine is unloaded, or was loaded before os.fork().
        """
        settings = settings or Settings()
        if is_many(source):
            many = cast(Iterable[Source], source)
            return (self._run(image, settings, deadline, watchers, mask) for image in many)
        return self._run(cast(Source, source), settings, deadline, watchers, mask)

    def _run(
        self,
        source: Source,
        settings: Settings,
        deadline: float | Deadline | None,
        watchers: tuple[Watcher, ...],
        mask: Source | None,
    ) -> Output:
        check_process(self.process)  # before the lock, which another thread may have held at the fork
        limit = Deadline(deadline) if isinstance(deadline, (int, float)) else deadline
        with self.turn:
            upscaler = self._ready
            if limit is None and self.configuration.deadline is not None:
                limit = Deadline(self.configuration.deadline)
            progress = Progress(*watchers) if limit is None else Progress(*watchers, limit)
            return self.thread.run(lambda: self._upscale(upscaler, source, settings, progress, mask))

    def _upscale(
        self, upscaler: Upscaler, source: Source, settings: Settings, progress: Progress, mask: Source | None
    ) -> Output:
        """Source -> Output with its encoded file, signed if there is a signer. Updates the rates and the speed."""
        networks, started = upscaler.networks, time.perf_counter()
        progress.start("read")
        signer, original = self.signer, None
        if signer is not None and is_file(source):
            source = original = read_bytes(source)
        image = load_source(source, settings.output_size)
        size = image.image_data.size
        shape = None if mask is None else read_mask(mask, size)
        outline, masked = outline_of(networks), shape is not None
        image_plan = plan(outline, settings, size, shape)
        work = units(outline, settings, size, image_plan, masked)
        progress.forecast = Forecast(self.speed, work)
        progress.finish()
        read = time.perf_counter()
        quote, before = self._quote(upscaler, settings, image), hardware.peak_memory(networks.device)
        planned = time.perf_counter()
        output = upscaler(image, settings, progress, shape)
        if signer is not None:
            output = dataclasses.replace(output, sign=functools.partial(signer.sign, source=original))
        upscaled = time.perf_counter()
        progress.start("file")
        data = output.data
        progress.finish()
        seconds = {"read": read - started, **output.metrics["seconds"], "file": time.perf_counter() - upscaled}
        whole = time.perf_counter() - started - (planned - read)
        self.speed.learn(computed(work, output.metrics), seconds)
        after, reused = output.metrics["peak_memory_mb"], reused_stages(output.metrics)
        computed_seconds = {name: value for name, value in seconds.items() if name not in reused}
        width, height = image_plan.output
        self.rates.learn(
            Measured(
                terms=terms(outline, settings, size, image_plan, masked),
                seconds=computed_seconds,
                quoted=None if masked or len(computed_seconds) < len(seconds) else quote.seconds,
                suffix=settings.suffix,
                shown=shown_megapixels(settings, (width, height)),
                length=len(data),
                megapixels=megapixels(width, height),
                before=before,
                after=after,
            )
        )
        metrics: Metrics = {
            **output.metrics,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "quote": quote.short(),
            "actual": {"seconds": round(whole, 3), "bytes": len(data), "peak_memory_mb": after["host"]},
        }
        output = dataclasses.replace(output, metrics=metrics)
        output.__dict__["data"] = data  # the value of the cached property
        return output

    def quote(self, source: Source, settings: Settings | None = None) -> Quote:
        """Estimates time, size, memory and price of an image from its header and the images measured before.

        Answers also while an image runs. Ignores masks. Stages that an earlier run of the same file left in memory cost
        nothing.

        Args:
            source: as for `run`; pixels are not decoded.
            settings: None: the defaults.

        Raises:
            TypeError, ValueError, OSError: as `run`.
            RuntimeError: the engine is unloaded.
        """
        if is_file(source):
            source = read_bytes(source)
        return self._quote(self._ready, settings or Settings(), source)

    def _quote(self, upscaler: Upscaler, settings: Settings, source: Source | LoadedImage) -> Quote:
        outline, price = outline_of(upscaler.networks), self.configuration.price_per_hour
        reused = upscaler.reusable(settings, source)
        quote = make_quote(outline, self.rates, settings, size_of(source), price, reused)
        held = hardware.peak_memory(upscaler.networks.device)
        peak = {name: max(value, held[name]) for name, value in quote.peak_memory_mb.items()}
        return dataclasses.replace(quote, peak_memory_mb=peak)

    def work(self, settings: Settings, size: tuple[int, int]) -> dict[str, float]:
        """Units of work of every stage of an image of `size` = (width, height), see `seesr.pipeline.work.count`.

        Raises:
            ValueError: the output would be too large.
            RuntimeError: the engine is unloaded.
        """
        return count(outline_of(self._ready.networks), settings, size)

    def expected(self, settings: Settings, size: tuple[int, int]) -> float:
        """Expected seconds of an image of `size` = (width, height), by the images of this process so far.

        Raises:
            ValueError, RuntimeError: as `work`.
        """
        return sum(self.speed.seconds(self.work(settings, size)).values())

    async def arun(
        self,
        source: Source,
        settings: Settings | None = None,
        deadline: float | Deadline | None = None,
        watchers: tuple[Watcher, ...] = (),
        mask: Source | None = None,
    ) -> Output:
        """The same as `run` for one image, without blocking the event loop.

        Cancelling the task ends the image at the next tile.
        """
        cancelled = threading.Event()

        def stop(position: Position) -> None:
            if cancelled.is_set():
                raise asyncio.CancelledError

        settings = settings or Settings()
        try:
            return await asyncio.to_thread(self._run, source, settings, deadline, (*watchers, stop), mask)
        finally:
            cancelled.set()

    def healthy(self) -> bool:
        """Whether a bundle is loaded and its device still computes. Answers also while an image runs."""
        upscaler = self.upscaler
        return upscaler is not None and os.getpid() == self.process and upscaler.healthy()

    def about(self) -> dict[str, Any]:
        """What is loaded: bundle with its hashes, device, precision, attention kernel, bytes of GPU memory."""
        upscaler = self.upscaler
        if upscaler is None:
            return {"loaded": False}
        networks = upscaler.networks
        bundle = networks.bundle
        bundle_info = {**bundle._asdict(), "path": str(bundle.path), "defaults": bundle.defaults._asdict()}
        precision = name_of(upscaler.networks.dtype)
        info = {"loaded": True, "bundle": bundle_info, "precision": precision, "graphs": upscaler.graphs_state}
        return {**info, "attention": networks.attention, **hardware.about(networks.device)}

    def unload(self) -> None:
        """Frees the memory of the bundle; `reload` brings it back."""
        check_process(self.process)
        with self.turn:
            self.upscaler = self.helper = None
            if self.helpers is not None:
                self.helpers.close()
                self.helpers = None
            self.thread.run(free_memory)


def signer_of(configuration: Configuration) -> Signer | None:
    """The signer of the configuration, or None.

    Raises:
        ValueError: it cannot sign; one line that names the variable.
    """
    if configuration.c2pa_certificate is None:
        return None
    if configuration.c2pa_key is None:
        raise ValueError("SEESR_C2PA_CERTIFICATE needs SEESR_C2PA_KEY, the file of its private key")
    return Signer.read(
        configuration.c2pa_certificate,
        configuration.c2pa_key,
        configuration.c2pa_algorithm,
        configuration.c2pa_timestamp_url,
    )


def reused_stages(metrics: Metrics) -> set[str]:
    """The stages that were not computed whole, but with results of earlier runs."""
    reused = metrics["reused"].split(", ")
    part = "denoise" if metrics["tiles_reused"] else ""
    return {*reused, part, "decode" if "particles" in reused else ""}


def computed(work: dict[str, float], metrics: Metrics) -> dict[str, float]:
    """The work of the stages that were computed whole."""
    reused = reused_stages(metrics)
    return {name: units for name, units in work.items() if stage_of(name) not in reused}


def free_memory() -> None:
    import gc

    gc.collect()
    return_freed_memory()
    torch.cuda.empty_cache()  # does nothing without a GPU
