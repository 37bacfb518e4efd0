"""What a caller can ask for: one frozen dataclass, from which the Cog schema and the command line are checked."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

LARGEST_OUTPUT = 8192 * 8192  # pixels
LARGEST_INPUT = 8192 * 8192  # pixels
LARGEST_SIDE = 32768  # pixels, of the input and of the output
FORMAT_SIDES = {"webp": 16383}  # pixels, where the format itself ends earlier


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
        "Enlargement. The output is exactly round(width * scale) x round(height * scale) pixels, at most 67.1 megapixels (8192 x 8192) and 32768 on a side.",
        ge=1,
        le=8,
    )
    user_prompt: str = _field(
        "", "What the picture shows, in a few words. Added to the tags that are found automatically.", max_length=2000
    )
    positive_prompt: str = _field("clean, high-resolution, 8k", "Quality words that end the prompt.", max_length=2000)
    negative_prompt: str = _field(
        "dotted, noise, blur, lowres, smooth",
        "What to steer away from. Has no effect while cfg_scale is 1.",
        max_length=2000,
    )
    num_inference_steps: int = _field(4, "Denoising steps. 1 is fastest; 2 to 4 is usual for this model.", ge=1, le=8)
    cfg_scale: float = _field(
        1.0,
        "Guidance. 1 is off and fastest; above 1 sharpens, costs twice the time and harms SD-Turbo when high.",
        ge=1,
        le=2,
    )
    latent_tiled_size: int = _field(
        64,
        "Side of the squares that the denoiser works on, latent cells (8 pixels with the full weights). 64 is what the networks were trained at; larger ones cost more per area.",
        ge=16,
        le=256,
    )
    latent_tiled_overlap: int = _field(
        6,
        "Least overlap of neighbouring squares, latent cells; below latent_tiled_size. More costs time and hides nothing further.",
        ge=0,
        le=128,
    )
    use_kds: bool = _field(
        False,
        "Kernel Density Steering: several samples are denoised together and steered towards agreement; one is returned. Costs nearly num_particles times the denoising.",
    )
    num_particles: int = _field(
        4, "Samples that Kernel Density Steering runs together. 1 is the same as off.", ge=1, le=16
    )
    bandwidth: float = _field(
        0.0,
        "Kernel width of the steering, in latent units: small keeps detail, large pulls to the average. 0 chooses it from the samples.",
        ge=0,
        le=10,
    )
    color_fix: str = _field(
        "wavelet",
        "How colours are matched to the input: wavelet keeps local colour, adain the overall one, none changes nothing.",
        choices=("wavelet", "adain", "none"),
    )
    output_view: str = _field(
        "image",
        "What the output file shows: the enlarged image; comparison, the plain bicubic enlargement beside it; or uncertainty, a 16-bit grey PNG of where the samples of use_kds disagreed (invented detail). The same seed gives the matching image.",
        choices=("image", "comparison", "uncertainty"),
    )
    output_format: str = _field("png", "File format. png is lossless.", choices=("png", "webp", "jpg"))
    output_quality: int = _field(95, "Quality of webp and jpg files; png ignores it.", ge=1, le=100)
    keep_exif: bool = _field(
        True, "Keep the camera's EXIF data (date, place, settings). Off: none of it is in the result."
    )
    seed: int | None = _field(
        None,
        "Number that fixes the random noise: same seed, same picture. Leave empty for a random one, which is reported.",
        ge=0,
        le=4294967295,
    )

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
                raise ValueError(
                    f"{field.name} has {len(value)} characters; at most {limits['max_length']} are allowed"
                )
            if kind is str and not _is_text(value):
                raise ValueError(f"{field.name} holds a NUL or half of a surrogate pair, which is not text")

        if self.latent_tiled_overlap >= self.latent_tiled_size:
            raise ValueError(
                f"latent_tiled_overlap is {self.latent_tiled_overlap} with latent_tiled_size {self.latent_tiled_size}: "
                "tiles cannot advance; it must be smaller"
            )
        if self.output_view == "uncertainty" and self.output_format != "png":
            raise ValueError(
                f"output_view uncertainty is a 16-bit PNG; output_format {self.output_format} cannot hold it"
            )
        if self.output_view == "uncertainty" and not self.steered:
            raise ValueError(
                "output_view uncertainty needs use_kds and num_particles of at least 2: one sample cannot disagree"
            )

    @property
    def steered(self) -> bool:
        """Whether there are particles to steer."""
        return self.use_kds and self.num_particles > 1

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the result for an input of this size, in pixels.

        Raises:
            ValueError: the input or the result is over its limit; the message has the largest scale that fits.
        """
        check_input(width, height)
        size = max(1, round(width * self.scale_factor)), max(1, round(height * self.scale_factor))
        if size[0] * size[1] > LARGEST_OUTPUT:
            largest = math.floor(100 * math.sqrt(LARGEST_OUTPUT / (width * height))) / 100
            raise ValueError(
                f"scale {self.scale_factor:g} of a {width}x{height} image asks for {size[0] * size[1] / 1e6:.1f} MP; "
                f"the limit is {LARGEST_OUTPUT / 1e6:.1f} MP; the largest scale for this image is {largest:g}"
            )
        longest = FORMAT_SIDES.get(self.output_format, LARGEST_SIDE)
        if max(size) > longest:
            raise ValueError(
                f"scale {self.scale_factor:g} of a {width}x{height} image asks for {size[0]}x{size[1]} pixels; a"
                f" {self.output_format} may have {longest} on a side here; the largest scale for this image is"
                f" {math.floor(100 * longest / max(width, height)) / 100:g}"
            )
        return size


def check_input(width: int, height: int) -> None:
    """Refuses an input of more than LARGEST_INPUT pixels, or LARGEST_SIDE on a side.

    Raises:
        ValueError: with the size and the limit.
    """
    if max(width, height) > LARGEST_SIDE:
        raise ValueError(f"the image is {width}x{height}; the limit is {LARGEST_SIDE} pixels on a side")
    if width * height > LARGEST_INPUT:
        raise ValueError(
            f"the image is {width}x{height} = {width * height / 1e6:.1f} MP; the limit is {LARGEST_INPUT / 1e6:.1f} MP"
        )


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
