"""Draws the views of a result: one function for each row of `seesr.settings.view_specs.VIEWS`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from seesr.images.image_data import ImageData, to_uint8
from seesr.runtime.blending import window
from seesr.settings.view_specs import GAIN

if TYPE_CHECKING:
    from seesr.pipeline.result import Output


COLOURS = np.array([[1, 0.3, 0.2], [0.2, 0.7, 1], [0.3, 0.9, 0.3], [1, 0.9, 0.2]], np.float32)


def upscaled(result: Output) -> ImageData:
    """The result itself."""
    return result.image_data


def comparison(result: Output) -> ImageData:
    """The bicubic upscale left, the result right; opaque."""
    image = result.image_data
    return dataclasses.replace(image, rgb=np.concatenate([result.bicubic, image.rgb], axis=1), alpha=None)


def uncertainty(result: Output) -> ImageData:
    """The uncertainty map as a grey image of 16 bits.

    Raises:
        ValueError: there is no map without steering.
    """
    if result.uncertainty is None:
        raise ValueError("the uncertainty view needs steering: set use_kds=True and num_particles to 2 or more")
    return ImageData(
        np.repeat(result.uncertainty[..., None], 3, axis=2),
        record=result.image_data.record,
        one_channel=True,
        source_type=result.image_data.source_type,
    )


def confidence(result: Output) -> ImageData:
    """White where the error is within the calibrated bound, else black: a grey image of 8 bits.

    Raises:
        ValueError: the particles were not compared.
    """
    if result.disagreement is None or result.calibration is None:
        raise ValueError("the confidence view was not computed: set output_view=confidence and use_kds=True")
    mask = 255 * (result.disagreement < result.calibration.threshold).astype(np.uint8)
    return ImageData(
        np.repeat(mask[..., None], 3, axis=2),
        record=result.image_data.record,
        one_channel=True,
        source_type=result.image_data.source_type,
    )


def difference(result: Output) -> ImageData:
    """What the model added to the bicubic upscale, GAIN times as strong, around grey; opaque."""
    image = result.image_data
    maximum = int(np.iinfo(image.rgb.dtype).max)
    added = GAIN * (image.rgb.astype(np.int32) - result.bicubic) + (maximum + 1) // 2
    return dataclasses.replace(image, rgb=added.clip(0, maximum).astype(image.rgb.dtype), alpha=None)


def tiles(result: Output) -> ImageData:
    """The result in grey under the denoiser's tiles, each in one of four colors as strong as it counts; opaque."""
    image, (tiles, factor) = result.image_data, result.layout
    height, width = max(tile.bottom for tile in tiles), max(tile.right for tile in tiles)
    total, colours = (np.zeros((height, width, count), np.float32) for count in (1, 3))
    rows, columns = (sorted({tile[side] for tile in tiles}) for side in (0, 1))
    for tile in tiles:
        weight = window(tile.bottom - tile.top, tile.right - tile.left).numpy()
        place = slice(tile.top, tile.bottom), slice(tile.left, tile.right)
        total[place] += weight[..., None]
        colours[place] += weight[..., None] * COLOURS[2 * (rows.index(tile.top) % 2) + columns.index(tile.left) % 2]
    painted = (255 * colours / total).round().astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    rgb = to_uint8(image.rgb)
    grey = rgb.mean(2, keepdims=True) / 2
    shown = (grey + painted[: rgb.shape[0], : rgb.shape[1]] / 2.0).round().astype(np.uint8)
    return dataclasses.replace(image, rgb=shown, alpha=None, icc=None, one_channel=False)


DRAW: dict[str, Callable[[Output], ImageData]] = {
    "image": upscaled,
    "comparison": comparison,
    "difference": difference,
    "tiles": tiles,
    "uncertainty": uncertainty,
    "confidence": confidence,
}
