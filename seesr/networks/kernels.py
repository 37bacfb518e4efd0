"""Alternative kernels for attention and matrix products on CPU and GPU.

KERNELS has every attention kernel; a new one is one row there. None of them changes what is computed, only in which
order sums are taken: about 1e-6 of the values in single precision.
"""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from seesr.networks.attention import Kernel

log = logging.getLogger(__name__)

SCORES = 2**20  # attention weights at a time: 4 MB stay in the processor's cache
SMALL = 2**13  # weights of a matrix below which oneDNN's start-up costs more than it gains


def attention_in_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention [B, heads, n, d] on a CPU, some rows at a time, with oneDNN's matrix product."""
    batch, heads, count, width = q.shape
    rows = max(1, SCORES // k.shape[2])
    attended = torch.empty_like(q, memory_format=torch.contiguous_format)
    q = q * width**-0.5
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h].contiguous(), v[b, h].t().contiguous()
            for start in range(0, count, rows):
                part = slice(start, start + rows)
                weights = matrix_product(q[b, h, part].contiguous(), keys, None).softmax(-1)
                attended[b, h, part] = matrix_product(weights, values, None)
    return attended


def matrix_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[..., i], [o, i], [o] -> [..., o] by oneDNN on a CPU, in a dtype that it can multiply there.

    torch's own linear takes MKL, which uses half the vector width on processors that are not Intel's.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDnnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return matrix_product(input, self.weight, self.bias)


class TileLinear(OneDnnLinear):
    """One tile of a batch at a time: the order of sums must not depend on how many there are."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat([matrix_product(x, self.weight, self.bias) for x in input.split(1)])


def restricted(backend: SDPBackend) -> Kernel:
    """Torch's attention, restricted to this backend."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, n, heads, d]
    return memory_efficient_attention(q, k, v).transpose(1, 2)


KERNELS: dict[str, Kernel] = {
    "sdpa": F.scaled_dot_product_attention,  # whatever torch chooses
    "flash": restricted(SDPBackend.FLASH_ATTENTION),
    "efficient": restricted(SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": restricted(SDPBackend.CUDNN_ATTENTION),
    "xformers": xformers,
    "rows": attention_in_rows,
}


def use_one_dnn(network: nn.Module, kind: type[OneDnnLinear]) -> None:
    """Makes every large Linear of a float32 network one of `kind`, with the same parameters."""
    for module in network.modules():
        if type(module) is nn.Linear and module.weight.numel() >= SMALL and module.weight.dtype == torch.float32:
            module.__class__ = kind


@functools.cache
def one_dnn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has a matrix product in this dtype on this processor: asked by trying.

    Half precision needs AVX-512 there, and a good part of today's processors have none.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x = torch.ones(2, 2, dtype=dtype)
    try:
        return torch.equal(matrix_product(x, x, None), 2 * x)
    except RuntimeError as error:
        log.info("oneDNN does not support %s here: %s", dtype, first_line(error))
        return False


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
