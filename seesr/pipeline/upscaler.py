"""`Upscaler`: loaded networks for any number of images. `pipeline.py` has the stages of one image."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
from pathlib import Path

import numpy as np
import torch

from seesr.images.image_data import ImageData
from seesr.images.mask import Grey
from seesr.images.source import LoadedImage, Source, load_source
from seesr.networks import hardware, models
from seesr.networks.graphs import FREED, CudaRecorder, Graphs
from seesr.pipeline.pipeline import NO_GRAPHS, UpscaleRun
from seesr.pipeline.result import Output
from seesr.pipeline.stages import StageCache
from seesr.runtime.memory import keep_freed_memory
from seesr.runtime.precision import working_dtype
from seesr.runtime.process import check_process
from seesr.runtime.progress import Progress
from seesr.runtime.tile_batches import TilePool
from seesr.settings import Settings

log = logging.getLogger(__name__)
MIN_TILE = 16  # latent pixels; Settings allows no smaller one


class Upscaler:
    """Loaded networks, ready for any number of images, one at a time.

    Not thread-safe: a network may be cast to float32 for the second attempt of an image. Use seesr.Engine from threads.

    upscaler = Upscaler.load("weights/pocket", "cpu")
    output = upscaler("photo.jpg", Settings(scale_factor=4, seed=1))

    Attributes:
        pools: helpers that share the denoiser's tiles.
    """

    def __init__(
        self, networks: models.Models, attention: str = "auto", graphs: Graphs | None = None, cache: int = 0
    ) -> None:
        if networks.device.type == "cpu":
            keep_freed_memory(networks.size)
        self.networks = dataclasses.replace(networks, attention=hardware.tune(networks, attention, graphs is not None))
        self.graphs, self.process, self.cache = graphs, os.getpid(), StageCache(cache)
        self.pools: list[TilePool] = []
        if graphs is not None:
            for owner, method in networks.parts():
                graphs.attach(owner, method)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        device: str | None = None,
        attention: str = "auto",
        cuda_graphs: bool = True,
        cache: int = 0,
        precision: str = "auto",
    ) -> Upscaler:
        """Loads a bundle.

        Args:
            bundle: the folder.
            device: a torch device; None: the GPU if there is one.
            attention: name of a kernel, see hardware.choose.
            cuda_graphs: replay the networks as CUDA graphs (see networks.graphs); a CPU has none.
            cache: bytes of host memory for results of stages, which later runs of an image reuse; 0: none.
            precision: "auto", "float32" or "bfloat16", see working_dtype.

        Raises:
            WeightsError: the bundle is missing, damaged or does not fit.
            ValueError: the device, the kernel or the precision is not known, or not here; one line.
        """
        target = hardware.usable(device)
        networks = models.load(Path(bundle), target, working_dtype(target, precision))
        graphs = Graphs(CudaRecorder()) if cuda_graphs and target.type == "cuda" else None
        upscaler = cls(networks, attention, graphs, cache)
        kernel = upscaler.networks.attention
        log.info("bundle %s on %s in %s, %s attention", networks.bundle.name, target, networks.dtype, kernel)
        return upscaler

    def __call__(
        self,
        source: Source | LoadedImage,
        settings: Settings | None = None,
        progress: Progress | None = None,
        mask: Grey | None = None,
    ) -> Output:
        """Upscales one image.

        Args:
            source: path, bytes of an image file, binary file object, PIL image or NumPy array; see `load_source`.
            settings: None: the defaults.
            progress: reports every tile; None: nothing is reported.
            mask: where the model may change the image (seesr.images.mask.read_mask); None: everywhere.

        Raises:
            TypeError: the source is of a type that is not accepted.
            ValueError: the image cannot be used, or is too large for the scale; one line.
            RuntimeError: the networks gave no usable image, or were loaded before os.fork().
        """
        check_process(self.process)
        if self.graphs is not None and self.graphs.reason == FREED:
            self.record()
        settings = settings or Settings()
        loaded = load_source(source, settings.output_size)
        progress = progress or Progress()
        run = UpscaleRun(
            self.networks, settings, loaded.image_data, progress, self.graphs, mask, self.cache, self.pools
        )
        output = dataclasses.replace(run.run(), array_layout=loaded.layout)
        if loaded.sha256 is None:
            return output
        if run.stages.pixels:
            self.cache.add_file(loaded.sha256, run.stages.pixels)
        record = {**(output.image_data.record or {}), "source_sha256": loaded.sha256}
        return dataclasses.replace(output, image_data=dataclasses.replace(output.image_data, record=record))

    def reusable(self, settings: Settings, source: Source | LoadedImage) -> set[str]:
        """The stages of an image that need no computing, because an earlier run of its file left their results.

        Args:
            source: only of the bytes of a file, or a file that was loaded, something is known.
        """
        if isinstance(source, LoadedImage):
            sha256 = source.sha256
        else:
            sha256 = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) and self.cache.files else None
        steps = settings.num_inference_steps
        steps = self.networks.bundle.defaults.num_inference_steps if steps is None else steps
        stages = self.cache.reusable(dataclasses.replace(settings.seeded(), num_inference_steps=steps), sha256)
        compared = any(view.calibrated for view in settings.views.values())
        return stages - {"decode"} if compared and "particles" not in stages else stages

    def warm_up(self) -> Output:
        """Runs one step on a grey image of one tile, so that the first caller does not pay for lazy initialisation.

        On a CPU the tile is smaller, since one of full size would take longer than loading. On a GPU an image of
        several tiles follows, whose batches have another shape, and CUDA graphs are recorded.

        Returns:
            The result of the last of these images, with the seconds of its stages.
        """
        if self.networks.device.type == "cpu":
            return self.run_grey(1, side=max(MIN_TILE, 3 * self.networks.tile // 4))
        self.run_grey(1)
        output = self.run_grey(2)
        if self.graphs is not None:
            self.record()
        return output

    def record(self) -> None:
        """Records the networks: an image of one tile, also with guidance, then the denoiser's pass for every batch
        that memory allows, and the conditioning embedding, at every tile side of the bundle.
        """
        assert self.graphs is not None
        started = time.perf_counter()
        with self.graphs.setup():
            for scale in (1.0, 1.5):
                self.run_grey(1, scale)
            for side in self.networks.bundle.defaults.latent_tiled_size:
                settings = Settings(num_inference_steps=1, seed=0, latent_tiled_size=side)
                UpscaleRun(self.networks, settings, self.grey(1, self.networks.tile), Progress(), self.graphs).record()
        log.info("CUDA graphs: %s, %.1f s", self.graphs.state, time.perf_counter() - started)

    @property
    def graphs_state(self) -> str:
        """Whether CUDA graphs are used, and if not, why."""
        return NO_GRAPHS if self.graphs is None else self.graphs.state

    def run_grey(self, tiles: int, cfg_scale: float = 1.0, side: int | None = None) -> Output:
        """Runs one step on a grey image, without cached stages: networks that do not run record no graph.

        Args:
            tiles: on a side.
            side: of a tile, latent pixels; None: the bundle's.
        """
        settings = Settings(num_inference_steps=1, seed=0, cfg_scale=cfg_scale, latent_tiled_size=side)
        image = self.grey(tiles, side or self.networks.tile)
        return UpscaleRun(self.networks, settings, image, Progress(), self.graphs).run()

    def grey(self, tiles: int, tile: int) -> ImageData:
        """A grey ramp whose 4x output has `tiles` tiles of `tile` latent pixels on a side."""
        side = tiles * tile * self.networks.factor // 4
        return ImageData(np.linspace(64, 192, side * side * 3).reshape(side, side, 3).astype(np.uint8))

    def healthy(self) -> bool:
        """Whether the device still computes. After an illegal memory access a GPU does not."""
        try:
            return torch.ones(2, device=self.networks.device).sum().item() == 2
        except RuntimeError as error:
            log.error("the device has failed: %s", error)
            return False
