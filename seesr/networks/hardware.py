"""Per-device tuning of loaded networks: memory format and attention, matrix-product and fused kernels."""

from __future__ import annotations

import functools
import logging
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seesr.networks.attention import Kernel, set_kernel
from seesr.networks.kernels import KERNELS, OneDnnLinear, TileLinear, first_line, one_dnn_multiplies, use_one_dnn

log = logging.getLogger(__name__)

# Kernels of `fused` by the card's capability, where they were measured to be right and faster.
FUSED = {(9, 0): frozenset({"group_norm", "geglu", "layer_norm"})}  # results/gpu-h200/evidence.json
LAST_UNSAFE_CUDNN = 91500  # up to here torch does not choose it either (pytorch issue 169849)


def tune(networks: Any, attention: str = "auto", fused: bool = False) -> str:
    """Arranges loaded networks for their device, in place; returns the name of the attention kernel.

    Args:
        attention: see `choose`.
        fused: use the fused kernels of this card; only graphs make up for what their launches cost the host.

    Raises:
        ValueError: from `choose`.
    """
    on_cpu = networks.device.type == "cpu"
    if on_cpu:
        networks.vae.to(memory_format=torch.channels_last)  # 1.1 to 1.4 times as fast; the UNet gains nothing
    elif channels_last_pays(networks.device, networks.dtype):
        for network in (networks.unet, networks.controlnet, networks.vae):
            network.to(memory_format=torch.channels_last)
        if fused:
            use_fused_kernels(networks)
    if on_cpu and one_dnn_pays():
        for network in (networks.text_encoder, networks.tagger):
            use_one_dnn(network, OneDnnLinear)
        for network in (networks.unet, networks.controlnet):
            use_one_dnn(network, TileLinear)
    name = choose(attention, networks.device, networks.dtype)
    for network in (networks.unet, networks.controlnet):
        set_kernel(network, KERNELS[name])
    return name


@functools.cache
def strips_kernel(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor] | None:
    """`fused.scaled` where FUSED has "strips" for this card, for the norms of the autoencoder's row strips."""
    cards = [card for card, kinds in FUSED.items() if "strips" in kinds]
    if device.type != "cuda" or not cards or torch.cuda.get_device_capability(device) not in cards:
        return None
    from seesr.networks import fused

    return fused.scaled


def use_fused_kernels(networks: Any) -> None:
    """Has the denoiser's networks computed by the kernels that FUSED has for this card, where Triton works."""
    kinds = FUSED.get(torch.cuda.get_device_capability(networks.device), frozenset())
    if not kinds:
        return
    try:
        from seesr.networks import fused

        x = torch.ones(1, 8, 2, 2, device=networks.device, dtype=networks.dtype).to(memory_format=torch.channels_last)
        fused.group_norm(x, 2, x[0, :, 0, 0].contiguous(), x[0, :, 0, 0].contiguous(), 1e-5, True)
    except (ImportError, RuntimeError) as error:
        log.warning("Triton kernels are disabled: %s", first_line(error))
        return
    for network in (networks.unet, networks.controlnet):
        fused.fuse(network, kinds & fused.CLASSES.keys())


def choose(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the attention kernel for this device.

    Args:
        name: one of KERNELS; or "auto": a CPU takes "rows" where oneDNN can multiply in this dtype and is faster, and
            a GPU what torch chooses by its own table of cards and versions. Nothing is timed: one seed is one image
            at every start.

    Raises:
        ValueError: the kernel is not known, or does not work here.
    """
    if name == "auto" and device.type == "cpu":
        return "rows" if one_dnn_pays() and one_dnn_multiplies(dtype) else "sdpa"
    if name == "auto":
        return "sdpa"
    if name not in KERNELS:
        raise ValueError(f"SEESR_ATTENTION is {name!r}: it must be one of auto, {', '.join(KERNELS)}")
    try:
        if name == "cudnn" and (torch.backends.cudnn.version() or 0) <= LAST_UNSAFE_CUDNN:
            raise RuntimeError("cuDNN up to 9.15.0 reads beyond keys whose number is no multiple of 128")
        try_out(KERNELS[name], device, dtype)
    except (RuntimeError, ImportError, NotImplementedError) as error:
        raise ValueError(f"SEESR_ATTENTION={name} does not work here: {first_line(error)}") from error
    return name


def one_dnn_pays() -> bool:
    """Whether oneDNN's products are faster than torch's own: with AVX-512, not with AVX2."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX512") and one_dnn_multiplies(torch.float32)


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has instructions for products in bfloat16."""
    return cpuinfo.exists() and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpuinfo.read_text().split())


def channels_last_pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether convolutions are faster with the channels innermost: those of tensor cores are, 1.4 to 1.6 times."""
    return dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (7, 0)


@torch.no_grad()
def try_out(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a kernel on a few rows, laid out as in the networks: of itself, and of a prompt for two tiles."""
    q = torch.zeros(2, 64, 1, 64, device=device, dtype=dtype).transpose(1, 2)
    context = q[:1, :, :63].expand(2, -1, -1, -1)
    kernel(q, q, q)
    kernel(q, context, context)


def usable(device: str | None) -> torch.device:
    """The device of this name; None: the GPU if there is one.

    Raises:
        ValueError: there is no such device here; one line.
    """
    try:
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=target).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device {device!r} cannot be used here: {first_line(error)}") from error
    return target if target.type != "cpu" else torch.device("cpu")  # safetensors knows no cpu:0


def name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def about(device: torch.device) -> dict[str, Any]:
    """Name, and of a GPU its capability and memory in bytes."""
    description: dict[str, Any] = {"device": name(device)}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = {"free": free, "total": total, "held": torch.cuda.memory_reserved(device)}
        description |= {"capability": torch.cuda.get_device_capability(device), "gpu_memory": memory}
        description["device_index"] = device.index or 0
    return description


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak resident memory of this process, MB (10^6 bytes)."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6}  # KiB on Linux
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device) // 10**6
    return peak
