"""The denoiser's forward pass as a CUDA graph: one launch of the whole instead of 1,700 of its parts.

A graph is recorded for one shape and reads fixed memory, so inputs and context tokens are copied there first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seesr.attention import Tokens

if TYPE_CHECKING:
    from seesr.sampling import Denoiser

Replay = Callable[[], None]


def record_on_cuda(work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Runs `work` to warm it up, records it, and returns what replays it and where its result then lies."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph.replay, found


class Graphs:
    """Recorded forward passes, by shape; kept over pictures."""

    def __init__(self, record: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]] = record_on_cuda) -> None:
        self.record = record
        self.found: dict[tuple[object, ...], Recording] = {}

    def predict(self, denoiser: Denoiser, z: Tensor, t: Tensor, hint: Tensor) -> Tensor:
        """The same as denoiser.predict(z, t, hint)."""
        shapes = z.shape, hint.shape, denoiser.text.values.shape, denoiser.image.values.shape
        key = (*shapes, denoiser.guidance, denoiser.conditioning)
        if key not in self.found:
            self.found[key] = Recording(denoiser, z, t, hint, self.record)
        return self.found[key](denoiser, z, t, hint)

    def clear(self) -> None:
        self.found.clear()


class Recording:
    """One shape: the memory that the graph reads, and the graph."""

    def __init__(
        self,
        denoiser: Denoiser,
        z: Tensor,
        t: Tensor,
        hint: Tensor,
        record: Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]],
    ) -> None:
        self.inputs = tuple(x.clone() for x in (z, t, hint))
        self.tokens = Tokens(denoiser.text.values.clone()), Tokens(denoiser.image.values.clone())
        self.loaded = (denoiser.text, denoiser.image)
        own = dataclasses.replace(denoiser, text=self.tokens[0], image=self.tokens[1], features={}, graphs=None)
        self.replay, self.result = record(lambda: own.predict(*self.inputs))

    def __call__(self, denoiser: Denoiser, *inputs: Tensor) -> Tensor:
        """Loads the picture's tokens if they are others than last time, and the inputs, and runs the graph."""
        given = (denoiser.text, denoiser.image)
        if self.loaded != given:
            for mine, new in zip(self.tokens, given, strict=True):
                mine.become(new)
            self.loaded = given
        for place, x in zip(self.inputs, inputs, strict=True):
            place.copy_(x)
        self.replay()
        return self.result.clone()
