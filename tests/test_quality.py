"""The committed pocket model on pictures it has never seen, with floors just below what was measured.

`python scripts/evaluate.py` gives the whole table; a change that harms pictures must not pass quietly.
"""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import skimage.data
from PIL import Image
from skimage.metrics import structural_similarity

from seesr import Settings, Upscaler

FLOORS = {1: 0.63, 2: 0.63, 4: 0.58}  # steps -> mean luma gain over bicubic, dB
EACH = -0.08  # the least gain of any picture, dB
HELD_OUT = ("astronaut", "chelsea", "coffee")


def luma(picture: np.ndarray) -> np.ndarray:
    return (picture @ (np.array([65.481, 128.553, 24.966]) / 255) + 16)[4:-4, 4:-4]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(luma(a) - luma(b)).mean()))


@pytest.mark.parametrize("steps", FLOORS)
def test_held_out_pictures_beat_bicubic(pocket: Upscaler, steps: int) -> None:
    gains, similarity = [], []
    for name in HELD_OUT:
        high = getattr(skimage.data, name)()
        high = high[: high.shape[0] // 4 * 4, : high.shape[1] // 4 * 4]
        low = cv2.resize(high, (high.shape[1] // 4, high.shape[0] // 4), interpolation=cv2.INTER_AREA)
        plain = np.asarray(Image.fromarray(low).resize(high.shape[1::-1], Image.Resampling.BICUBIC))
        ours = np.asarray(pocket(Image.fromarray(low), Settings(seed=1, num_inference_steps=steps)).image)
        gains.append(psnr(ours, high) - psnr(plain, high))
        scores = [structural_similarity(luma(x), luma(high), data_range=255) for x in (ours, plain)]
        similarity.append(scores[0] - scores[1])
    assert np.mean(gains) >= FLOORS[steps], gains
    assert min(gains) >= EACH, gains
    assert np.mean(similarity) > 0, similarity
