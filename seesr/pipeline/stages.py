"""Caches results of pipeline stages: a second run of an image computes only the stages whose settings changed.

A stage's key is a hash of the image's pixels and of the settings that the stage and those before it read. `READS` has
every setting, so a new one must be added there; a test compares it with `Settings`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from seesr.images.image_data import ImageData
from seesr.runtime.memory import free
from seesr.runtime.owner import current_owner
from seesr.runtime.tiling import Tile
from seesr.settings import Settings

READS: dict[str, tuple[str, ...]] = {  # stage -> the settings that it reads and no stage before it
    "tags": (),
    "text": ("user_prompt", "positive_prompt", "negative_prompt", "cfg_scale"),
    "encode": ("scale_factor", "target_side", "target_megapixels", "latent_tiled_size"),
    "denoise": ("num_inference_steps", "latent_tiled_overlap", "use_kds", "num_particles", "bandwidth", "seed"),
    "decode": (),
    "particles": (),
}
AFTER = {
    "tags": (), "text": ("tags",), "encode": (), "denoise": ("text", "encode"), "decode": ("denoise",),
    "particles": ("denoise",),
}  # fmt: skip
NOT_CACHED = (  # settings that are read after the last cached stage; fidelity and region also choose tiles, see `scope`
    "fidelity", "color_fix", "output_view", "region", "output_format", "output_quality", "keep_exif", "dpi",
)  # fmt: skip
ENTRY = 1000  # bytes counted for an entry beside its tensors
FILES = 1000  # whose pixels are known
FREE_SHARE = 4  # the cache holds at most one part in so many of the host memory that is free
Scope = Hashable  # what of the image a result is for: needed tiles and latent pixels; None: all of it
CPU = torch.device("cpu")


class StageCache:
    """Results of stages in host memory. The least recently used are dropped first. Thread-safe.

    Attributes:
        limit: bytes that may be held; 0: nothing is cached.
        held: bytes that are held.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit, self.held = limit, 0
        self.entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.files: OrderedDict[tuple[str, str], str] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: Hashable, device: torch.device = CPU) -> Any:
        """The result of this key with its tensors on `device`; None: it is not cached. It must not be changed."""
        with self.lock:
            if key not in self.entries:
                return None
            self.entries.move_to_end(key)
            result, _ = self.entries[key]
        return moved(result, device)

    def add_file(self, sha256: str, pixels: str) -> None:
        """Notes which pixels a file of this owner has, see `pixels_of`."""
        with self.lock:
            self.files[current_owner.get(), sha256] = pixels
            while len(self.files) > FILES:
                self.files.popitem(last=False)

    def reusable(self, settings: Settings, sha256: str | None) -> set[str]:
        """The stages that a run of this owner's file would not compute, for the whole image.

        Args:
            settings: with the number of steps.
            sha256: of the file; None: it is not known.
        """
        with self.lock:
            pixels = None if sha256 is None else self.files.get((current_owner.get(), sha256))
            if pixels is None:
                return set()
            return {stage for stage, key in keys(settings, pixels).items() if (stage, key, None) in self.entries}

    def put(self, key: Hashable, result: Any) -> None:
        """Caches a result, unless it is larger than the cache may be."""
        size = ENTRY + sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        if size > self.limit:
            return
        result = moved(result, CPU)
        unused = free(CPU)
        with self.lock:
            if key in self.entries:
                self.held -= self.entries.pop(key)[1]
            self.entries[key] = result, size
            self.held += size
            limit = min(self.limit, (unused + self.held) // FREE_SHARE)
            while self.held > limit:
                self.held -= self.entries.popitem(last=False)[1][1]


class JobStages(NamedTuple):
    """The cached stages of one job.

    Attributes:
        pixels: names those of the image; empty: nothing is cached.
        keys: of the stages; empty: nothing is cached.
    """

    cache: StageCache
    pixels: str
    keys: Mapping[str, str]
    device: torch.device
    reused: list[str]

    @classmethod
    def of(cls, cache: StageCache, settings: Settings, image: ImageData, device: torch.device) -> JobStages:
        if not cache.limit:
            return cls(cache, "", {}, device, [])
        pixels = pixels_of(image)
        return cls(cache, pixels, keys(settings, pixels), device, [])

    def result(self, stage: str, scope: Scope, compute: Callable[[], Any], exact: Callable[[], bool]) -> Any:
        """A stage's result: the cached one, or that of `compute`, which is cached then.

        A result for the whole image serves every part of it.

        Args:
            exact: whether the result may be cached; a run that was repeated in float32 may differ from others.
        """
        if stage not in self.keys:
            return compute()
        for known in dict.fromkeys((None, scope)):
            cached = self.cache.get((stage, self.keys[stage], known), self.device)
            if cached is not None:
                self.reused.append(stage)
                return cached
        result = compute()
        if exact():
            self.cache.put((stage, self.keys[stage], scope), result)
        return result

    def tiles(self) -> Tiles | None:
        """The denoiser's tiles of this job; None on a GPU, where the batch of a tile can change its last bits."""
        return Tiles(self.cache, self.keys["denoise"]) if self.keys and self.device == CPU else None


class Tiles:
    """Predictions of single tiles. A run of a region stores them for later runs of the same image.

    Attributes:
        reused: tiles that were not computed again.
    """

    def __init__(self, cache: StageCache, key: str) -> None:
        self.cache, self.key, self.reused = cache, key, 0

    def get(self, step: int, tile: Tile) -> Tensor | None:
        """The prediction at a step, [C, h, w]."""
        return self.cache.get(("tile", self.key, step, tile))

    def put(self, step: int, tile: Tile, prediction: Tensor) -> None:
        self.cache.put(("tile", self.key, step, tile), prediction.clone())


def pixels_of(image: ImageData) -> str:
    """A name of the pixels and their owner."""
    pixels = image.visible
    digest = hashlib.sha256(f"{current_owner.get()!r} {pixels.shape} {pixels.dtype}".encode())
    digest.update(pixels.data if pixels.flags.c_contiguous else pixels.tobytes())
    return digest.hexdigest()


def keys(settings: Settings, pixels: str) -> dict[str, str]:
    """The key of every stage: the pixels with their owner, and the settings that have an effect up to there."""
    values = dict(effective(settings))
    keys: dict[str, str] = {}
    for stage, names in READS.items():
        parts = [pixels, *(keys[before] for before in AFTER[stage]), *(values[name] for name in names)]
        keys[stage] = hashlib.sha256(repr((stage, parts)).encode()).hexdigest()
    return keys


def effective(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Names and values of the settings; None for those that other settings turn off."""
    off = () if settings.cfg_scale > 1 else ("negative_prompt",)
    off += () if settings.steered else ("use_kds", "num_particles", "bandwidth")
    for name, value in dataclasses.asdict(settings).items():
        yield name, None if name in off else value


def moved(result: Any, device: torch.device) -> Any:
    """The result with its tensors on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, result)
