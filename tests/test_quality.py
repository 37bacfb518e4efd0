"""The committed pocket model on pictures it has never seen, with floors just below what was measured.

`python scripts/evaluate.py` gives the whole table; a change that harms pictures must not pass quietly.
"""

from __future__ import annotations

import ablate
import degradations
import evaluate
import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from seesr import Settings, Upscaler

FLOORS = {1: 1.12, 2: 1.12, 4: 1.1}  # steps -> mean luma gain over bicubic, dB
EACH = 0.46  # the least gain of any picture, dB
LOSSES = {"no ControlNet": 0.2, "image tokens zeroed": 0.01, "negative prompt as prompt": 1.0}  # mean loss, dB


def luma(picture: evaluate.Picture) -> np.ndarray:
    """Without the border that the measures leave out."""
    return evaluate.luma(picture)[4:-4, 4:-4]


@pytest.mark.parametrize("steps", FLOORS)
def test_held_out_pictures_beat_bicubic_and_keep_their_colours(pocket: Upscaler, steps: int) -> None:
    gains, similarity, shifts = [], [], []
    for _, high in evaluate.built_in():
        low = degradations.clean(high, 0)
        plain = np.asarray(Image.fromarray(low).resize(high.shape[1::-1], Image.Resampling.BICUBIC))
        ours = np.asarray(pocket(Image.fromarray(low), Settings(seed=1, num_inference_steps=steps)).image)
        ours_y, plain_y, high_y = map(luma, (ours, plain, high))
        gains.append(evaluate.psnr(ours_y, high_y) - evaluate.psnr(plain_y, high_y))
        scores = [structural_similarity(x, high_y, data_range=255) for x in (ours_y, plain_y)]
        similarity.append(scores[0] - scores[1])
        shifts.append(evaluate.colour_shift(ours, low))
    assert np.mean(gains) >= FLOORS[steps], gains
    assert min(gains) >= EACH, gains
    assert min(similarity) > 0, similarity
    assert max(shifts) < 1, shifts


def test_an_input_taken_away_costs_what_it_is_worth(pocket: Upscaler) -> None:
    losses: dict[str, list[float]] = {variant: [] for variant in LOSSES}
    for _, high in evaluate.built_in():
        low = degradations.clean(high, 0)
        found = {
            variant: evaluate.psnr(luma(ablate.restore(pocket, low, 1, variant)), luma(high))
            for variant in ("all", *LOSSES)
        }
        for variant, lost in losses.items():
            lost.append(found["all"] - found[variant])
    for variant, least in LOSSES.items():
        assert np.mean(losses[variant]) >= least, (variant, losses[variant])
