"""`Output`: the result of one image with its settings, metrics and views, and how it is written to a file."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seesr.images import write
from seesr.images.formats import FORMATS, ZIP
from seesr.images.image_data import ImageData, Pixels, resize
from seesr.images.source import Array, Layout, to_array
from seesr.networks.weights import Bundle
from seesr.pipeline.confidence import Calibration
from seesr.pipeline.views import DRAW
from seesr.settings import Settings
from seesr.version import __version__

if TYPE_CHECKING:
    from seesr.runtime.tiling import Tile


PREVIEW = 1024  # longest side of the image in a notebook, pixels


class Metrics(TypedDict):
    """Metrics of one image. Views and Kernel Density Steering add keys.

    Attributes:
        seed: the seed that was used.
        tags: what the tagger detected, separated by commas; `tags_left_out` did not fit into the prompt.
        prompt_cut: words at the end of the prompt that did not fit.
        input_size, output_size: WIDTHxHEIGHT, pixels.
        steps, tiles, tiles_skipped, tile_batch: denoising steps; tiles of a step, those of them that were
            not needed, and how many ran at once.
        reused, tiles_reused: stages, separated by commas, and tiles that an earlier run of the image had computed.
        tiles_shared: tiles of all steps that helpers have computed.
        region: the rectangle of the output that was returned; empty: the whole output.
        out_of_memory_retries, float32_retries: parts that were computed again.
        seconds: of every stage.
        quote, actual: expected and measured seconds, bytes and host memory; added by Engine. A
            server adds the wait in its queue.
        peak_memory_mb: peak memory of the process, "host" and "device".
        device, attention, bundle, graphs: where and with what it ran.
        warnings: what was repaired in the input, separated by semicolons.
        tile_size: side of a tile, latent pixels.
        faithful, invented: measures of the added detail of a whole image, see `seesr.pipeline.postprocess.trust`.
        difference_gain: contrast of the view `difference`.
        kds: what Kernel Density Steering did.
        confidence: the calibration and the share of trusted pixels of the view `confidence`.
    """

    seed: int
    tags: str
    tags_left_out: str
    prompt_cut: str
    input_size: str
    output_size: str
    steps: int
    tiles: int
    tiles_skipped: int
    region: str
    tile_batch: int
    reused: str
    tiles_reused: int
    tiles_shared: int
    out_of_memory_retries: int
    float32_retries: int
    seconds: dict[str, float]
    peak_memory_mb: dict[str, int]
    device: str
    attention: str
    bundle: str
    warnings: str
    tile_size: int
    graphs: str
    faithful: NotRequired[float]
    invented: NotRequired[float]
    difference_gain: NotRequired[int]
    kds: NotRequired[dict[str, Any]]
    confidence: NotRequired[dict[str, Any]]
    quote: NotRequired[dict[str, float]]
    actual: NotRequired[dict[str, float]]


def record(
    settings: Settings,
    bundle: Bundle,
    mask: NDArray[np.uint8] | None,
    calibration: Calibration | None = None,
    precision: str = "",
) -> dict[str, Any]:
    """The settings record: all that is needed to make the image again, and the calibration of a view of confidence.

    Args:
        precision: of the networks, if it is not the device's own.
    """
    about: dict[str, Any] = {"version": __version__, "bundle": bundle.name, "bundle_sha256": bundle.digest}
    if precision:
        about["precision"] = precision
    if mask is not None:
        about["mask_sha256"] = hashlib.sha256(mask.tobytes()).hexdigest()
    if calibration is not None:
        about["confidence"] = calibration.short()
    return {**about, "settings": settings.recorded}


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Output:
    """The result of one image with its settings and metrics.

    Attributes:
        image_data: the pixels with alpha, profile and EXIF of the input, and the settings record.
        uncertainty: where the particles of Kernel Density Steering disagreed, uint16 [H, W]; 65535 is a spread of 1
            or more latent units. Relative and uncalibrated. None without steering.
        settings: the settings, with the seed that was used.
        metrics: sizes, tags, steps, tiles, seconds of every stage, peak memory, device, bundle; see Metrics.
        source: the input.
        layout: the denoiser's tiles in latent pixels, and the image pixels of a latent pixel's side.
        array_layout: how the input was laid out if it was a NumPy array.
        sign: takes a file, its media type and the digital source type, and returns the file with a C2PA manifest;
            None: files are not signed.
        disagreement: of the particles' images, [H, W], see `seesr.pipeline.confidence`; None: they were not compared,
            which the view `confidence` does.
        calibration: what a disagreement says of the error.
    """

    image_data: ImageData
    uncertainty: NDArray[np.uint16] | None
    settings: Settings
    metrics: Metrics
    source: ImageData
    layout: tuple[list[Tile], int]
    array_layout: Layout | None = None
    sign: Callable[[bytes, str, str], bytes] | None = None
    disagreement: NDArray[np.float32] | None = None
    calibration: Calibration | None = None

    def __repr__(self) -> str:
        size, seconds = "x".join(map(str, self.image_data.size)), sum(self.metrics.get("seconds", {}).values())
        return f"<Output {size}, {8 * self.image_data.rgb.itemsize} bit, seed {self.seed}, {seconds:.1f} s>"

    def _repr_png_(self) -> bytes:
        """The image for a notebook, at most PREVIEW pixels on a side."""
        image, buffer = self.image, io.BytesIO()
        image.thumbnail((PREVIEW, PREVIEW))
        image.save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def seed(self) -> int:
        """The seed that was used; drawn if the settings have none."""
        assert self.settings.seed is not None
        return self.settings.seed

    @property
    def image(self) -> Image.Image:
        """The upscaled image as an 8-bit Pillow image, without profile, EXIF and record, which `save` keeps."""
        return self.image_data.pil()

    @property
    def array(self) -> Array:
        """The upscaled image as a NumPy array, (H, W, 3) or (H, W, 4), uint8 or uint16 as the input.

        Of an array the result has the same number of dimensions and channels; floats from 0 to 1 give float32.
        """
        return to_array(self.image_data, self.array_layout)

    @functools.cached_property
    def bicubic(self) -> Pixels:
        """The bicubic upscale of the input without its alpha, (H, W, 3), computed for the views that show it."""
        return resize(self.source.visible, self.image_data.size)

    @functools.cached_property
    def data(self) -> bytes:
        """The bytes of the file that the settings ask for (view, format, quality), with all metadata and record.

        Of `output_view=all` a zip; in it is a file for each view, named after it, PNG where another format is too
        shallow.
        """
        settings = self.settings
        files: dict[str, bytes] = {}
        for name, view in settings.views.items():
            file_format = "png" if view.deep else settings.output_format
            data = write.encode(self.view(name), file_format, settings.output_quality)
            if self.sign is not None:
                data = self.sign(data, FORMATS[file_format].media_type, self.image_data.source_type or "")
            files[f"{name}.{file_format}"] = data
        return write.pack(files) if settings.suffix == ZIP else next(iter(files.values()))

    def view(self, name: str) -> ImageData:
        """The image that `output_view=name` shows.

        Raises:
            ValueError: there is no such view, what it needs was not computed, or only a region was made.
        """
        if name not in DRAW:
            raise ValueError(f"there is no view {name!r}; use {', '.join(DRAW)}")
        if self.settings.region is not None and name != "image":
            raise ValueError(
                f"view {name} is drawn of the whole image; run again without region {self.settings.region}"
            )
        return DRAW[name](self)

    def save(self, path: str | os.PathLike[str], *, allow_loss: bool = False) -> None:
        """Writes the view that the settings ask for, in the format of the path's suffix, with all that `data` keeps.

        Args:
            path: ends in .png, .webp, .jpg or .jpeg; .zip with `output_view=all`.
            allow_loss: write a format without transparency or 16 bits although the result has them.

        Raises:
            ValueError: the suffix is not one of these, or the format would lose transparency or depth.
            RuntimeError: the disk is full or read-only.
        """
        path = Path(path)
        name = path.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        allowed = (ZIP,) if self.settings.suffix == ZIP else tuple(FORMATS)
        if name not in allowed:
            raise ValueError(f"{path.name} must end in {', '.join(f'.{suffix}' for suffix in allowed)}")
        if name != ZIP and not allow_loss:
            self.check_loss(name)
        settings = self.settings if name == ZIP else dataclasses.replace(self.settings, output_format=name)
        if settings == self.settings:
            return write.save(self.data, path)
        record = {**(self.image_data.record or {}), "settings": settings.recorded}
        image_data = dataclasses.replace(self.image_data, record=record)
        return write.save(dataclasses.replace(self, settings=settings, image_data=image_data).data, path)

    def check_loss(self, name: str) -> None:
        """Rejects a file format that cannot hold the alpha or the depth of the view.

        Raises:
            ValueError: what would be lost, and what keeps it.
        """
        chosen, image_data = FORMATS[name], self.view(self.settings.output_view)
        for has, keeps, what in (
            (image_data.alpha is not None, chosen.alpha, "transparency"),
            (image_data.rgb.dtype == np.uint16, chosen.deep, "16 bits per colour"),
        ):
            if has and not keeps:
                raise ValueError(f"a {name} file loses the result's {what}: save a .png, or pass allow_loss=True")
