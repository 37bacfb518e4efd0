"""A forward pass as a CUDA graph: one launch of the whole instead of 1,700 of its parts.

A graph is recorded for one shape and reads fixed memory, so inputs and context tokens are copied there first. Recording
belongs to the setup, where nobody cancels and no other thread uses the device: passes of shapes that were not met there
run as they are.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from seesr.networks.attention import Tokens

MOST = 8  # graphs that are kept, of all networks and shapes
Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
Forward = Callable[..., Tensor]  # takes the inputs, then the contexts; equal ones compute the same
log = logging.getLogger(__name__)


class CudaRecorder:
    """Records on the current device; all graphs share one pool of memory, since they run one after the other."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Runs `work` to warm it up, records it, and returns what replays it and where its result then lies."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


class Graphs:
    """Recorded forward passes by function, shapes and dtypes; kept over pictures, the last used MOST of them."""

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.recording = False
        self.recordings: collections.OrderedDict[tuple[object, ...], Recording] = collections.OrderedDict()
        self.failed: set[tuple[object, ...]] = set()

    @contextlib.contextmanager
    def setup(self) -> Iterator[None]:
        """New shapes are recorded in here alone."""
        self.recording = True
        try:
            yield
        finally:
            self.recording = False

    def run(self, forward: Forward, inputs: tuple[Tensor, ...], contexts: tuple[Tokens, ...] = ()) -> Tensor:
        """The same as forward(*inputs, *contexts)."""
        tensors = (*inputs, *(context.values for context in contexts))
        key = (forward, *((x.shape, x.dtype) for x in tensors))
        new = self.recording and key not in self.recordings and key not in self.failed
        if key not in self.recordings and not (new and self.add(key, forward, inputs, contexts)):
            return forward(*inputs, *contexts)
        self.recordings.move_to_end(key)
        return self.recordings[key](inputs, contexts)

    def add(
        self, key: tuple[object, ...], forward: Forward, inputs: tuple[Tensor, ...], contexts: tuple[Tokens, ...]
    ) -> bool:
        """Records a pass; False where that does not work, which is remembered."""
        try:
            self.recordings[key] = Recording(forward, inputs, contexts, self.record)
        except RuntimeError as error:
            log.warning("%s is not recorded, and runs as it is: %s", forward, " ".join(str(error).split())[:200])
            self.failed.add(key)
            return False
        if len(self.recordings) > MOST:
            self.recordings.popitem(last=False)
        return True

    def attach(self, owner: Any, method: str = "forward") -> None:
        """Has a method that takes one tensor and gives one go through here."""
        original = getattr(owner, method)
        setattr(owner, method, functools.partial(self.one, original))

    def one(self, original: Forward, x: Tensor) -> Tensor:
        return self.run(original, (x,))

    def clear(self) -> None:
        self.recordings.clear()


class Recording:
    """One shape: the memory that the graph reads, and the graph."""

    def __init__(
        self, forward: Forward, inputs: tuple[Tensor, ...], contexts: tuple[Tokens, ...], record: Recorder
    ) -> None:
        self.inputs = tuple(x.clone() for x in inputs)
        self.contexts = tuple(Tokens(context.values.clone()) for context in contexts)
        self.loaded = contexts
        self.replay, self.result = record(lambda: forward(*self.inputs, *self.contexts))

    def __call__(self, inputs: tuple[Tensor, ...], contexts: tuple[Tokens, ...]) -> Tensor:
        """Loads the picture's tokens if they are not those of the last call, and the inputs, and runs the graph."""
        if self.loaded != contexts:
            for mine, new in zip(self.contexts, contexts, strict=True):
                mine.become(new)
            self.loaded = contexts
        for place, x in zip(self.inputs, inputs, strict=True):
            place.copy_(x)
        self.replay()
        return self.result.clone()
