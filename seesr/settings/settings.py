"""`Settings` of one image, from which Cog's schema, the command line, the HTTP API and the documentation are made."""

from __future__ import annotations

import bisect
import dataclasses
import math
import secrets
from typing import Any

from seesr.images.color import FIXES
from seesr.images.formats import FORMATS, ZIP
from seesr.images.limits import LARGEST_OUTPUT, LARGEST_SIDE, check_input
from seesr.settings.region import Region, parse_region
from seesr.settings.validation import FieldError, checked
from seesr.settings.view_specs import ALL, VIEWS, View

TRAINED_SIDE = 64  # of a tile, latent pixels; no bundle's own sides are smaller


def _field(default: Any, description: str, kind: type, **limits: Any) -> Any:
    """One setting. `kind` is the type of its values; a default of None allows None too, and `empty` says what it means."""
    return dataclasses.field(default=default, metadata={"description": description, "kind": kind, **limits})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one image. Every field states its effect, range and default.

    Raises:
        ValueError: a value of the wrong type or outside its range; the message names field, value and limit.
    """

    scale_factor: float = _field(
        4.0,
        "Upscaling factor. The output is exactly round(width * scale) x round(height * scale) pixels, at most 67.1 megapixels (8192 x 8192) and 32768 per side.",
        float,
        ge=1,
        le=8,
    )
    target_side: int | None = _field(
        None,
        "Longest side of the output in pixels. Replaces scale_factor; the resulting scale must be between 1 and 8.",
        int,
        ge=1,
        le=LARGEST_SIDE,
    )
    target_megapixels: float | None = _field(
        None,
        "Size of the output in megapixels, rounded to whole pixels. Replaces scale_factor; the resulting scale must be between 1 and 8.",
        float,
        ge=0.0001,
        le=67.108864,
    )
    fidelity: float = _field(
        0.0,
        "Blends the result towards the bicubic upscale: 0 keeps all detail of the model, 1 returns the bicubic upscale. As it rises, broad changes of tone go before fine detail; with use_kds, detail on which the samples disagree goes first. Raise it when invented detail is unwanted.",
        float,
        ge=0,
        le=1,
    )
    user_prompt: str = _field(
        "",
        "What the image shows, in a few words. Added to the tags that are detected automatically.",
        str,
        max_length=2000,
    )
    positive_prompt: str = _field(
        "clean, high-resolution, 8k", "Quality terms appended to the prompt.", str, max_length=2000
    )
    negative_prompt: str = _field(
        "dotted, noise, blur, lowres, smooth",
        "What to avoid. Only used when cfg_scale is above 1.",
        str,
        max_length=2000,
    )
    num_inference_steps: int | None = _field(
        None,
        "Denoising steps; 1 is fastest. Leave empty for the bundle's default: 1 with the bundled pocket weights, 2 with the full weights.",
        int,
        ge=1,
        le=8,
        empty="the bundle's",
    )
    cfg_scale: float = _field(
        1.0,
        "Classifier-free guidance. 1 turns it off. Above 1 it sharpens and doubles the time; high values cause artifacts with SD-Turbo.",
        float,
        ge=1,
        le=2,
    )
    latent_tiled_size: int | None = _field(
        None,
        "Side of the denoiser's tiles in latent pixels (8 image pixels each with the full weights). The networks were trained at 64. Leave empty for the bundle's default: 64 or 72, whichever takes less work for this image.",
        int,
        ge=16,
        le=512,
        empty="the bundle's",
    )
    latent_tiled_overlap: int = _field(
        6,
        "Minimum overlap of neighbouring tiles in latent pixels, below latent_tiled_size. More overlap costs time with no visible benefit.",
        int,
        ge=0,
        le=128,
    )
    use_kds: bool = _field(
        False,
        "Kernel Density Steering: denoises several samples together, steers them towards agreement and returns one. Takes nearly num_particles times as long.",
        bool,
    )
    num_particles: int = _field(
        4, "Number of samples for Kernel Density Steering. 1 is the same as off.", int, ge=1, le=16
    )
    bandwidth: float = _field(
        0.0,
        "Kernel width of Kernel Density Steering in latent units: small keeps detail, large averages. 0 selects it from the samples.",
        float,
        ge=0,
        le=10,
    )
    color_fix: str = _field(
        "wavelet",
        "Color correction against the input: wavelet matches local colors, adain the overall color statistics, none applies no correction.",
        str,
        choices=tuple(FIXES),
    )
    output_view: str = _field(
        "image",
        "What the output file shows: image, the upscaled image; comparison, the bicubic upscale beside it; difference, what the model added, doubled (grey is no change); tiles, the denoiser's tiles; uncertainty, a 16-bit grey PNG of where the samples of use_kds disagreed; confidence, a mask from the samples of use_kds that is white where the error is within a calibrated bound; all, a zip of every other view. uncertainty and confidence need use_kds. For the image that belongs to a view, use the same seed again.",
        str,
        choices=(*VIEWS, ALL),
    )
    region: str | None = _field(
        None,
        "Returns only this rectangle of the output: left,top,width,height in output pixels, such as 0,0,512,512. The pixels are those of the whole output with the same seed; with the bundled pocket weights only the tiles that they need are computed. Not with use_kds, color_fix adain or another output_view. Leave empty for the whole output.",
        str,
        max_length=60,
        empty="the whole output",
    )
    output_format: str = _field("png", "File format of the output. png is lossless.", str, choices=tuple(FORMATS))
    output_quality: int = _field(95, "Compression quality of webp and jpg files. Ignored for png.", int, ge=1, le=100)
    keep_exif: bool = _field(
        True,
        "Keeps the EXIF and XMP data of the input (date, location, camera settings, titles, rights). Off removes all except marks of AI.",
        bool,
    )
    dpi: int | None = _field(
        None,
        "Resolution to write into the file in dots per inch, which sets the size of a print: 3000 pixels at 300 are 10 inches. Leave empty to keep that of the input.",
        int,
        ge=1,
        le=9600,
        empty="the input's",
    )
    seed: int | None = _field(
        None,
        "Seed of the random noise: the same seed and settings give the same image. Leave empty for a random seed, which is reported.",
        int,
        ge=0,
        le=4294967295,
        empty="random, reported",
    )

    def __post_init__(self) -> None:
        problems: list[FieldError] = []
        if self.region == "":  # an empty field of a form
            object.__setattr__(self, "region", None)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.default is not None:
                try:
                    object.__setattr__(self, field.name, checked(field.name, value, field.metadata))
                except FieldError as error:
                    problems.append(error)
        if problems:
            raise FieldError("; ".join(map(str, problems)), problems[0].field)
        side = TRAINED_SIDE if self.latent_tiled_size is None else self.latent_tiled_size
        if self.latent_tiled_overlap >= side:
            raise FieldError(
                f"latent_tiled_overlap is {self.latent_tiled_overlap} with latent_tiled_size {side}: "
                "tiles cannot advance; it must be smaller",
                "latent_tiled_overlap",
            )
        if self.target_side is not None and self.target_megapixels is not None:
            message = "target_side and target_megapixels are both set; set only one of them"
            raise FieldError(message, "target_side")
        view = VIEWS.get(self.output_view, VIEWS["image"])  # of a zip each has the format that can hold it
        if view.deep and not FORMATS[self.output_format].deep:
            raise FieldError(
                f"output_view {self.output_view} is a 16-bit PNG; output_format {self.output_format} cannot hold it",
                "output_format",
            )
        if view.steered and not self.steered:
            raise FieldError(
                f"output_view {self.output_view} needs use_kds and num_particles of at least 2: "
                "one sample cannot disagree",
                "output_view",
            )
        if self.region is not None:
            object.__setattr__(self, "region", str(parse_region(self.region)))
            self._check_region()

    def _check_region(self) -> None:
        """Rejects settings whose result in a region depends on pixels outside of it.

        Raises:
            ValueError: one of them is set.
        """
        for value, reason, remedy in (
            (self.color_fix == "adain" and "color_fix adain", "matches the whole image", "color_fix wavelet or none"),
            (self.steered and "use_kds", "compares samples over the whole image", "use_kds off"),
            (
                self.output_view != "image" and f"output_view {self.output_view}",
                "is drawn of the whole image",
                "output_view image",
            ),
        ):
            if value:
                raise FieldError(f"region cannot be combined with {value}, which {reason}; set {remedy}", "region")

    def replace(self, **changes: Any) -> Settings:
        """These settings with other values for some fields.

        Raises:
            TypeError: there is no such field; the message lists them.
            ValueError: a value that the field cannot have.
        """
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(f"there is no setting {name!r}; the settings are {', '.join(names)}")
        return dataclasses.replace(self, **changes)

    def seeded(self) -> Settings:
        """These settings with a seed: a random one from 0 to 2**32 - 1 where none was set."""
        return self if self.seed is not None else dataclasses.replace(self, seed=secrets.randbelow(2**32))

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings as the record of a file has them: without a dpi that is not set, as files were before it existed."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name != "dpi" or value is not None}

    @property
    def steered(self) -> bool:
        """Whether Kernel Density Steering is on: `use_kds` with at least two particles."""
        return self.use_kds and self.num_particles > 1

    @property
    def views(self) -> dict[str, View]:
        """The views in the output file by name: the one in `output_view`, or for `all` every view of these settings."""
        if self.output_view != ALL:
            return {self.output_view: VIEWS[self.output_view]}
        return {
            name: view for name, view in VIEWS.items() if not view.calibrated and (self.steered or not view.steered)
        }

    @property
    def rectangle(self) -> Region | None:
        """The region of the output that is returned; None: the whole output."""
        return None if self.region is None else parse_region(self.region)

    @property
    def suffix(self) -> str:
        """Suffix of the output file: the format, or zip."""
        return ZIP if self.output_view == ALL else self.output_format

    def output_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) of the whole output for an input of this size, in pixels.

        Raises:
            ValueError: the input, the output or the file that shows it is over its limit; the message has the largest
                scale that fits, if there is one. Or the region reaches outside the output.
        """
        check_input(width, height)
        size, reason = self._upscaled(width, height, self.scale_for(width, height))
        if reason is None:
            if self.rectangle is not None:
                self.rectangle.check_inside(*size)
            return size
        if self.target is not None:
            raise FieldError(f"{self.target} of a {width}x{height} image gives {reason}", self.target.partition(" ")[0])
        hundredths = range(100, math.floor(100 * self.scale_factor) + 1)
        fitting = bisect.bisect_left(
            hundredths, True, key=lambda n: self._upscaled(width, height, n / 100)[1] is not None
        )
        remedy = (
            f"the largest scale for this image is {(99 + fitting) / 100:g}" if fitting else "no scale of 1 or more fits"
        )
        message = f"scale {self.scale_factor:g} of a {width}x{height} image gives {reason}; {remedy}"
        raise FieldError(message, "scale_factor")

    @property
    def label(self) -> str:
        """The size for the name of a file: x4, 4096px or 12MP; with a region x4-region-0-0-512-512."""
        part = "" if self.rectangle is None else "-region-" + "-".join(map(str, self.rectangle))
        if self.target_side is not None:
            return f"{self.target_side}px{part}"
        size = f"x{self.scale_factor:g}" if self.target_megapixels is None else f"{self.target_megapixels:g}MP"
        return size + part

    @property
    def target(self) -> str | None:
        """The target for messages, such as "target_side 4096", or None."""
        if self.target_side is not None:
            return f"target_side {self.target_side}"
        return None if self.target_megapixels is None else f"target_megapixels {self.target_megapixels:g}"

    def scale_for(self, width: int, height: int) -> float:
        """The scale of an input of this size: scale_factor, or the one that reaches the target.

        Raises:
            ValueError: the target needs a scale below 1 or above 8; the message has the scale.
        """
        if self.target is None:
            return self.scale_factor
        if self.target_side is not None:
            scale = self.target_side / max(width, height)
        else:
            scale = math.sqrt((self.target_megapixels or 0) * 1e6 / (width * height))
        if not 1 <= scale <= 8:
            raise FieldError(
                f"{self.target} of a {width}x{height} image needs a scale of {scale:.4g}; it must be from 1 to 8",
                self.target.partition(" ")[0],
            )
        return scale

    def _upscaled(self, width: int, height: int, scale: float) -> tuple[tuple[int, int], str | None]:
        """The result's size at this scale, and the limit that it exceeds, or None."""
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if size[0] * size[1] > LARGEST_OUTPUT:
            return size, f"{size[0] * size[1] / 1e6:.1f} MP; the limit is {LARGEST_OUTPUT / 1e6:.1f} MP"
        longest = FORMATS[self.output_format].longest_side
        widest, columns = max(((name, view.columns) for name, view in self.views.items()), key=lambda pair: pair[1])
        if max(columns * size[0], size[1]) > longest:
            shown = f"{columns * size[0]}x{size[1]} pixels" + (f" in the {widest}" if columns > 1 else "")
            return size, f"{shown}; a {self.output_format} may have {longest} on a side here"
        return size, None
