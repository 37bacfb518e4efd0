"""Quotes: time, size and price of an image, from the size in its header, counted work and measured rates."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from PIL import Image

from seesr.config import Configuration
from seesr.engine.rates import Quote, Rates, latest_rates
from seesr.images.image_data import ImageData
from seesr.images.limits import megapixels
from seesr.images.read import open_header
from seesr.images.source import LoadedImage, Source, read_bytes
from seesr.pipeline.work import Outline, plan, shown_megapixels, terms
from seesr.settings import Settings


def make_quote(
    outline: Outline,
    rates: Rates,
    settings: Settings,
    size: tuple[int, int],
    price_per_hour: float | None,
    reused: Collection[str] = (),
) -> Quote:
    """The quote for an image of `size` = (width, height). A mask is counted as white.

    Args:
        reused: stages whose results are there already.

    Raises:
        ValueError: the output would be too large; one line.
    """
    planned = plan(outline, settings, size)
    work = terms(outline, settings, size, planned)
    seconds = rates.seconds({stage: term for stage, term in work.items() if stage not in reused})
    return Quote(
        output_size="x".join(map(str, planned.output)),
        tiles=0 if "denoise" in reused else planned.tiles,
        seconds=None if seconds is None else round(seconds, 3),
        seconds_at_most=None if seconds is None else round(seconds * rates.margin, 3),
        bytes=rates.length(settings.suffix, shown_megapixels(settings, planned.output)),
        peak_memory_mb=rates.peak(megapixels(*planned.output)),
        price=None if seconds is None or price_per_hour is None else round(seconds / 3600 * price_per_hour, 6),
        images=rates.images,
    )


def size_of(source: Source | LoadedImage) -> tuple[int, int]:
    """(width, height) of an image, from the header of its file.

    Raises:
        TypeError, ValueError, OSError: as `seesr.images.source.load_source`.
    """
    if isinstance(source, LoadedImage):
        source = source.image_data
    if isinstance(source, (ImageData, Image.Image)):
        return source.size
    if isinstance(source, np.ndarray):
        height, width, *_ = source.shape
        return width, height
    return open_header(read_bytes(source)).size


def quote_unloaded(digest: str, device: str | None, settings: Settings, size: tuple[int, int]) -> Quote | None:
    """The quote for an image on this machine, without torch and the weights.

    Args:
        digest: of the bundle.
        device: "cpu" or "cuda"; None: the one that was used last.

    Returns:
        None: the user has upscaled no image with this bundle on such a device.

    Raises:
        ValueError: the output would be too large.
    """
    configuration = Configuration.read()
    rates = latest_rates(digest, device or configuration.device)
    if rates is None or rates.outline is None:
        return None
    return make_quote(rates.outline, rates, settings, size, configuration.price_per_hour)
