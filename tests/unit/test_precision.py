"""The retry in float32 after an overflow in half precision, and the return to half precision."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seesr.runtime.memory import Budget
from seesr.runtime.precision import NotFinite, check_finite, retry_in_float32, working_dtype


class Network(nn.Module):
    """One weight and two buffers, one of which counts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 300.0, dtype=torch.float16))
        self.register_buffer("shift", torch.ones(2, dtype=torch.float16))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self) -> torch.Tensor:
        product = self.weight * self.weight + self.shift
        check_finite(product, "denoise")
        return product


def values(network: nn.Module) -> list[torch.Tensor]:
    return [*network.parameters(), *network.buffers()]


def test_a_gpu_works_in_half_and_a_cpu_in_single_precision() -> None:
    assert working_dtype(torch.device("cuda")) == torch.float16
    assert working_dtype(torch.device("cpu")) == torch.float32


def test_the_precision_can_be_chosen() -> None:
    assert working_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16
    assert {working_dtype(torch.device(device), "float32") for device in ("cpu", "cuda")} == {torch.float32}
    with pytest.raises(ValueError, match="SEESR_PRECISION is bfloat16, which is for CPUs"):
        working_dtype(torch.device("cuda"), "bfloat16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen(bad: float) -> None:
    check_finite(torch.ones(3), "encode")
    with pytest.raises(NotFinite, match=r"not finite in stage encode; check the weights"):
        check_finite(torch.tensor([1.0, bad, 2.0]), "encode")


def test_an_overflow_is_done_again_with_every_network_cast_up(caplog: pytest.LogCaptureFixture) -> None:
    first, second, budget = Network(), Network(), Budget()
    homes = [value.data_ptr() for value in (*values(first), *values(second))]
    assert torch.equal(retry_in_float32(first, budget, first, second), torch.full((2,), 90001.0))
    for network in (first, second):
        assert [value.dtype for value in values(network)] == [torch.float32, torch.float32, torch.int64]
    assert budget.redone == 1 and len(budget.cast) == 4 and "retrying in float32" in caplog.text
    retry_in_float32(first, budget, first, second)  # it stays so for the rest of the image
    assert budget.redone == 1
    budget.restore()
    assert [value.data_ptr() for value in (*values(first), *values(second))] == homes
    assert first.weight.dtype == torch.float16


def test_what_is_finite_is_left_alone() -> None:
    network, budget = Network(), Budget()
    assert retry_in_float32(lambda: 5, budget, network) == 5
    assert network.weight.dtype == torch.float16 and budget.redone == 0


def test_single_precision_that_overflows_too_is_an_error() -> None:
    network, budget = Network(), Budget()
    with torch.no_grad():
        network.float().weight.fill_(1e30)
    calls = []

    def work() -> torch.Tensor:
        calls.append(1)
        return network()

    with pytest.raises(NotFinite):
        retry_in_float32(work, budget, network)
    assert len(calls) == 1 and budget.redone == 0 and budget.cast == []
