"""Degradations from a high-resolution image to one a quarter its size, for training and evaluation (`eval` extra)."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]  # [H, W, 3]
SCALE = 4


def clean(image: Rgb, seed: int) -> Rgb:
    size = image.shape[1] // SCALE, image.shape[0] // SCALE
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


@torch.no_grad()
def realesrgan(image: Rgb, seed: int, noiseless: bool = False, strength: float = 1) -> Rgb:
    """The second-order recipe of Real-ESRGAN (Wang et al. 2021) with its published settings, by basicsr's functions.

    `noiseless` leaves noise and JPEG out of the same draw: what a perfect removal of both would find. `strength` from 0
    to 1 brings blur, noise, JPEG and resizing nearer to none.
    """
    from basicsr.data import degradations as d
    from basicsr.utils import DiffJPEG
    from basicsr.utils.img_process_util import filter2D

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    kinds = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
    odds = [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
    modes = ("area", "bilinear", "bicubic")
    jpeg = DiffJPEG(differentiable=False)
    height, width = image.shape[0] // SCALE, image.shape[1] // SCALE
    x = torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]

    def graded(none: float, published: float) -> float:
        return published - (1 - strength) * (published - none)

    def sinc(size: int, low: float) -> NDArray[Any]:
        return d.circular_lowpass_kernel(np.random.uniform(low, np.pi), size, pad_to=21)

    def blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
        size = random.choice(range(7, 22, 2))
        if np.random.uniform() < 0.1:
            kernel = sinc(size, np.pi / 3 if size < 13 else np.pi / 5)
        else:
            ranges = {"betag_range": [0.5, 4], "betap_range": [1, 2]}
            kernel = d.random_mixed_kernels(kinds, odds, size, [0.2, sigma], [0.2, sigma], [-np.pi, np.pi], **ranges)
            kernel = np.pad(kernel, (21 - size) // 2)
        return filter2D(x, torch.from_numpy(kernel.astype(np.float32))[None])

    def resize(x: torch.Tensor, base: tuple[int, int], weights: list[float], low: float, high: float) -> torch.Tensor:
        kind = random.choices(("up", "down", "keep"), weights)[0]
        ratio = {"up": np.random.uniform(1, high), "down": np.random.uniform(low, 1), "keep": 1}[kind]
        size = tuple(int(side * ratio) for side in base)
        return torch.nn.functional.interpolate(x, size=size, mode=random.choice(modes))

    def noise(x: torch.Tensor, sigma: float, poisson: float) -> torch.Tensor:
        options = {"gray_prob": 0.4, "clip": True, "rounds": False}
        if np.random.uniform() < 0.5:
            noisy = d.random_add_gaussian_noise_pt(x, sigma_range=[1, sigma], **options)
        else:
            noisy = d.random_add_poisson_noise_pt(x, scale_range=[0.05, poisson], **options)
        return x if noiseless else noisy

    def compress(x: torch.Tensor) -> torch.Tensor:
        quality = x.new_empty(1).uniform_(graded(90, 30), 95)
        return x if noiseless else jpeg(x.clamp(0, 1), quality=quality)

    x = resize(blur(x, graded(0.4, 3.0)), image.shape[:2], [0.2, 0.7, 0.1], graded(0.7, 0.15), graded(1, 1.5))
    x = compress(noise(x, graded(2, 30), graded(0.1, 3.0)))
    if np.random.uniform() < 0.8:
        x = blur(x, graded(0.4, 1.5))
    x = resize(x, (height, width), [0.3, 0.4, 0.3], graded(0.8, 0.3), graded(1, 1.2))
    x = noise(x, graded(2, 25), graded(0.1, 2.5))
    last = sinc(random.choice(range(7, 22, 2)), np.pi / 3) if np.random.uniform() < 0.8 else None

    def sharpen(x: torch.Tensor) -> torch.Tensor:
        return x if last is None else filter2D(x, torch.from_numpy(last.astype(np.float32))[None])

    def shrink(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(x, size=(height, width), mode=random.choice(modes))

    x = compress(sharpen(shrink(x))) if np.random.uniform() < 0.5 else sharpen(shrink(compress(x)))
    return (x[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255).round().astype(np.uint8)


def mild(image: Rgb, seed: int, noiseless: bool = False) -> Rgb:
    """What images from phones and the web have: a soft lens, a little noise, JPEG of quality 60 to 90.

    Args:
        noiseless: the lens alone, as the same seed draws it.
    """
    rng = np.random.default_rng(seed)
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.5))
    small = clean(soft, seed).astype(np.float32)
    if noiseless:
        return small.astype(np.uint8)
    noise = rng.normal(0, 1, small.shape if rng.random() < 0.6 else (*small.shape[:2], 1)) * rng.uniform(0, 4)
    small = (small + noise).clip(0, 255).round().astype(np.uint8)
    _, file = cv2.imencode(".jpg", small[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(60, 91))])
    return np.ascontiguousarray(cv2.imdecode(file, cv2.IMREAD_COLOR)[..., ::-1])


BY_NAME: dict[str, Callable[[Rgb, int], Rgb]] = {
    "clean": clean,
    "mild": mild,
    "mild-noiseless": functools.partial(mild, noiseless=True),
    "realesrgan": realesrgan,
    "realesrgan-noiseless": functools.partial(realesrgan, noiseless=True),
}
