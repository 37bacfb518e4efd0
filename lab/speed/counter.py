"""Counts operations, bytes, launches, waits and memory of tensors on a fake GPU, without computing values."""

from __future__ import annotations

import collections
import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
FUSED = {
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
}
KERNELS = {aten.native_group_norm: 3, aten.linalg_vector_norm: 2}  # of operations that launch more than one
NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten.detach}
OVERWRITE = {aten.copy_, aten.zero_, aten.fill_}  # their first argument is not read


class Work(NamedTuple):
    """One operation: its kind (convolution, product, attention, other), FLOP (a product and a sum are two), and the
    bytes that it reads and writes."""

    kind: str
    flop: int
    moved: int


@dataclasses.dataclass
class Stage:
    """What one part of the way of an image costs."""

    work: collections.Counter[Work] = dataclasses.field(default_factory=collections.Counter)
    launches: int = 0
    synchronisations: int = 0
    bus_bytes: int = 0
    peak: int = 0  # bytes held above those at its begin

    def add(self, other: Stage) -> None:
        """Takes in the work of another; the peak stays."""
        self.work.update(other.work)
        self.launches += other.launches
        self.synchronisations += other.synchronisations
        self.bus_bytes += other.bus_bytes

    def less(self, before: Stage) -> Stage:
        """What came since."""
        launches, waits = self.launches - before.launches, self.synchronisations - before.synchronisations
        return Stage(self.work - before.work, launches, waits, self.bus_bytes - before.bus_bytes)

    def flop(self, kind: str | None = None) -> int:
        return sum(work.flop * times for work, times in self.work.items() if kind in (None, work.kind))

    @property
    def moved(self) -> int:
        return sum(work.moved * times for work, times in self.work.items())

    def row(self) -> dict[str, float]:
        flop = {f"{kind}_tflop": round(self.flop(of) / 1e12, 3) for kind, of in KINDS.items()}
        return {
            **flop,
            "moved_gb": round(self.moved / 1e9, 2),
            "peak_gb": round(self.peak / 1e9, 3),
            "launches": self.launches,
            "synchronisations": self.synchronisations,
        }


KINDS = {"conv": "convolution", "product": "product", "attention": "attention"}


class Counter(TorchDispatchMode):
    """Entered inside a FakeTensorMode. What stays on the host is computed for real; what is on the GPU is noted.

    Args:
        parameters: a product with one of them is a layer's; any other product is attention's.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.own = {x.untyped_storage()._cdata for x in parameters}
        self.stages: dict[str, Stage] = {}
        self.held = 0
        self.known: set[int] = set(self.own)
        self.begin("before")

    def begin(self, name: str) -> None:
        """What follows belongs to the stage of this name."""
        self.stage = self.stages.setdefault(name, Stage())
        self.first = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if func.overloadpacket is aten._local_scalar_dense and isinstance(inputs[0], FakeTensor):
            self.arrive(inputs[0].element_size(), waits=True)
            return True if inputs[0].dtype == torch.bool else 1.0  # all that is asked for is whether it is finite
        device = kwargs.get("device")
        if not any(isinstance(x, FakeTensor) for x in inputs) and torch.device(device or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        result = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        for x in outputs:
            self.hold(x)
        source = args[1] if func.overloadpacket is aten.copy_ else args[0] if args else None
        if isinstance(source, Tensor) and outputs and source.is_cuda != outputs[0].is_cuda:
            self.arrive(outputs[0].nbytes, waits=not (kwargs.get("non_blocking") or True in args[2:]))
            if not outputs[0].is_cuda:
                with unset_fake_temporarily():
                    return torch.zeros(result.shape, dtype=result.dtype)
        elif func.overloadpacket not in NOTHING and not is_view(func, inputs, outputs):
            self.note(func, args, kwargs, result, inputs, outputs)
        return result

    def arrive(self, size: int, waits: bool) -> None:
        """Bytes went over the bus."""
        self.stage.launches += 1
        self.stage.bus_bytes += size
        self.stage.synchronisations += waits

    def hold(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        if not x.is_cuda or storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.held += storage.nbytes()
        self.stage.peak = max(self.stage.peak, self.held - self.first)
        weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes())

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size

    def note(self, func: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        packet = func.overloadpacket
        flop = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        if packet is aten.convolution:
            kind = "convolution"
        elif flop and packet not in FUSED and any(x.untyped_storage()._cdata in self.own for x in inputs):
            kind = "product"
        else:
            kind = "attention" if flop else "other"
        read = inputs[1:] if packet in OVERWRITE else inputs
        self.stage.work[Work(kind, int(flop), sum(map(extent, read)) + sum(map(extent, outputs)))] += 1
        bias = packet is aten.convolution and args[2] is not None
        self.stage.launches += KERNELS.get(packet, 1) + bias


def is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Whether nothing is written: every result lies in the memory of an input."""
    if func._schema.is_mutable:
        return False
    before = {x.untyped_storage()._cdata for x in inputs}
    return all(x.untyped_storage()._cdata in before for x in outputs)


def extent(x: Tensor) -> int:
    """Bytes that are touched; those of an expanded tensor once."""
    return min(x.nbytes, x.untyped_storage().nbytes())
