"""Row strips: runs a VAE encoder or decoder layer by layer over the whole image with less memory than one pass.

Activations stand as [H, W, C], so that a strip of rows is one piece of memory. Norms see the whole image; norm, SiLU
and convolution run over strips that borrow one row from each neighbour, so nothing is computed twice but these rows. At
most two activations of one resolution are held: a residual block writes its result over its input. Where even these are
too much, the widest, between the last two resolutions of a decoder, is made three times instead of held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seesr.networks.autoencoders import Decoder, Encoder
from seesr.runtime.tiling import Tile
from seesr.vae.global_layers import GlobalAttention, GlobalNorm

STRIP = 2**27  # bytes of one strip; about three exist at once
Rows = Callable[[int, int], Tensor]  # (first row, the one after the last) -> [1, C, rows, W]


def rows_of(x: Tensor) -> Rows:
    """Strips of [H, W, C] as a convolution wants them: [1, C, rows, W], channels last."""
    return lambda top, bottom: x[top:bottom].permute(2, 0, 1)[None]


class Strips:
    """One pass of a network over one image.

    Args:
        callback: called after every layer; stops the work by raising.
        frugal: holds a third less in a decoder, for a quarter more convolutions.
    """

    def __init__(self, network: Encoder | Decoder, callback: Callable[[], object], frugal: bool = False) -> None:
        self.network, self.callback, self.frugal = network, callback, frugal
        self.strip = STRIP // 2 if frugal else STRIP

    def run(self, x: Tensor) -> Tensor:
        """[1, C, H, W] -> what the network gives for it, [1, C', H', W']."""
        network = self.network
        norm: Any = network.conv_norm_out
        x = self.convolve(network.conv_in, x.shape[2], lambda top, bottom: x[:, :, top:bottom])
        if isinstance(network, Decoder):
            x = self.middle(network.mid_block, x)
            blocks: Any = network.up_blocks
            *earlier, last = blocks
            for block in earlier:
                x = self.level(block, x, hold=not (self.frugal and block is earlier[-1]))
            if self.frugal and earlier:
                x = self.upsampled_resnet(earlier[-1].upsamplers[0].conv, last.resnets[0], x)
            x = self.level(last, x, first=1 if self.frugal and earlier else 0)
        else:
            for block in network.down_blocks:
                x = self.level(block, x)
            x = self.middle(network.mid_block, x)
        x = self.convolve(network.conv_out, len(x), self.activated(norm, x))
        return x.permute(2, 0, 1)[None]

    def level(self, block: Any, x: Tensor, first: int = 0, hold: bool = True) -> Tensor:
        """The residual blocks of one resolution from `first` on, then the step to the next, if that is to be held."""
        for layer in block.resnets[first:]:
            x = self.resnet(layer, x)
        for layer in (getattr(block, "upsamplers", None) or []) if hold else []:
            x = self.upsample(layer.conv, x)
        for layer in getattr(block, "downsamplers", None) or []:
            x = self.downsample(layer.conv, x)
        return x

    def middle(self, block: Any, x: Tensor) -> Tensor:
        x = self.resnet(block.resnets[0], x)
        for attention, layer in zip(block.attentions, block.resnets[1:], strict=True):
            size = x.shape[:2]
            whole = GlobalAttention(attention, (size[0], size[1]))
            inner = self.norm(attention.group_norm, x)(rows_of(x)(0, len(x)))
            whole.observe(inner, Tile(0, 0, *size))
            whole.finish()
            x = self.resnet(layer, x.add_(whole(inner)[0].permute(1, 2, 0)))
            self.callback()
        return x

    def resnet(self, layer: Any, x: Tensor) -> Tensor:
        """The result lies where the input lay, if it is not larger: a row of it is written when that row was read."""
        inner = self.convolve(layer.conv1, len(x), self.activated(layer.norm1, x))
        out = x
        if inner.shape[2] != x.shape[2]:
            room = inner.numel() if inner.shape[2] < x.shape[2] else 0
            out = x.view(-1)[:room].view(inner.shape) if room else torch.empty_like(inner)
        read, written = rows_of(x), rows_of(out)

        def add(top: int, bottom: int, values: Tensor) -> None:
            residual = read(top, bottom)
            if layer.conv_shortcut is not None:
                residual = layer.conv_shortcut(residual)
            written(top, bottom).copy_(values.add_(residual))

        self.convolve(layer.conv2, len(x), self.activated(layer.norm2, inner), add)
        return out

    def upsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        return self.convolve(conv, 2 * len(x), doubled(x))

    def upsampled_resnet(self, conv: nn.Conv2d, layer: Any, x: Tensor) -> Tensor:
        """The step to the next resolution and the residual block behind it; what lies between is made strip by strip,
        for the statistics, for the first convolution and for the residual. The result lies where the first one's was.
        """
        height, width = 2 * len(x), 2 * x.shape[1]
        read, whole = convolved(conv, height, doubled(x)), GlobalNorm(layer.norm1)
        for top, bottom in self.spans(height, width * conv.out_channels * x.element_size()):
            whole.observe(read(top, bottom), Tile(top, 0, bottom, width))
        whole.finish()
        self.callback()
        inner = self.convolve(layer.conv1, height, lambda top, bottom: whole(read(top, bottom), activate=True))
        written, last = rows_of(inner), inner.new_empty(1, inner.shape[2], 1, width)

        def add(top: int, bottom: int, values: Tensor) -> None:
            residual = read(top, bottom)
            if layer.conv_shortcut is not None:
                residual = layer.conv_shortcut(residual)
            values = values.add_(residual)
            if top > 0:  # this strip has read the row above, which can be written now
                written(top - 1, top).copy_(last)
            written(top, bottom - 1).copy_(values[:, :, :-1])
            last.copy_(values[:, :, -1:])

        self.convolve(layer.conv2, height, self.activated(layer.norm2, inner), add)
        written(height - 1, height).copy_(last)
        return inner

    def downsample(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """By a stride of two; zeros stand beyond the right and the lower edge."""
        height, width = len(x) // 2, x.shape[1] // 2
        out = x.new_empty(height, width, conv.out_channels)
        for top, bottom in self.spans(height, 4 * width * x.shape[2] * x.element_size()):
            rows = rows_of(x)(2 * top, 2 * bottom + 1)
            padded = F.pad(rows, (0, 1, 0, 2 * (bottom - top) + 1 - rows.shape[2]))
            rows_of(out)(top, bottom).copy_(conv(padded))
        self.callback()
        return out

    def norm(self, norm: nn.GroupNorm, x: Tensor) -> GlobalNorm:
        """The norm with the statistics of the whole of x [H, W, C]."""
        whole = GlobalNorm(norm)
        # A GPU takes the statistics of all at once, from half precision as it lies there.
        for top, bottom in [(0, len(x))] if x.is_cuda else self.spans(len(x), x[0].nbytes):
            whole.observe(rows_of(x)(top, bottom), Tile(top, 0, bottom, x.shape[1]))
        whole.finish()
        return whole

    def activated(self, norm: nn.GroupNorm, x: Tensor) -> Rows:
        """Rows of SiLU(norm(x))."""
        whole, rows = self.norm(norm, x), rows_of(x)
        return lambda top, bottom: whole(rows(top, bottom), activate=True)

    def convolve(
        self, conv: nn.Conv2d, height: int, source: Rows, sink: Callable[[int, int, Tensor], object] | None = None
    ) -> Tensor:
        """A convolution of 3 x 3 by strips -> [H, W, C], or to `sink`, which is called with (top, bottom, values)."""
        out = torch.empty(0)
        row = source(0, 1)
        row_bytes = max(conv.in_channels, conv.out_channels) * row.shape[3] * row.element_size()
        convolved_rows = convolved(conv, height, source)
        for top, bottom in self.spans(height, row_bytes):
            values = convolved_rows(top, bottom)
            if sink is not None:
                sink(top, bottom, values)
            else:
                if out.numel() == 0:
                    out = values.new_empty(height, values.shape[3], conv.out_channels)
                rows_of(out)(top, bottom).copy_(values)
            del values  # before the next strip is made
        self.callback()
        return out

    def spans(self, height: int, row_bytes: int) -> list[tuple[int, int]]:
        """Strips of limited size, as (first row, the one after the last)."""
        rows = max(1, self.strip // row_bytes)
        return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def doubled(x: Tensor) -> Rows:
    """Rows of [H, W, C] at twice the size, each pixel four times."""

    def rows(top: int, bottom: int) -> Tensor:
        first = top // 2
        upsampled = F.interpolate(rows_of(x)(first, -(-bottom // 2)), scale_factor=2.0, mode="nearest")
        return upsampled[:, :, top - 2 * first : bottom - 2 * first]

    return rows


def convolved(conv: nn.Conv2d, height: int, source: Rows) -> Rows:
    """Rows of a convolution of 3 x 3 over `height` rows."""

    def rows(top: int, bottom: int) -> Tensor:
        first, last = max(0, top - 1), min(height, bottom + 1)
        return conv(source(first, last))[:, :, top - first : bottom - first]

    return rows


def layers(network: nn.Module) -> int:
    """Number of calls of `callback` in a pass."""
    convolutions = sum(
        isinstance(module, nn.Conv2d) and not name.endswith("conv_shortcut") for name, module in network.named_modules()
    )
    attentions: Any = network.mid_block
    return convolutions + len(attentions.attentions)


def peak(network: Encoder | Decoder, size: tuple[int, int], frugal: bool = False) -> int:
    """Bytes that a pass holds at most, for `size` = (h, w) latent pixels."""
    decodes = isinstance(network, Decoder)
    blocks: Any = network.up_blocks if decodes else network.down_blocks
    area = size[0] * size[1] * (1 if decodes else 4 ** (len(blocks) - 1))
    peak = 0
    skips = frugal and decodes and len(blocks) > 1
    for block in blocks:
        for layer in block.resnets[1 if skips and block is blocks[-1] else 0 :]:
            before, after = layer.conv1.in_channels, layer.conv1.out_channels
            peak = max(peak, area * (before + after if after <= before else before + 2 * after))
        for layer in getattr(block, "upsamplers", None) or []:
            into = blocks[-1].resnets[0].conv1 if skips and block is blocks[-2] else layer.conv
            peak, area = max(peak, area * (layer.conv.in_channels + 4 * into.out_channels)), 4 * area
        area //= 4 if getattr(block, "downsamplers", None) else 1
    return peak * network.conv_in.weight.element_size() + 6 * (STRIP // 2 if frugal else STRIP)
