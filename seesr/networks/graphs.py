"""Forward passes as CUDA graphs: one launch instead of 1,700.

A graph is recorded for one shape and reads fixed memory, so inputs and context tokens are copied there first. Graphs
are recorded during setup only, where nobody cancels and no other thread uses the device; a pass of any other shape runs
eagerly. Every recording is replayed on two other inputs and compared with the eager pass bit by bit before it is used.
If one differs or fails, there are no graphs at all, and `Graphs.state` says why.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seesr.networks.attention import Tokens

FREED = "their memory was needed for an image"
CHECKS = 2  # replays that are compared with the eager pass
Replay = Callable[[], None]
Recorder = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
Forward = Callable[..., Tensor]  # takes the inputs, then the contexts; equal ones compute the same
log = logging.getLogger(__name__)


class CudaRecorder:
    """Records on the current device. All graphs share one memory pool, since they run one after the other."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Takes a new pool and new streams, for graphs that are recorded after all earlier ones were freed.

        cuBLAS has a workspace for every stream. It must be allocated while recording, in the graphs' own pool, which
        lives as long as they do: torch frees all workspaces now and then (torch.compile with CUDA graphs does), and a
        graph whose workspace was outside of its pool would write into memory that is no longer there.
        """
        torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportPrivateUsage]
        self.pool = torch.cuda.graph_pool_handle()
        self.warm, self.stream = torch.cuda.Stream(), torch.cuda.Stream()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """Runs `work` once to warm it up, records it, and returns what replays it and where its result then is."""
        self.warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.warm):
            work()
        torch.cuda.current_stream().wait_stream(self.warm)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result

    def held(self) -> int:
        """Bytes of the pool that no allocation outside a graph can use."""
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] - s["allocated_size"] for s in segments if s["segment_pool_id"] == self.pool)


class Graphs:
    """Recorded forward passes by function, shapes, dtypes and weights, kept over images.

    Args:
        record: see CudaRecorder; it may have `held`.
    """

    def __init__(self, record: Recorder) -> None:
        self.record = record
        self.recording = False
        self.reason = ""  # why there are none
        self.held = 0  # bytes of their pool that look free and are not
        self.recordings: dict[tuple[object, ...], Recording] = {}
        self.contexts: dict[tuple[object, ...], Contexts] = {}

    @property
    def state(self) -> str:
        """For metrics and the status page: "on", or "off (reason)"."""
        return f"off ({self.reason})" if self.reason else "on"

    @contextlib.contextmanager
    def setup(self) -> Iterator[None]:
        """Passes of new shapes are recorded inside this block only."""
        self.recording, self.reason = True, ""
        if not self.recordings and isinstance(self.record, CudaRecorder):
            self.record.start()
        try:
            yield
        finally:
            self.recording = False
            self.held = self.record.held() if self.recordings and isinstance(self.record, CudaRecorder) else 0

    def run(
        self,
        forward: Forward,
        inputs: tuple[Tensor, ...],
        contexts: tuple[Tokens, ...] = (),
        networks: tuple[nn.Module, ...] = (),
    ) -> Tensor:
        """The same as forward(*inputs, *contexts).

        Args:
            networks: those whose weights `forward` reads. A recording reads the memory where they were: after they
                are cast or moved, the pass runs eagerly.
        """
        shapes = tuple((x.shape, x.dtype) for x in (*inputs, *(context.values for context in contexts)))
        weights = tuple(place(network) for network in networks)
        key = (forward, shapes, weights)
        if self.recording and not self.reason and key not in self.recordings:
            self.add(key, forward, inputs, contexts)
        if key not in self.recordings:
            return forward(*inputs, *contexts)
        return self.recordings[key](inputs, contexts)

    def add(
        self, key: tuple[object, ...], forward: Forward, inputs: tuple[Tensor, ...], contexts: tuple[Tokens, ...]
    ) -> None:
        """Records and checks a pass; if that fails, there are no graphs from then on."""
        try:
            recording = Recording(forward, inputs, self.context(key, contexts), self.record)
            recording.check(forward, inputs, contexts)
        except RuntimeError as error:
            self.turn_off(" ".join(str(error).split())[:200])
        else:
            self.recordings[key] = recording

    def context(self, key: tuple[object, ...], contexts: tuple[Tokens, ...]) -> Contexts | None:
        """The memory for tokens of these shapes: all batches and tile sizes share it."""
        if not contexts:
            return None
        shared = (*((c.values.shape, c.values.dtype) for c in contexts), key[2])
        if shared not in self.contexts:
            self.contexts[shared] = Contexts(contexts, self.record)
        return self.contexts[shared]

    def attach(self, owner: Any, method: str = "forward") -> None:
        """Replays a method that takes one tensor and returns one, from now on."""
        original = getattr(owner, method)
        setattr(owner, method, functools.partial(self.run_method, original, owner))

    def run_method(self, original: Forward, owner: nn.Module, x: Tensor) -> Tensor:
        return self.run(original, (x,), networks=(owner,))

    def spare(self) -> bool:
        """Frees all recordings for the rest of an image that lacks memory; False where there are none."""
        if not self.recordings:
            return False
        self.turn_off(FREED)
        return True

    def turn_off(self, reason: str) -> None:
        """Frees all recordings; passes run eagerly until the next setup."""
        log.warning("CUDA graphs are off: %s", reason)
        self.reason, self.held = reason, 0
        self.recordings.clear()
        self.contexts.clear()


class Contexts:
    """The memory that graphs read an image's tokens and their keys and values from, and the graph that fills it."""

    def __init__(self, tokens: tuple[Tokens, ...], record: Recorder) -> None:
        self.copies = tuple(Tokens(context.values.clone()) for context in tokens)
        self.loaded: tuple[Tokens, ...] | None = None
        self.record = record
        self.replay: Replay | None = None

    def load(self, tokens: tuple[Tokens, ...]) -> None:
        """Takes these tokens, and computes their keys and values, unless they are those of the last call."""
        if self.loaded == tokens:
            return
        for copy, new in zip(self.copies, tokens, strict=True):
            copy.values.copy_(new.values)
        if self.replay is None:  # the first pass has computed keys and values, so all attentions are known
            self.replay, _ = self.record(self.project)
        self.replay()
        self.loaded = tokens

    def project(self) -> Tensor:
        for copy in self.copies:
            copy.recompute()
        return self.copies[0].values


class Recording:
    """One shape: the memory that the graph reads, and the graph."""

    def __init__(
        self, forward: Forward, inputs: tuple[Tensor, ...], contexts: Contexts | None, record: Recorder
    ) -> None:
        self.inputs, self.contexts = tuple(x.clone() for x in inputs), contexts
        context_copies = contexts.copies if contexts else ()
        self.replay, self.result = record(lambda: forward(*self.inputs, *context_copies))

    def __call__(self, inputs: tuple[Tensor, ...], tokens: tuple[Tokens, ...]) -> Tensor:
        if self.contexts:
            self.contexts.load(tokens)
        for copy, x in zip(self.inputs, inputs, strict=True):
            copy.copy_(x)
        self.replay()
        return self.result.clone()

    def check(self, forward: Forward, inputs: tuple[Tensor, ...], tokens: tuple[Tokens, ...]) -> None:
        """Replays other inputs with other tokens.

        Raises:
            RuntimeError: a result is not bit for bit that of the eager pass.
        """
        for seed in range(1, CHECKS + 1):
            tried = tuple(varied(x, seed) for x in inputs)
            others = tuple(Tokens(varied(context.values, seed)) for context in tokens)
            if not same_bits(self(tried, others), forward(*tried, *others)):
                shapes = ", ".join("x".join(map(str, x.shape)) for x in inputs)
                raise RuntimeError(f"a replayed pass of {shapes} differs from the eager one")


def varied(x: Tensor, seed: int) -> Tensor:
    """Other values of the same shape: noise, or for integers (token ids, timesteps) smaller ones."""
    if not x.is_floating_point():
        return x // (seed + 1)
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal bit for bit; NaN equals itself."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))


def place(network: nn.Module) -> tuple[int, torch.dtype]:
    """Where a network's first weights are, and in which dtype; a network is cast and moved as a whole."""
    first = next(network.parameters())
    return first.data_ptr(), first.dtype
