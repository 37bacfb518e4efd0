"""Preflight check: whether this machine can run a bundle, before its weights are loaded."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import torch

from seesr.networks import hardware, weights
from seesr.networks.weights import CannotServe, gigabytes
from seesr.runtime import memory

MIN_CAPABILITY = (7, 0)  # of CUDA: below it the kernels for half precision are not built
WORK = 10**9  # bytes that a batch of one tile and the latents need beside the weights
HOST = 2 * 10**9  # bytes of the process itself
log = logging.getLogger(__name__)


class Machine(NamedTuple):
    """The properties of a machine that decide whether it can run a bundle.

    Attributes:
        device: its name; "cpu" for none.
        capability: of CUDA, or None on a CPU.
        free: bytes of GPU memory that are free, or None on a CPU.
        host: bytes of host memory.
        chosen: whether the caller chose the device.
    """

    device: str
    capability: tuple[int, int] | None
    free: int | None
    host: int
    chosen: bool


def look(device: str | None) -> Machine:
    """Looks at this machine.

    Raises:
        ValueError: the named device does not exist here.
    """
    target = hardware.usable(device)
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if target.type != "cuda":
        return Machine(hardware.name(target), None, None, host, device is not None)
    free, _ = torch.cuda.mem_get_info(target)
    capability = torch.cuda.get_device_capability(target)
    return Machine(hardware.name(target), capability, free, host, device is not None)


def check(machine: Machine, kind: str, size: int, precision: str = "auto") -> None:
    """Rejects a machine that cannot run the bundle; logs a warning for a slow one.

    Args:
        kind: of the bundle: the pocket one runs anywhere.
        size: bytes of the bundle's files, in half precision.
        precision: SEESR_PRECISION.

    Raises:
        CannotServe: no GPU and no SEESR_DEVICE=cpu, a GPU that is too old, or too little memory.
    """
    if machine.capability is None:
        if kind != "pocket" and not machine.chosen:
            raise CannotServe(
                "no GPU is visible; set SEESR_DEVICE=cpu to run on the CPU, which takes minutes for an image"
            )
        if kind != "pocket":
            log.warning("on the CPU an image takes minutes")
        need = loaded_size(size, "cpu", precision) + HOST
        if machine.host < need:
            message = f"{gigabytes(need):.1f} GB of memory are needed on the CPU"
            raise CannotServe(f"{message}; this machine has {gigabytes(machine.host):.1f}")
        return
    if machine.capability < MIN_CAPABILITY:
        has, least = (".".join(map(str, version)) for version in (machine.capability, MIN_CAPABILITY))
        raise CannotServe(f"{machine.device} has compute capability {has}; {least} is needed")
    need = loaded_size(size, "cuda", precision) + WORK
    if machine.free is not None and machine.free < need:
        message = f"{machine.device} has {gigabytes(machine.free):.1f} GB free; {gigabytes(need):.1f} are needed"
        raise CannotServe(f"{message}: stop other programs on it, or use a GPU with more memory")


def has_room(bundle: Path, device: str | None, precision: str = "auto") -> bool:
    """Whether a bundle fits into the memory that is free now, beside what this process holds.

    Raises:
        ValueError: the device that was named is not here.
    """
    target = hardware.usable(device)
    return memory.free(target) >= loaded_size(files_size(bundle), target.type, precision) + WORK


def loaded_size(size: int, device: str, precision: str) -> int:
    """Bytes of a bundle in memory, whose files of `size` bytes are in half precision."""
    own = "float32" if device == "cpu" else "float16"
    return size * (2 if (own if precision == "auto" else precision) == "float32" else 1)


def files_size(bundle: Path) -> int:
    """Bytes of the weights of a bundle."""
    return sum(path.stat().st_size for path in bundle.rglob("*.safetensors"))


def require(bundle: Path, device: str | None, precision: str = "auto") -> None:
    """Checks this machine for a bundle on disk, before it is loaded. The loader reports a missing bundle.

    Raises:
        CannotServe, ValueError: one line.
    """
    try:
        kind = json.loads((bundle / weights.MANIFEST).read_text())["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    check(look(device), kind, files_size(bundle), precision)
