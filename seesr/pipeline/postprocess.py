"""After the decoder: rejects an image without content, applies fidelity and masks, converts floats to integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from seesr.images.color import Rows, Strips, spans
from seesr.images.image_data import Pixels
from seesr.images.mask import Grey, at_size
from seesr.runtime.precision import check_finite

BLOCK = 8  # pixels; noise averages out within one, and what an image shows does not
MIN_SLOPE = 1 / 255  # mean difference of neighbouring blocks below which the input is flat, and nothing can be said
MAX_EXPONENT = 4.0  # the largest exponent of the fidelity under disagreement, and the reciprocal of the least
DEPTHS: dict[np.dtype[Any], torch.dtype] = {np.dtype(np.uint8): torch.uint8, np.dtype(np.uint16): torch.uint16}
FLAT_MARGIN = 4  # input pixels around a variation that are not flat, so that flat blocks of a JPEG keep their detail
FLAT_RAMP = 6  # input pixels over which its detail fades out from there, at 2x and more; more below
MIN_SHARE = 0.25  # of the input's slope that a decoder which works keeps


def check_decoded(content: Rows, style: Rows, size: tuple[int, int]) -> None:
    """Rejects decoder output, before any color correction, that lacks the input's contrast.

    Compares the mean differences of neighbouring blocks of BLOCK x BLOCK pixels. They are near 0 for output that is
    constant, constant in each tile, or without contrast. Of images smaller than two blocks only a constant result is
    rejected.

    Args:
        content: rows of the decoder's output, [1, 3, rows, W] nominally in [0, 1].
        style: the same rows of the upscaled input.
        size: (width, height) of the image.

    Raises:
        RuntimeError: one line with the figures.
    """
    width, height = size
    side, share = (BLOCK, MIN_SHARE) if min(size) >= 2 * BLOCK else (1, 0.0)
    sums, count = [], 0
    for top, bottom, *_ in spans(height):
        if bottom - top < side:
            continue
        both = [F.avg_pool2d(rows(top, bottom)[..., :width].clamp(0, 1), side) for rows in (content, style)]
        sums.append(torch.stack([x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum() for x in both]).double())
        count += 2 * both[0].numel()
    decoded, expected = (torch.stack(sums).sum(0) / count).tolist() if sums else (0.0, 0.0)
    if expected >= MIN_SLOPE and not decoded > share * expected:
        raise RuntimeError(
            f"the decoder produced no image: {decoded / expected:.0%} of the input's contrast, the minimum is "
            f"{share:.0%}. Check the weights with `seesr doctor`"
        )


def to_integers(strips: Strips, size: tuple[int, int], depth: DTypeLike) -> Pixels:
    """Corrected rows [1, 3, rows, W'] in [0, 1] -> [H, W, 3] of `size` = (width, height), over the range of `depth`.

    Raises:
        NotFinite: a value is NaN or infinite.
    """
    width, height = size
    rgb, maximum = torch.empty(0), np.iinfo(depth).max  # type: ignore[type-var]
    sums = []
    for top, rows in strips:
        if top == 0:
            rgb = torch.empty((height, width, 3), dtype=DEPTHS[np.dtype(depth)], device=rows.device)
        pixels = rows[0, :, : max(0, height - top), :width].permute(1, 2, 0)
        sums.append(pixels.sum())  # not finite where one of them is not
        rgb[top : top + len(pixels)] = (pixels.clamp(0, 1) * maximum).round()
    check_finite(torch.stack(sums), "color")
    return rgb.cpu().numpy()


def at_every_pixel(
    fidelity: float, spread: Tensor | None, factor: int, size: tuple[int, int]
) -> float | NDArray[np.float32]:
    """The fidelity itself, or where particles ran one for every pixel, [H, W]: 1 - (1 - fidelity)^e.

    e is their disagreement over its mean, between 1/MAX_EXPONENT and MAX_EXPONENT: detail on which they agree stays.

    Args:
        spread: of the particles, [h, w] latent pixels.
        size: (width, height).
    """
    if spread is None:
        return fidelity
    width, height = size
    whole = F.interpolate(spread[None, None], scale_factor=factor, mode="bilinear")[0, 0, :height, :width].cpu()
    exponent = (whole / whole.mean().clamp(min=1e-12)).clamp(1 / MAX_EXPONENT, MAX_EXPONENT)
    return (1 - (1 - fidelity) ** exponent).numpy()


def blend_bicubic(
    rgb: Pixels, bicubic: Pixels, share: float | NDArray[np.float32], masks: Sequence[Grey], sigma: float
) -> Pixels:
    """Blends the result towards the bicubic upscale by `fidelity`: low frequencies first, then high frequencies.

    A fidelity of 0 leaves the result as it is and 1 gives the bicubic upscale, both exactly, as do 255 and 0 of a mask.

    Args:
        rgb: the result, [H, W, 3].
        bicubic: the bicubic upscale, the same shape.
        share: in [0, 1], for all pixels or each, [H, W].
        masks: what may be added at all, each of any size; they multiply.
        sigma: of the Gaussian that parts coarse from fine, pixels.
    """
    blended, maximum = np.empty_like(rgb), np.iinfo(rgb.dtype).max
    whole = [at_size(mask, (rgb.shape[1], rgb.shape[0])) for mask in masks]
    for top, bottom, first, last in spans(len(rgb), math.ceil(4 * sigma) + 1):
        inner = slice(top - first, bottom - first)
        added = rgb[first:last].astype(np.float32) - bicubic[first:last]
        added_here = added[inner]
        if np.any(share):
            here = np.atleast_2d(share)[top:bottom, :, None] if np.ndim(share) else np.float32(share)
            coarse = cv2.GaussianBlur(added, (0, 0), sigma)[inner]
            fine = added_here - coarse
            added_here = np.clip(1 - 2 * here, 0, 1) * coarse + np.clip(2 - 2 * here, 0, 1) * fine
        for mask in whole:
            added_here = added_here * (mask[top:bottom, :, None] / np.float32(255))
        blended[top:bottom] = (bicubic[top:bottom] + added_here).round().clip(0, maximum)
    return blended


def textured(source: Pixels, scale: float) -> Grey | None:
    """Where the model may add detail: 255 up to FLAT_MARGIN pixels from any variation of the input, 0 in flat areas.

    Flat is what is exactly constant, such as a white background or saturated pixels. In between the values fall evenly
    over FLAT_RAMP pixels of the input (more below 2x), so that no edge shows where the flat area begins.

    Args:
        source: the input, [H, W, 3].
        scale: of the result.

    Returns:
        [H, W] at the input's size; None where nothing is flat.
    """
    half = math.ceil(FLAT_RAMP / 2 * max(1, 2 / scale))
    near, ramp = 2 * (FLAT_MARGIN + half) + 1, 2 * half + 1
    allowed = np.empty(source.shape[:2], np.uint8)
    for top, bottom, first, last in spans(len(source), 1 + FLAT_MARGIN + 2 * half):
        pixels = source[first:last]
        varied = cv2.dilate(pixels, np.ones((3, 3))) != cv2.erode(pixels, np.ones((3, 3)))
        open_ = cv2.dilate(255 * varied.any(2).astype(np.uint8), np.ones((near, near)))
        allowed[top:bottom] = cv2.blur(open_, (ramp, ramp), borderType=cv2.BORDER_REPLICATE)[top - first :][
            : bottom - top
        ]
    return None if allowed.min() == 255 else allowed


def trust(rgb: Pixels, bicubic: Pixels, source: Pixels) -> dict[str, float]:
    """Two measures of the added detail, computed for every image.

    faithful: PSNR of the result, averaged down to the input's size, to the input, dB; at most 100.
    invented: the share of the result's variance that is finer than the input's pixels, less that of the
    bicubic upscale: 0 is nothing added.

    Args:
        rgb: the result, [H, W, 3].
        bicubic: the bicubic upscale, the same size.
        source: the input.
    """
    size, maximum = source.shape[1::-1], float(np.iinfo(rgb.dtype).max)
    small, small_bicubic = (cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) for pixels in (rgb, bicubic))
    error = cv2.norm(small, source, cv2.NORM_L2SQR) / source.size / maximum**2
    whole, held, whole_bicubic, held_bicubic = (
        float(np.square(cv2.meanStdDev(pixels)[1]).sum()) for pixels in (rgb, small, bicubic, small_bicubic)
    )
    finer = (whole - held) - (whole_bicubic - held_bicubic)
    return {
        "faithful": round(float(-10 * np.log10(max(error, 1e-10))), 2),
        "invented": round(finer / whole, 4) if whole > 0 else 0.0,
    }


def to_map(spread: Tensor | None, factor: int, size: tuple[int, int]) -> NDArray[np.uint16] | None:
    """Spread per latent pixel [h, w] -> a map of `size` = (width, height), 65535 for 1 or more; None passes."""
    if spread is None:
        return None
    width, height = size
    whole = F.interpolate(spread[None, None], scale_factor=factor, mode="bilinear")[0, 0]
    return (whole[:height, :width].clamp(max=1) * 65535).round().cpu().numpy().astype(np.uint16)
