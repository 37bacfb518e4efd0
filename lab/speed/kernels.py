"""Times alternatives for the autoencoder's large layers, with their distance to float64 or float32.

python -m lab.speed.kernels --json FILE        on a GPU in half precision; --rehearse: small sizes, any device
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lab import report
from lab.speed.timing import least_seconds
from seesr.networks import hardware
from seesr.vae import global_layers

GROUPS = 32


def distance(a: Tensor, b: Tensor) -> float:
    """Relative root of the mean square."""
    a, b = a.double(), b.double()
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


def row(layer: str, method: str, work: Callable[[], Any], exact: Tensor, device: torch.device) -> dict[str, Any]:
    result = work()
    result = result[0] if isinstance(result, tuple) else result
    seconds = least_seconds(work, device, times=3)
    measured = {"layer": layer, "method": method, "ms": 1000 * seconds, "distance": distance(result, exact)}
    print(measured, flush=True)
    return measured


def attention(keys: int, queries: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """`queries` rows of the middle attention, width 512."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, n, 512, device=device, dtype=dtype) for n in (queries, keys, keys))
    few = q[:, :, :64]
    exact = F.scaled_dot_product_attention(few.float(), k.float(), v.float())
    methods = {"fused": F.scaled_dot_product_attention, "products": global_layers.attend_by_products}
    name = f"attention, {queries} x {keys}"
    rows = []
    for method, attend in methods.items():
        result = distance(attend(few, k, v), exact)
        work = functools.partial(attend, q, k, v)
        rows.append(row(name, method, work, work(), device) | {"distance": result})
        rows[-1]["tflops"] = 4 * 512 * keys * queries / rows[-1]["ms"] / 1e9
    return rows


def norm(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """GroupNorm of one image: its statistics, its application, both at once."""
    torch.manual_seed(0)
    x = torch.randn(1, channels, side, side, device=device, dtype=dtype).mul_(2).add_(1)
    x = x.contiguous(memory_format=torch.channels_last)
    plain = x.contiguous()
    exact = plain.float().view(GROUPS, -1).var(1, unbiased=False)
    name, rows = f"{channels} x {side} x {side}", []
    for method in (global_layers.moments_by_norm, global_layers.moments_by_sums):
        work = functools.partial(method, x, GROUPS)
        rows.append(row(f"statistics, {name}", method.__name__, work, exact, device))
    layer = torch.nn.GroupNorm(GROUPS, channels).to(device, dtype)
    expected = layer(plain)
    whole = global_layers.GlobalNorm(layer)
    variance, mean = global_layers.moments_by_norm(x, GROUPS)
    whole.use(mean, variance)
    rows.append(row(f"normalise, {name}", "known statistics", lambda: whole(x), expected, device))
    added = lambda: torch.addcmul(whole.shift, x, whole.scale).to(x.dtype)  # noqa: E731
    rows.append(row(f"normalise, {name}", "addcmul", added, expected, device))
    rows.append(row(f"group norm, {name}", "torch, channels first", lambda: layer(plain), expected, device))
    rows.append(row(f"group norm, {name}", "torch, channels last", lambda: layer(x), expected, device))
    return rows


def convolution(channels: int, side: int, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1).to(device, dtype)
    x, rows = torch.randn(1, channels, side, side, device=device, dtype=dtype), []
    expected = layer(x)
    for method, layout in (("channels first", torch.contiguous_format), ("channels last", torch.channels_last)):
        placed = layer.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        work = functools.partial(placed, x.contiguous(memory_format=layout))
        rows.append(row(f"convolution, {channels} x {side} x {side}", method, work, expected, device))
        rows[-1]["tflops"] = 18 * channels**2 * side**2 / rows[-1]["ms"] / 1e9
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    keys, sides = ((4096,), (64,)) if args.rehearse else ((65_536, 262_144), (512, 2048))
    rows = [one for count in keys for one in attention(count, 1024, device, dtype)]
    for side in sides:
        rows += norm(128, side, device, dtype) + convolution(128, side, device, dtype)
    rows += convolution(256, sides[-1], device, dtype)
    report.write(args.json, rows, device=hardware.name(device), dtype=str(dtype).removeprefix("torch."))


if __name__ == "__main__":
    main()
