"""CUDA graphs, with stand-ins for CUDA's recorder: correct recordings are used, everything else runs eagerly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from seesr.networks.attention import Tokens
from seesr.networks.graphs import CudaRecorder, Graphs, Recorder, same_bits, varied

Recorded = tuple[Callable[[], None], Tensor]


def rerun(work: Callable[[], Tensor]) -> Recorded:
    """Honest: replaying reads and writes the same memory."""
    result = work()

    def replay() -> None:
        result.copy_(work())

    return replay, result


def stale(work: Callable[[], Tensor]) -> Recorded:
    """Gives what it gave when it was recorded."""
    return lambda: None, work()


def nearly(work: Callable[[], Tensor]) -> Recorded:
    """Sums in another order."""
    return rerun(lambda: work() * (1 + 2**-20))


def fails(work: Callable[[], Tensor]) -> Recorded:
    raise RuntimeError("operation not permitted\nwhen stream is capturing")


def without_memory(work: Callable[[], Tensor]) -> Recorded:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def add(x: Tensor) -> Tensor:
    return x + 1


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (stale, "a replayed pass of 2x3 differs from the eager one"),
        (nearly, "a replayed pass of 2x3 differs from the eager one"),
        (fails, "operation not permitted when stream is capturing"),
        (without_memory, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_a_graph_that_differs_or_fails_falls_back_to_eager(
    record: Recorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    graphs, x = Graphs(record), torch.ones(2, 3)
    with graphs.setup():
        for _ in range(3):
            assert torch.equal(graphs.run(add, (x,)), x + 1)
        assert torch.equal(graphs.run(add, (x[:1],)), x[:1] + 1)
    assert graphs.state == f"off ({reason})" and not graphs.recordings
    assert torch.equal(graphs.run(add, (x,)), x + 1)
    assert caplog.text.count("CUDA graphs are off") == 1


def test_passes_are_recorded_during_setup_only() -> None:
    graphs = Graphs(rerun)
    graphs.run(add, (torch.ones(2),))
    assert not graphs.recordings
    with graphs.setup():
        graphs.run(add, (torch.ones(2),))
    graphs.run(add, (torch.ones(3),))
    assert len(graphs.recordings) == 1 and graphs.state == "on"


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 3.0, dtype=torch.float16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) * self.weight).float()


def test_weights_that_are_no_longer_where_they_were_are_not_replayed() -> None:
    """A recording reads the memory that the weights had; a second try in single precision has its own."""
    network = Scaled()
    copied = copy.deepcopy(network)

    def record(work: Callable[[], Tensor]) -> Recorded:
        result = work()

        def replay() -> None:
            own, network.weight.data = network.weight.data, copied.weight.data
            result.copy_(work())
            network.weight.data = own

        return replay, result

    graphs, x = Graphs(record), torch.full((2,), 30_000.0)
    with graphs.setup():
        graphs.run(network, (x,), networks=(network,))
    assert graphs.run(network, (x,), networks=(network,)).isinf().all()
    own = network.weight.data
    network.weight.data = own.float()
    assert torch.equal(graphs.run(network, (x,), networks=(network,)), 3 * x)
    network.weight.data = own  # as after the image that needed it
    assert graphs.run(network, (x,), networks=(network,)).isinf().all()
    assert graphs.state == "on" and len(graphs.recordings) == 1


class Attention(nn.Module):
    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(4, 4), nn.Linear(4, 4)


@torch.no_grad()
def test_recorded_graphs_share_the_tokens_of_an_image() -> None:
    attention, recorded = Attention(), []

    def forward(x: Tensor, tokens: Tokens) -> Tensor:
        keys, values = tokens.keys_values(attention, len(x))  # type: ignore[arg-type]
        return x + (keys * values).sum()

    def record(work: Callable[[], Tensor]) -> Recorded:
        recorded.append(work)
        return rerun(work)

    graphs, shapes = Graphs(record), [torch.ones(n, 1) for n in (1, 4)]
    with graphs.setup():
        for x in shapes:
            graphs.run(forward, (x,), (Tokens(torch.randn(1, 5, 4)),), (attention,))
    assert len(recorded) == 3 and len(graphs.contexts) == 1  # two passes, and the keys and values for both
    for _ in range(2):
        tokens = Tokens(torch.randn(1, 5, 4))
        for x in shapes:
            expected = forward(x, Tokens(tokens.values))
            assert torch.equal(graphs.run(forward, (x,), (tokens,), (attention,)), expected)
        assert not tokens.cached  # computed in the graphs' own memory


def test_graphs_are_freed_when_memory_runs_out_and_recorded_again() -> None:
    graphs, x = Graphs(rerun), torch.ones(2)
    assert not graphs.spare()
    with graphs.setup():
        graphs.run(add, (x,))
    assert graphs.spare() and not graphs.recordings and "needed for an image" in graphs.state
    assert torch.equal(graphs.run(add, (x,)), x + 1)
    with graphs.setup():
        graphs.run(add, (x,))
    assert graphs.state == "on" and len(graphs.recordings) == 1


def test_the_second_replay_is_compared_too() -> None:
    """A graph can be right once, while what it reads still lies there."""
    replays: list[int] = []

    def once(work: Callable[[], Tensor]) -> Recorded:
        result = work()

        def replay() -> None:
            replays.append(1)
            if len(replays) == 1:
                result.copy_(work())

        return replay, result

    graphs = Graphs(once)
    with graphs.setup():
        graphs.run(add, (torch.ones(2, 3),))
    assert graphs.state == "off (a replayed pass of 2x3 differs from the eager one)"


def test_the_reason_is_short() -> None:
    def fails(work: Callable[[], Tensor]) -> Recorded:
        raise RuntimeError("why " * 100)

    graphs = Graphs(fails)
    with graphs.setup():
        graphs.run(add, (torch.ones(2),))
    assert graphs.reason == ("why " * 100)[:200]


@pytest.mark.parametrize("seed", [1, 2])
def test_other_inputs_are_tried_than_those_of_the_recording(seed: int) -> None:
    times = torch.tensor([999, 30])
    assert varied(times, seed).tolist() == [999 // (seed + 1), 30 // (seed + 1)]
    x = torch.zeros(2, 3, dtype=torch.float16)
    assert varied(x, seed).dtype == x.dtype and varied(x, seed).abs().min() > 0
    assert not torch.equal(varied(x, seed), varied(x, seed + 1))


def test_bits_are_compared_with_dtype_and_shape() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, nan[:1]) and not same_bits(nan, nan.double())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_bytes_of_the_pool_that_look_free(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder: Any = object.__new__(CudaRecorder)
    recorder.pool = (0, 7)
    segments = [
        {"segment_pool_id": pool, "total_size": 100, "allocated_size": used}
        for pool, used in (((0, 7), 30), ((0, 7), 100), ((0, 0), 10))
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert recorder.held() == 70
