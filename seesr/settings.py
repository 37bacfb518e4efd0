"""What a caller can ask for: one frozen dataclass, from which the Cog schema and the command line are checked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LARGEST_OUTPUT = 8192 * 8192  # pixels
LARGEST_INPUT = 8192 * 8192  # pixels


def _field(default: Any, description: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"description": description, **limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one picture. Every field states its effect, range and default.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names field, value and limit.
    """

    scale_factor: float = _field(
        4.0,
        "Enlargement. The output is exactly round(width * scale) x round(height * scale) pixels, at most 67.1 megapixels (8192 x 8192).",
        ge=1,
        le=8,
    )
    user_prompt: str = _field("", "What the picture shows, in a few words. Added to the tags that are found automatically.", max_length=2000)
    positive_prompt: str = _field(
        "clean, high-resolution, 8k", "Quality words that end the prompt.", max_length=2000
    )
    negative_prompt: str = _field(
        "dotted, noise, blur, lowres, smooth", "What to steer away from. Has no effect while cfg_scale is 1.", max_length=2000
    )
    num_inference_steps: int = _field(4, "Denoising steps. 1 is fastest; 2 to 4 is usual for this model.", ge=1, le=8)
    cfg_scale: float = _field(1.0, "Guidance. 1 is off and fastest; above 1 sharpens, costs twice the time and harms SD-Turbo when high.", ge=1, le=2)
    color_fix: str = _field("wavelet", "How colours are matched to the input: wavelet keeps local colour, adain the overall one, none changes nothing.", choices=("wavelet", "adain", "none"))
    output_format: str = _field("png", "File format. png is lossless.", choices=("png", "webp", "jpg"))
    output_quality: int = _field(95, "Quality of webp and jpg files; png ignores it.", ge=1, le=100)
    seed: int | None = _field(None, "Number that fixes the random noise: same seed, same picture. Leave empty for a random one, which is reported.", ge=0, le=4294967295)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata
            if value is None and field.default is None:
                continue
            kind = {"float": float, "int": int, "str": str, "bool": bool, "int | None": int}[str(field.type)]
            object.__setattr__(self, field.name, _typed(field.name, value, kind))
            value = getattr(self, field.name)
            if "choices" in limits and value not in limits["choices"]:
                raise ValueError(f"{field.name} is {value!r}; it must be one of {', '.join(limits['choices'])}")
            if "ge" in limits and not limits["ge"] <= value <= limits["le"]:
                raise ValueError(f"{field.name} is {value}; it must be from {limits['ge']} to {limits['le']}")
            if kind is str and len(value) > limits.get("max_length", math.inf):
                raise ValueError(f"{field.name} has {len(value)} characters; at most {limits['max_length']} are allowed")
            if kind is str and not _is_text(value):
                raise ValueError(f"{field.name} holds a NUL or half of a surrogate pair, which is not text")

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the result for an input of this size, in pixels.

        Raises:
            ValueError: the input or the result is over its limit; the message has the largest scale that fits.
        """
        if width * height > LARGEST_INPUT:
            raise ValueError(f"the image is {width}x{height} = {width * height / 1e6:.1f} MP; the limit is {LARGEST_INPUT / 1e6:.1f} MP")
        size = max(1, round(width * self.scale_factor)), max(1, round(height * self.scale_factor))
        if size[0] * size[1] > LARGEST_OUTPUT:
            largest = math.floor(100 * math.sqrt(LARGEST_OUTPUT / (width * height))) / 100
            raise ValueError(
                f"scale {self.scale_factor:g} of a {width}x{height} image asks for {size[0] * size[1] / 1e6:.1f} MP; "
                f"the limit is {LARGEST_OUTPUT / 1e6:.1f} MP; the largest scale for this image is {largest:g}"
            )
        return size


def _typed(name: str, value: Any, kind: type) -> Any:
    """JSON has one number type: 1.0 is a good int and 4 a good float; anything else must match."""
    if kind is bool:
        good = isinstance(value, bool)
    elif kind is str:
        good = isinstance(value, str)
    else:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = number and math.isfinite(value) and (kind is float or value == int(value))
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be {'an' if kind is int else 'a'} {kind.__name__}")
    return kind(value)


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
