"""A forward pass as a CUDA graph: one launch of the whole instead of 1,700 of its parts.

A graph is recorded for one shape and reads fixed memory, so inputs and context tokens are copied there first.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seesr.networks.attention import Tokens

Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
Forward = Callable[..., Tensor]  # takes the inputs, then the contexts; equal ones compute the same


def record_on_cuda(work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Runs `work` to warm it up, records it, and returns what replays it and where its result then lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph.replay, result


class Graphs:
    """Recorded forward passes by function and shapes; kept over pictures."""

    def __init__(self, record: Recorder = record_on_cuda) -> None:
        self.record = record
        self.recordings: dict[tuple[object, ...], Recording] = {}

    def run(self, forward: Forward, inputs: tuple[Tensor, ...], contexts: tuple[Tokens, ...]) -> Tensor:
        """The same as forward(*inputs, *contexts)."""
        key = (forward, *(x.shape for x in inputs), *(context.values.shape for context in contexts))
        if key not in self.recordings:
            self.recordings[key] = Recording(forward, inputs, contexts, self.record)
        return self.recordings[key](inputs, contexts)

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
