"""The fused kernels, interpreted on a CPU, against double precision."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch, torch.nn.functional as F
from seesr.networks import fused

torch.manual_seed(0)
def far(found, exact):
    assert torch.isfinite(found).all()
    return ((found.double() - exact).norm() / exact.norm()).item()

# Channels and pixels that fill no block, a mean far from 0, a batch, one pixel; more blocks than one chunk.
fused.CHUNK = 2
for shape, groups in (((2, 40, 13, 11), 8), ((1, 320, 5, 4), 32), ((1, 8, 1, 1), 2)):
    x = (torch.randn(shape) + 30).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1])
    exact = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    assert far(fused.group_norm(x, groups, weight, bias, 1e-5, False), exact) < 1e-5
    found = fused.group_norm(x, groups, weight, bias, 1e-5, True)
    assert far(found, F.silu(exact)) < 1e-5 and found.is_contiguous(memory_format=torch.channels_last)
    half = fused.group_norm(x.half(), groups, weight.half(), bias.half(), 1e-5, True)
    exact = F.group_norm(x.half().double(), groups, weight.half().double(), bias.half().double(), 1e-5)
    assert half.dtype == torch.float16 and far(half, F.silu(exact)) < 2e-3
x, (scale, shift) = torch.randn(1, 40, 9, 8).contiguous(memory_format=torch.channels_last), torch.randn(2, 40)
exact = F.silu(x.double() * scale.double()[:, None, None] + shift.double()[:, None, None])
assert far(fused.scaled(x, scale, shift, True), exact) < 1e-6
x = torch.randn(3, 7, 2 * 80)
values, gate = x.double().chunk(2, -1)
assert far(fused.geglu(x), values * F.gelu(gate)) < 1e-6
x, weight, bias = torch.randn(5, 7, 320) + 10, *torch.randn(2, 320)
exact = F.layer_norm(x.double(), (320,), weight.double(), bias.double(), 1e-5)
assert far(fused.layer_norm(x, weight, bias, 1e-5), exact) < 1e-5
print("right")
"""
NETWORKS = """
import torch
from torch import nn
from seesr.networks import fused
from seesr.networks.blocks import ResnetBlock
from seesr.networks.transformer import Transformer

torch.manual_seed(0)
with torch.no_grad():
    x = torch.randn(2, 16, 6, 5).contiguous(memory_format=torch.channels_last)
    network = nn.ModuleList([ResnetBlock(16, 24, 8, 1e-5, 12), Transformer(24, 2, 8, 16)])
    network.to(memory_format=torch.channels_last)
    for value in network.parameters():
        value.normal_(std=0.3)
    time, words = torch.randn(2, 12), torch.randn(2, 7, 16)
    run = lambda: network[1](network[0](x, time), words)
    plain = run()
    fused.fuse(network, frozenset(fused.CLASSES))
    classes = {c for kind in fused.CLASSES.values() for c in kind.values()}
    assert {type(module) for module in network.modules()} >= classes
    torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-4)
    assert run().is_contiguous(memory_format=torch.channels_last)
print("right")
"""


def interpreted(program: str) -> str:
    """What a program prints in a process of its own: Triton reads its setting when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "program", [PROGRAM, pytest.param(NETWORKS, marks=pytest.mark.slow)], ids=["kernels", "networks"]
)
def test_fused_kernels_compute_what_torch_does(program: str) -> None:
    assert "right" in interpreted(program)
