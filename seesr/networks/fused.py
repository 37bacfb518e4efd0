# pyright: basic
"""Triton kernels for GPUs: GroupNorm with SiLU over channels-last images, GEGLU and LayerNorm, each in few passes.

Imported only where a kernel is used (see `hardware.FUSED`); needs Triton, which comes with torch's CUDA builds. With
TRITON_INTERPRET=1 in the environment the kernels run on a CPU, for tests. Sums are taken in single precision and in a
fixed order, so a result depends neither on the batch nor on the run.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel takes numbers for its constants.

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from seesr.networks.attention import Tokens
from seesr.networks.blocks import ResnetBlock
from seesr.networks.transformer import GatedLinear, Transformer

ROWS, CHANNELS = 64, 64  # pixels and channels of one program of a GroupNorm
CHUNK = 256  # blocks of rows whose moments are combined at a time
ELEMENTS = 1024  # of one program of a GEGLU
ROW_ELEMENTS = 4096  # of one program of a LayerNorm, about


@triton.jit
def channel_moments(
    x, means, squares, rows, channels, blocks, height: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """[N, rows, channels] -> mean and sum of squared deviations of each channel in blocks of rows, [N, blocks, C]."""
    n, block = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = block * height + tl.arange(0, height)
    channel = tl.program_id(0) * width + tl.arange(0, width)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    values = tl.load(x + (n * rows + row)[:, None] * channels + channel[None, :], inside, 0.0).to(tl.float32)
    mean = tl.sum(values, 0) / tl.minimum(height, rows - block * height)
    centred = tl.where(inside, values - mean[None, :], 0.0)
    place = (n * blocks + block) * channels + channel
    tl.store(means + place, mean, channel < channels)
    tl.store(squares + place, tl.sum(centred * centred, 0), channel < channels)


@triton.jit
def scale_and_shift(
    means, squares, weight, bias, scale, shift, rows, channels, blocks, groups, eps,
    height: tl.constexpr, chunk: tl.constexpr, chunks: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    """Moments of blocks -> what GroupNorm multiplies each channel with and adds to it, [N, C] each."""
    n, group = tl.program_id(1).to(tl.int64), tl.program_id(0)
    each = channels // groups
    inner = tl.arange(0, padded)
    channel = group * each + inner
    total = tl.zeros((chunk, padded), tl.float32)
    for index in range(chunks):
        block = index * chunk + tl.arange(0, chunk)
        inside = (block < blocks)[:, None] & (inner < each)[None, :]
        count = tl.minimum(height, rows - block * height).to(tl.float32)[:, None]
        total += count * tl.load(means + (n * blocks + block)[:, None] * channels + channel[None, :], inside, 0.0)
    size = rows * each * 1.0
    mean = tl.sum(tl.sum(total, 1), 0) / size
    total = tl.zeros((chunk, padded), tl.float32)
    for index in range(chunks):
        block = index * chunk + tl.arange(0, chunk)
        inside = (block < blocks)[:, None] & (inner < each)[None, :]
        count = tl.minimum(height, rows - block * height).to(tl.float32)[:, None]
        place = (n * blocks + block)[:, None] * channels + channel[None, :]
        centred = tl.load(means + place, inside, 0.0) - mean
        total += tl.where(inside, tl.load(squares + place, inside, 0.0) + count * centred * centred, 0.0)
    deviation = tl.sqrt(tl.sum(tl.sum(total, 1), 0) / size + eps)
    factor = tl.load(weight + channel, inner < each, 0.0).to(tl.float32) / deviation
    tl.store(scale + n * channels + channel, factor, inner < each)
    added = tl.load(bias + channel, inner < each, 0.0).to(tl.float32) - mean * factor
    tl.store(shift + n * channels + channel, added, inner < each)


@triton.jit
def normalise(
    x, scale, shift, out, rows, channels, activate: tl.constexpr, height: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """[N, rows, channels] * scale + shift, through SiLU if `activate`."""
    n = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * height + tl.arange(0, height)
    channel = tl.program_id(0) * width + tl.arange(0, width)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    place = (n * rows + row)[:, None] * channels + channel[None, :]
    factor = tl.load(scale + n * channels + channel, channel < channels, 0.0)
    added = tl.load(shift + n * channels + channel, channel < channels, 0.0)
    values = tl.load(x + place, inside, 0.0).to(tl.float32) * factor[None, :] + added[None, :]
    if activate:
        values = values / (1.0 + tl.exp(-values))
    tl.store(out + place, values.to(out.dtype.element_ty), inside)


@triton.jit
def gated(x, out, count, width, block: tl.constexpr):
    """[count / width, 2 * width] = (values, gate) -> values * GELU(gate)."""
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    first = place // width * 2 * width + place % width
    values = tl.load(x + first, place < count, 0.0).to(tl.float32)
    gate = tl.load(x + first + width, place < count, 0.0).to(tl.float32)
    values = values * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(out + place, values.to(out.dtype.element_ty), place < count)


@triton.jit
def normalise_rows(
    x, weight, bias, out, count, width, eps, height: tl.constexpr, padded: tl.constexpr
):  # fmt: skip
    """LayerNorm of [count, width]."""
    row = tl.program_id(0).to(tl.int64) * height + tl.arange(0, height)
    column = tl.arange(0, padded)
    inside = (row < count)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    values = tl.load(x + place, inside, 0.0).to(tl.float32)
    mean = tl.sum(values, 1) / width
    centred = tl.where(inside, values - mean[:, None], 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 1) / width + eps)
    factor = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    added = tl.load(bias + column, column < width, 0.0).to(tl.float32)
    values = centred / deviation[:, None] * factor[None, :] + added[None, :]
    tl.store(out + place, values.to(out.dtype.element_ty), inside)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, activate: bool) -> Tensor:
    """GroupNorm, and SiLU if `activate`, of [N, C, H, W] that lies channels-last; so does the result."""
    count, channels, height, width = x.shape
    rows = height * width
    blocks = triton.cdiv(rows, ROWS)
    wide = triton.cdiv(channels, CHANNELS)
    means, squares = x.new_empty((2, count, blocks, channels), dtype=torch.float32)
    scale, shift = x.new_empty((2, count, channels), dtype=torch.float32)
    out = torch.empty_like(x)
    channel_moments[wide, blocks, count](x, means, squares, rows, channels, blocks, ROWS, CHANNELS)
    padded = triton.next_power_of_2(channels // groups)
    chunk = min(CHUNK, triton.next_power_of_2(blocks), max(1, 8192 // padded))
    scale_and_shift[groups, count](
        means, squares, weight, bias, scale, shift, rows, channels, blocks, groups, eps,
        ROWS, chunk, triton.cdiv(blocks, chunk), padded,
    )  # fmt: skip
    normalise[wide, blocks, count](x, scale, shift, out, rows, channels, activate, ROWS, CHANNELS)
    return out


def scaled(x: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
    """x * scale + shift per channel, and SiLU if `activate`; [1, C, H, W] is channels-last, and so is the result.

    Args:
        scale, shift: [C], float32.
    """
    _, channels, height, width = x.shape
    out = torch.empty_like(x)
    grid = triton.cdiv(channels, CHANNELS), triton.cdiv(height * width, ROWS), 1
    normalise[grid](x, scale, shift, out, height * width, channels, activate, ROWS, CHANNELS)
    return out


def geglu(x: Tensor) -> Tensor:
    """Contiguous [..., 2 * width] = (values, gate) -> values * GELU(gate), [..., width]."""
    width = x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    gated[triton.cdiv(out.numel(), ELEMENTS),](x, out, out.numel(), width, ELEMENTS)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension of a contiguous tensor."""
    width = x.shape[-1]
    count, padded = x.numel() // width, triton.next_power_of_2(width)
    height = max(1, ROW_ELEMENTS // padded)
    out = torch.empty_like(x)
    normalise_rows[triton.cdiv(count, height),](x, weight, bias, out, count, width, eps, height, padded)
    return out


def normalised(norm: nn.GroupNorm, x: Tensor, activate: bool) -> Tensor:
    """A GroupNorm, and SiLU if `activate`: fused for channels-last images, torch's for others."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, activate)
    result = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(result) if activate else result


class FusedGroupNorm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return normalised(self, input, False)


class FusedResnetBlock(ResnetBlock):
    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        inner = self.conv1(normalised(self.norm1, x, True))
        if self.time_emb_proj is not None and time is not None:
            inner = inner + self.time_emb_proj(F.silu(time))[:, :, None, None]
        inner = self.conv2(normalised(self.norm2, inner, True))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + inner


class ChannelsLastTransformer(Transformer):
    """Leaves its result channels-last, where the other one copies it to channels first."""

    def forward(self, x: Tensor, context: Tokens | Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows = self.proj_in(normalised(self.norm, x, False).permute(0, 2, 3, 1).reshape(batch, -1, channels))
        rows = self.proj_out(self.transformer_blocks[0](rows, context))
        return rows.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + x


class FusedGatedLinear(GatedLinear):
    def forward(self, x: Tensor) -> Tensor:
        return geglu(self.proj(x))


class FusedLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return layer_norm(input.contiguous(), self.weight, self.bias, self.eps)


CLASSES: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "group_norm": {ResnetBlock: FusedResnetBlock, Transformer: ChannelsLastTransformer},
    "geglu": {GatedLinear: FusedGatedLinear},
    "layer_norm": {nn.LayerNorm: FusedLayerNorm},
}


def fuse(network: nn.Module, kinds: frozenset[str]) -> None:
    """Has a channels-last UNet or ControlNet computed by these kernels, in place; parameters stay where they are.

    Args:
        kinds: keys of CLASSES.
    """
    classes = {old: new for kind in kinds for old, new in CLASSES[kind].items()}
    for name, module in network.named_modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
        elif "group_norm" in kinds and name == "conv_norm_out":
            module.__class__ = FusedGroupNorm
