"""The memory budget: planning from free memory, what is reduced first, and the final error."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seesr.runtime import memory
from seesr.runtime.memory import BYTES_PER_LATENT_PIXEL, HOST_HOLD, Budget, OutOfMemory

LATENT_PIXELS = 64 * 64
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(("share", "batch"), [(100, 8), (1.0, 8), (0.99, 5), (0.5, 4), (0.49, 1), (0.0, 1)])
def test_a_gpu_is_planned_from_what_is_free(monkeypatch: pytest.MonkeyPatch, share: float, batch: int) -> None:
    """Half of it for batches, half for what waits, more for a pass over the whole."""
    free = 2 * int(share * 8 * LATENT_PIXELS * BYTES_PER_LATENT_PIXEL)
    monkeypatch.setattr(memory, "free", lambda device: free)
    result = Budget.for_device(GPU, LATENT_PIXELS)
    assert (result.batch.amount, result.hold.amount) == (batch, free // 2)
    assert result.whole.amount == pytest.approx(0.85 * free, abs=2)


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "CUDA error: operation failed due to a previous error during capture (cudaErrorStreamCaptureInvalidated)",
    ],
)
def test_every_out_of_memory_message_is_recognized(message: str) -> None:
    assert memory.is_out_of_memory(RuntimeError(message))
    assert not memory.is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(
    ("name", "amount", "steps", "remedy"),
    [
        ("batch", 8, [5, 4, 1], "use a smaller latent_tiled_size"),
        ("batch", 6, [5, 4, 1], "fewer particles"),
        ("hold", 2**30, [2**29, 2**28, 0], "a device with more free memory"),
        ("hold", 1, [0], "stop other programs"),
        ("whole", 2**40, [0], "use tiles"),
        ("single", 0, [], "stop other programs"),
    ],
)
def test_memory_is_reduced_step_by_step_until_it_fails(
    name: str, amount: int, steps: list[int], remedy: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan, seen, released = Budget(**({name: amount} if amount else {})), [], []
    allowance: memory.Allowance = getattr(plan, name)

    def fails() -> None:
        seen.append(allowance.amount)
        raise MemoryError("no room\nfor " + "this " * 100)

    with pytest.raises(OutOfMemory, match="a single tile does not fit .no room for this this") as error:
        allowance.attempt(fails, lambda: released.append(len(seen)))
    assert seen == [amount, *steps] and released == [*range(1, len(seen) + 1)]
    assert plan.retries == allowance.lowered == len(steps)
    assert remedy in str(error.value) and len(str(error.value)) < 400
    assert not steps or f"{allowance.name} = {steps[0]}" in caplog.text


def test_caches_are_freed_before_the_smallest_batch_fails() -> None:
    spared, seen = [True, False, False], []
    plan = Budget(batch=8, spare=lambda: spared.pop(0))

    def fails() -> None:
        seen.append(plan.batch.amount)
        raise MemoryError

    with pytest.raises(OutOfMemory):
        plan.batch.attempt(fails)
    assert seen == [8, 5, 4, 4, 1] and not spared


def test_recorded_passes_hold_memory_that_only_batches_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    need = 8 * LATENT_PIXELS * BYTES_PER_LATENT_PIXEL
    monkeypatch.setattr(memory, "free", lambda device: 2 * need)
    result = Budget.for_device(GPU, LATENT_PIXELS, pool=need)
    assert result.batch.amount == 8
    assert result.hold.amount == need // 2 and result.whole.amount == pytest.approx(0.85 * need, abs=2)


def test_without_a_plan_one_tile_is_run_and_nothing_held() -> None:
    plan = Budget()
    assert (plan.batch.amount, plan.hold.amount, plan.whole.amount, plan.retries) == (1, 0, 0, 0)


def test_another_failure_is_passed_on_at_once() -> None:
    plan, calls = Budget(batch=8), []

    def fails() -> None:
        calls.append(1)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        plan.batch.attempt(fails)
    assert calls == [1] and plan.retries == 0 and plan.batch.attempt(lambda: 7) == 7


def test_restore_undoes_casts_to_float32() -> None:
    plan, value = Budget(), torch.nn.Parameter(torch.ones(2))
    plan.cast.append((value, value.data))
    value.data = torch.zeros(2)
    plan.restore()
    assert torch.equal(value.data, torch.ones(2)) and plan.cast == [] and plan.redone == 0


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({}, 3072),
        ({"memory.max": "max\n", "memory.current": "5"}, 3072),
        ({"memory.max": "2000\n", "memory.current": "500\n"}, 1500),
        ({"memory.max": "9000\n", "memory.current": "500\n"}, 3072),
        ({"memory.max": "400\n", "memory.current": "500\n"}, 0),
    ],
)
def test_free_host_memory_is_within_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: dict[str, str], free: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:   9 kB\nMemFree:   1 kB\nMemAvailable:       3 kB\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, text in group.items():
        (tmp_path / "sys/fs/cgroup" / name).write_text(text)
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / name[1:])
    monkeypatch.setattr(memory, "freed_memory", lambda: 0)
    assert memory.free(CPU) == free
    monkeypatch.setattr(memory, "freed_memory", lambda: 70)
    assert memory.free(CPU) == free + 70


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc returns freed blocks to the kernel")
def test_freed_blocks_are_kept_until_they_are_returned() -> None:
    """A process of its own, since a block of other tests could be in the way."""
    program = """
import resource
import numpy as np
from seesr.runtime import memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

first = faults(), faults()
memory.ROOM_TO_KEEP = 0
memory.keep_freed_memory()
faults()
kept, held = faults(), memory.freed_memory()
memory.return_freed_memory()
print(min(first) > 0, kept < 16, held >= 2**25, faults() > 16 * kept)
"""
    environment = {name: value for name, value in os.environ.items() if name not in memory.MALLOC_VARIABLES}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == "True True True True\n", result.stdout + result.stderr


@pytest.mark.parametrize("variable", memory.MALLOC_VARIABLES)
def test_malloc_is_left_alone_if_memory_is_short_or_the_user_sets_it(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *call: calls.append(call)))
    monkeypatch.setattr(memory, "free", lambda device: memory.ROOM_TO_KEEP)
    memory.keep_freed_memory()
    assert calls == [(memory.M_MMAP_MAX, 0), (memory.M_TRIM_THRESHOLD, memory.KEPT)]
    assert (ctypes.c_int(memory.KEPT).value, ctypes.c_int(memory.KEPT + 1).value) == (memory.KEPT, -(memory.KEPT + 1))
    monkeypatch.setattr(memory, "free", lambda device: memory.ROOM_TO_KEEP + 99)
    memory.keep_freed_memory(100)
    assert len(calls) == 2, "memory is short"
    memory.keep_freed_memory(99)
    assert len(calls) == 4
    calls.clear()
    monkeypatch.setenv(variable, "1")
    memory.keep_freed_memory()
    assert not calls


def test_without_glibc_freed_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: SimpleNamespace())
    memory.keep_freed_memory()
    memory.return_freed_memory()
    assert memory.freed_memory() == 0


def test_free_gpu_memory_counts_what_torch_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(
        memory_reserved=lambda device: 700,
        memory_allocated=lambda device: 500,
        mem_get_info=lambda device: (1000, 9000),
    )
    monkeypatch.setattr(torch, "cuda", state)
    assert memory.free(GPU) == 1200


@pytest.mark.parametrize("free", [10**9, 10**12])
def test_a_cpu_holds_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(memory, "free", lambda device: free)
    result = Budget.for_device(CPU, LATENT_PIXELS)
    assert (result.batch.amount, result.hold.amount) == (1, min(free // 2, HOST_HOLD))
    assert result.whole.amount == result.hold.amount <= 2**31
