"""What one picture on the road gives."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from seesr.images import write
from seesr.images.formats import FORMATS, ZIP
from seesr.images.picture import Picture
from seesr.networks.weights import Bundle
from seesr.pipeline.views import DRAW
from seesr.settings import Settings
from seesr.version import __version__

if TYPE_CHECKING:
    from seesr.runtime.tiling import Tile


def record(settings: Settings, bundle: Bundle, mask: NDArray[np.uint8] | None) -> dict[str, Any]:
    """All that is needed to make the same picture again from the same input, and mask."""
    about = {"version": __version__, "bundle": bundle.name, "bundle_sha256": bundle.digest}
    if mask is not None:
        about["mask_sha256"] = hashlib.sha256(mask.tobytes()).hexdigest()
    return {**about, "settings": dataclasses.asdict(settings)}


@dataclasses.dataclass(frozen=True)
class Result:
    """A result with everything that is known about it.

    Attributes:
        picture: the result with alpha, profile and EXIF of the input, and the settings record.
        uncertainty: where the particles of Kernel Density Steering disagreed, uint16 [H, W]; 65535 is a spread of 1
            or more latent units. Relative and uncalibrated. None without steering.
        settings: what was asked for, with the seed that was used.
        metrics: tags, sizes, steps, tiles, seconds per stage, peak memory of the process, device, bundle.
        source: the input.
        layout: the denoiser's tiles in latent cells, and the pixels of a cell's side.
    """

    picture: Picture
    uncertainty: NDArray[np.uint16] | None
    settings: Settings
    metrics: dict[str, Any]
    source: Picture
    layout: tuple[list[Tile], int]

    @property
    def seed(self) -> int:
        """The seed that was used; drawn if none was given."""
        assert self.settings.seed is not None
        return self.settings.seed

    @property
    def image(self) -> Image.Image:
        """The result as an 8-bit Pillow image, without profile, EXIF and record: `save` and `encode` keep them."""
        return self.picture.pil()

    def view(self, name: str) -> Picture:
        """The picture that `output_view=name` shows.

        Raises:
            ValueError: there is no such view, or no uncertainty map without steering.
        """
        if name not in DRAW:
            raise ValueError(f"there is no view {name!r}; use {', '.join(DRAW)}")
        return DRAW[name](self)

    def encode(self) -> bytes:
        """The bytes of the file that the settings ask for (view, format, quality), with ICC, EXIF, depth and record.

        Of `output_view=all` a zip; in it is a file for each view, named after it, PNG where another format is too
        shallow.
        """
        settings, files = self.settings, {}
        for name, view in settings.views.items():
            file_format = "png" if view.deep else settings.output_format
            files[f"{name}.{file_format}"] = write.encode(self.view(name), file_format, settings.output_quality)
        return write.pack(files) if settings.suffix == ZIP else next(iter(files.values()))

    def save(self, path: str | Path) -> None:
        """Writes the view that the settings ask for, in the format of the path's suffix, with all that `encode` keeps.

        Raises:
            ValueError: the suffix is none of a known format, or `output_view=all` and it is not zip.
            RuntimeError: the disk is full or read-only.
        """
        path = Path(path)
        name = path.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
        allowed = (ZIP,) if self.settings.suffix == ZIP else tuple(FORMATS)
        if name not in allowed:
            raise ValueError(f"the suffix {path.suffix!r} is of no format that can be written: {', '.join(allowed)}")
        settings = self.settings if name == ZIP else dataclasses.replace(self.settings, output_format=name)
        record = {**(self.picture.record or {}), "settings": dataclasses.asdict(settings)}
        picture = dataclasses.replace(self.picture, record=record)
        write.save(dataclasses.replace(self, settings=settings, picture=picture).encode(), path)
