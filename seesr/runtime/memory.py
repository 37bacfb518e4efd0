"""What fits: tiles per batch from the free memory, and the way down when memory was not enough."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from seesr.runtime.tiling import BATCHES

HALF_CELL = 90_000  # bytes of activations per latent cell and tile of a batch in half precision: 0.37 GB for 64 x 64
WHOLE_SHARE = 0.85  # of what is free on a GPU: the autoencoder runs alone
LEAST_HOLD = 2**28  # below this, nothing is held
HOST_HOLD = 2**31  # bytes that waiting tiles may keep in host memory, at most
OUT_OF_MEMORY = (  # how torch's CPU allocator, cuBLAS, cuDNN and a recording say it
    "can't allocate memory",
    "out of memory",
    "ALLOC_FAILED",
    "ALLOCATION_FAILED",
    "unable to find an engine to execute",
    "valid cuDNN algorithm",
    "STREAM_CAPTURE_INVALIDATED",
    "StreamCaptureInvalidated",
)
T = TypeVar("T")
log = logging.getLogger(__name__)


class OutOfMemory(RuntimeError):
    """Nothing is left to give up. One line: what was tried, what is free, what to change."""


class Allowance:
    """An amount that is lowered whenever memory runs out. Stepping down changes the time, never the pixels.

    Args:
        name: for the log.
        amount: where it begins.
        least: below this it is not lowered.
        lower: from one amount to the next.
        remedy: what the caller can change once it is at the least.
        spare: frees memory that is only there for speed; False where there is none.
    """

    def __init__(
        self,
        name: str,
        amount: int,
        least: int,
        lower: Callable[[int], int],
        remedy: str,
        spare: Callable[[], bool] = bool,
    ) -> None:
        self.name, self.amount, self.least, self.lower, self.remedy = name, amount, least, lower, remedy
        self.spare = spare
        self.lowered = 0

    def attempt(
        self,
        work: Callable[[], T],
        release: Callable[[], None] = lambda: None,
        lower: Callable[[int], int] | None = None,
    ) -> T:
        """Returns work(); when memory runs out, lowers the amount and tries again.

        Before the amount becomes the least, or where it is, `spare` is asked first.

        Args:
            release: drops what an interrupted `work` and its neighbours still hold.
            lower: in place of the allowance's own.

        Raises:
            OutOfMemory: it does not fit at the least amount either.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = " ".join(str(error).split())[:200]
            release()
            following = self.amount if self.amount == self.least else (lower or self.lower)(self.amount)
            spared = following == self.least and self.spare()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if spared:
                self.lowered += 1
                log.warning("out of memory (%s); trying again without CUDA graphs", reason)
                continue
            if self.amount == self.least:
                log.error("out of memory with nothing left to give up: %s", reason)
                raise OutOfMemory(f"out of memory: a single tile does not fit ({reason}); {self.remedy}")
            self.lowered += 1
            self.amount = following
            log.warning("out of memory (%s); going on with %s = %d", reason, self.name, self.amount)


class Budget:
    """How much is run and held at once for one picture.

    Attributes:
        batch: tiles per forward pass of the denoiser.
        hold: bytes that waiting tiles of the autoencoder may keep.
        whole: bytes that it may take for a pass over the whole picture; beyond these it works in tiles.
        single: nothing to lower: a pass that must fit.
        spare: frees memory that is only there for speed, such as recorded graphs; False where there is none.
        redone: how often half precision was not enough.
        cast: the values that were cast up for it, each with its own half precision.
    """

    def __init__(self, batch: int = 1, hold: int = 0, whole: int = 0, spare: Callable[[], bool] = bool) -> None:
        larger = "use a device with more free memory, or end other programs on this one"
        self.batch = Allowance(
            "tiles per batch", batch, 1, lambda amount: max(size for size in BATCHES if size < amount),
            "use a smaller latent_tiled_size, fewer particles, or a device with more free memory", spare,
        )  # fmt: skip
        self.hold = Allowance(
            "bytes held", hold, 0, lambda amount: amount // 2 if amount > LEAST_HOLD else 0, larger, spare
        )
        self.whole = Allowance("bytes for a pass over the whole", whole, 0, lambda amount: 0, "use tiles", spare)
        self.single = Allowance("single passes", 0, 0, lambda amount: 0, larger, spare)
        self.redone = 0
        self.cast: list[tuple[Tensor, Tensor]] = []

    def restore(self) -> None:
        """Gives the networks that were cast up their own values again."""
        for value, own in self.cast:
            value.data = own
        self.cast.clear()

    @property
    def retries(self) -> int:
        """How often memory was not enough."""
        return self.batch.lowered + self.hold.lowered + self.whole.lowered + self.single.lowered

    @classmethod
    def for_device(cls, device: torch.device, cells: int, pool: int = 0, spare: Callable[[], bool] = bool) -> Budget:
        """For tiles of `cells` latent cells on a device as it is now.

        Args:
            pool: bytes that look free and are held by recorded passes of the denoiser.
        """
        return cls.within(max(0, free(device) - pool), device, cells, pool, spare)

    @classmethod
    def within(
        cls, unused: int, device: torch.device, cells: int, pool: int = 0, spare: Callable[[], bool] = bool
    ) -> Budget:
        """Half of the `unused` bytes, first for batches (which have the `pool` besides), later for the autoencoder."""
        half = unused // 2
        if device.type == "cpu":  # gains nothing from batches, and shares its memory with the pictures
            return cls(1, min(half, HOST_HOLD), min(half, HOST_HOLD), spare)
        room = (unused + pool) // 2
        batch = max((size for size in BATCHES if size * cells * HALF_CELL <= room), default=1)
        return cls(batch, half, int(WHOLE_SHARE * 2 * half), spare)


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's CPU allocator and some CUDA libraries say so in words only."""
    words = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(known in words for known in OUT_OF_MEMORY)


def free(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine within the limit of its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(0, available)
