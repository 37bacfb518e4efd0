"""Memory budget: batch sizes from the free memory, and retries with smaller ones after an out-of-memory error."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from seesr.runtime.tiling import BATCHES

# Arguments of glibc's mallopt (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
KEPT = 2**31 - 1  # bytes of freed memory that a process keeps at most
ROOM_TO_KEEP = 4 * 10**9  # free bytes, beside the weights' size, from which it keeps any
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
BYTES_PER_LATENT_PIXEL = (
    90_000  # bytes of activations per latent pixel and tile of a batch in half precision: 0.37 GB for 64 x 64
)
WHOLE_SHARE = 0.85  # of the free GPU memory: nothing else runs beside the autoencoder
MIN_HOLD = 2**28  # below this, nothing is held
HOST_HOLD = 2**31  # bytes that waiting tiles may keep in host memory, at most
OUT_OF_MEMORY = (  # messages of torch's CPU allocator, cuBLAS, cuDNN and CUDA graph capture
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
    """Out of memory at the smallest batch too. One line: the allocator's reason and what to change."""


class Allowance:
    """An amount that is lowered after each out-of-memory error. A lower amount changes the time, never the pixels.

    Args:
        name: for the log.
        amount: initial value.
        least: lower bound.
        lower: maps an amount to the next smaller one.
        remedy: what the caller can change when `least` does not fit; ends the error message.
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

        Before the amount becomes the least, or where it is the least, `spare` is called first.

        Args:
            release: drops what an interrupted `work` and its neighbours still hold.
            lower: replaces the allowance's `lower`.

        Raises:
            OutOfMemory: the least amount does not fit either.
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
            return_freed_memory()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if spared:
                self.lowered += 1
                log.warning("out of memory (%s); retrying without CUDA graphs", reason)
                continue
            if self.amount == self.least:
                log.error("out of memory at the smallest batch: %s", reason)
                raise OutOfMemory(f"out of memory: a single tile does not fit ({reason}); {self.remedy}")
            self.lowered += 1
            self.amount = following
            log.warning("out of memory (%s); retrying with %s = %d", reason, self.name, self.amount)


class Budget:
    """Memory limits for one image: batch size and cached bytes.

    Attributes:
        batch: tiles per forward pass of the denoiser.
        hold: bytes that waiting tiles of the autoencoder may keep.
        whole: bytes that the autoencoder may take for a pass over the whole image; above, it works in tiles.
        single: nothing to lower: a pass that must fit.
        spare: frees memory that is only there for speed, such as recorded graphs; False where there is none.
        redone: number of float32 retries after an overflow in half precision.
        cast: parameters cast to float32 for a retry, each with its half-precision values.
    """

    def __init__(self, batch: int = 1, hold: int = 0, whole: int = 0, spare: Callable[[], bool] = bool) -> None:
        larger = "use a device with more free memory, or stop other programs on this one"
        self.batch = Allowance(
            "tiles per batch", batch, 1, lambda amount: max(size for size in BATCHES if size < amount),
            "use a smaller latent_tiled_size, fewer particles, or a device with more free memory", spare,
        )  # fmt: skip
        self.hold = Allowance(
            "bytes held", hold, 0, lambda amount: amount // 2 if amount > MIN_HOLD else 0, larger, spare
        )
        self.whole = Allowance("bytes for a pass over the whole", whole, 0, lambda amount: 0, "use tiles", spare)
        self.single = Allowance("single passes", 0, 0, lambda amount: 0, larger, spare)
        self.redone = 0
        self.cast: list[tuple[Tensor, Tensor]] = []

    def restore(self) -> None:
        """Restores the half-precision parameters of networks that were cast to float32."""
        for value, original in self.cast:
            value.data = original
        self.cast.clear()

    @property
    def retries(self) -> int:
        """Number of retries after an out-of-memory error."""
        return self.batch.lowered + self.hold.lowered + self.whole.lowered + self.single.lowered

    @classmethod
    def for_device(
        cls, device: torch.device, latent_pixels: int, pool: int = 0, spare: Callable[[], bool] = bool
    ) -> Budget:
        """The budget for tiles of `latent_pixels` on a device with its current free memory.

        Args:
            pool: bytes reported as free that belong to the CUDA graphs of the denoiser.
        """
        return cls.within(max(0, free(device) - pool), device, latent_pixels, pool, spare)

    @classmethod
    def within(
        cls, unused: int, device: torch.device, latent_pixels: int, pool: int = 0, spare: Callable[[], bool] = bool
    ) -> Budget:
        """Half of the `unused` bytes, first for batches (which have the `pool` besides), later for the autoencoder."""
        half = unused // 2
        if device.type == "cpu":  # gains nothing from batches, and shares its memory with the images
            return cls(1, min(half, HOST_HOLD), min(half, HOST_HOLD), spare)
        available = (unused + pool) // 2
        batch = max((size for size in BATCHES if size * latent_pixels * BYTES_PER_LATENT_PIXEL <= available), default=1)
        return cls(batch, half, int(WHOLE_SHARE * 2 * half), spare)


def libc(name: str) -> Any:
    """A function of the C library; None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None)


def keep_freed_memory(weights: int = 0) -> None:
    """Has glibc reuse freed blocks instead of returning each to the kernel, for the rest of the process.

    On a CPU every activation is a block of megabytes. Fresh pages for them took about a tenth of an image's time
    (docs/decisions/0039-cpu-memory-and-precision.md). Does nothing if the environment sets one of MALLOC_VARIABLES,
    without glibc, or where memory is short.

    Args:
        weights: bytes of the networks, which are loaded; larger ones keep more.
    """
    mallopt = libc("mallopt")
    roomy = free(torch.device("cpu")) >= weights + ROOM_TO_KEEP
    if mallopt is not None and roomy and not set(MALLOC_VARIABLES) & os.environ.keys():
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def return_freed_memory() -> None:
    """Returns freed blocks to the kernel."""
    malloc_trim = libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


class MallInfo(ctypes.Structure):
    """Statistics of glibc's malloc, struct mallinfo2."""

    _fields_ = (
        ("others", ctypes.c_size_t * 8),
        ("fordblks", ctypes.c_size_t),  # of freed blocks
        ("keepcost", ctypes.c_size_t),
    )


def freed_memory() -> int:
    """Bytes of freed blocks that this process keeps."""
    mallinfo = libc("mallinfo2")
    if mallinfo is None:
        return 0
    mallinfo.restype = MallInfo
    return int(mallinfo().fordblks)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an out-of-memory error; some libraries say so only in the message."""
    message = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(known in message for known in OUT_OF_MEMORY)


def free(device: torch.device) -> int:
    """Bytes available on the GPU, or on the machine within the limit of its control group."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return max(0, available) + freed_memory()
