"""Image metrics: against the truth, against the input, and at tile borders.

PSNR and SSIM cut a border of SCALE pixels; "y" is BT.601 luma from 16 to 235. delta_e is against the truth, shift
against the input after averaging the result down to it. NIQE needs the `eval` extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import skimage.data
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import structural_similarity

from lab.quality import degradations
from lab.quality.degradations import SCALE, Rgb
from seesr.runtime import tiling

BUILT_IN = ("astronaut", "chelsea", "coffee")  # held out of the pocket model's training


def luma(image: Rgb) -> NDArray[np.float64]:
    return image @ (np.array([65.481, 128.553, 24.966]) / 255) + 16


def psnr(a: Any, b: Any, span: float = 255) -> float:
    """Of arrays or tensors whose values have a range of `span`, dB; equal ones have infinitely much."""
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float(10 * np.log10(span**2 / error)) if error else float("inf")


def seam(image: Rgb, tile: int, overlap: int, factor: int) -> float:
    """Mean gradient across tile borders over that of the lines four pixels beside them; 1 if there is one tile."""
    grey = luma(image)
    across, beside = [], []
    for axis in (0, 1):
        gradient = np.abs(np.diff(grey, axis=axis)).mean(1 - axis)
        latent_side = -(-grey.shape[axis] // factor)
        starts = tiling.offsets(latent_side, tile, overlap)
        borders = {factor * edge - 1 for start in starts for edge in (start, start + tile)}
        for line in borders & set(range(4, len(gradient) - 4)):
            across.append(gradient[line])
            beside.append((gradient[line - 4] + gradient[line + 4]) / 2)
    return float(np.mean(across) / np.mean(beside)) if across else 1.0


def colour_shift(restored: Rgb, low: Rgb) -> float:
    """Mean Delta E 2000 between the input and the result averaged down to it: what was done to its colours."""
    return delta_e(degradations.clean(restored, 0), low)


def delta_e(a: Rgb, b: Rgb) -> float:
    return float(deltaE_ciede2000(rgb2lab(a), rgb2lab(b)).mean())


def niqe(restored: Rgb) -> float:
    from basicsr.metrics.niqe import calculate_niqe

    return float(calculate_niqe(restored[..., ::-1].astype(np.float32), SCALE))


def measure(restored: Rgb, truth: Rgb) -> dict[str, float]:
    inner = (slice(SCALE, -SCALE), slice(SCALE, -SCALE))
    a, b = restored[inner], truth[inner]
    return {
        "psnr_y": psnr(luma(a), luma(b)),
        "psnr_rgb": psnr(a, b),
        "ssim_y": float(structural_similarity(luma(a), luma(b), data_range=255)),
        "ssim_rgb": float(structural_similarity(a, b, data_range=255, channel_axis=2)),
        "niqe": niqe(restored),
        "delta_e": delta_e(a, b),
    }


def built_in() -> Iterator[tuple[str, Rgb]]:
    """Names and images of the built-in set."""
    for name in BUILT_IN:
        yield name, cut(getattr(skimage.data, name)())


def cut(high: Rgb) -> Rgb:
    """To a multiple of the scale."""
    return high[: high.shape[0] // SCALE * SCALE, : high.shape[1] // SCALE * SCALE]


def interval(values: list[float]) -> tuple[float, float]:
    """The central 95 % of the mean over 2,000 resamplings."""
    rng = np.random.default_rng(0)
    means = np.array(values)[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)
