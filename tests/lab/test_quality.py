"""Quality of the bundled pocket model on held-out images, with bounds just below the measured values.

`python -m lab.quality.evaluate` gives the whole table; a change that harms images must not pass quietly.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from experiments.pocket.data import enlarge
from lab.quality import ablate, degradations, metrics
from scripts.cog_server import ROOT
from seesr import Output, Settings, Upscaler

FLOORS = {1: 1.12, 2: 1.13, 4: 1.11}  # steps -> mean luma gain over bicubic, dB
EACH = 0.36  # the least gain of any image, dB
MILD, MILD_EACH = 0.46, 0.1  # the same of mild damage, two steps
DAMAGED, DAMAGED_EACH = 0.14, -0.22  # the same of Real-ESRGAN's degradation, two steps
LOSSES = {"no ControlNet": 0.2, "image tokens zeroed": 0.02, "negative prompt as prompt": 1.0}  # mean loss, dB


def luma(image: degradations.Rgb) -> np.ndarray:
    """Without the border that the measures leave out."""
    return metrics.luma(image)[4:-4, 4:-4]


def restored(
    pocket: Upscaler, low: degradations.Rgb, high: degradations.Rgb, steps: int
) -> tuple[Output, list[np.ndarray], float]:
    """(result, luma of ours, of bicubic and of the truth, gain over bicubic in dB)."""
    result = pocket(Image.fromarray(low), Settings(seed=1, num_inference_steps=steps))
    ours, bicubic, truth = map(luma, (np.asarray(result.image), enlarge(low, high.shape[1::-1]), high))
    return result, [ours, bicubic, truth], metrics.psnr(ours, truth) - metrics.psnr(bicubic, truth)


@pytest.mark.long
@pytest.mark.parametrize("steps", [1, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 4))])
def test_held_out_images_beat_bicubic_and_keep_their_colors(pocket: Upscaler, steps: int) -> None:
    gains, similarity, shifts = [], [], []
    for name, high in metrics.built_in():
        low = degradations.clean(high, 0)
        result, (ours, bicubic, truth), gain = restored(pocket, low, high, steps)
        assert "pristine" in result.metrics["tags"], name
        gains.append(gain)
        scores = [structural_similarity(x, truth, data_range=255) for x in (ours, bicubic)]
        similarity.append(scores[0] - scores[1])
        shifts.append(metrics.colour_shift(np.asarray(result.image), low))
    assert np.mean(gains) >= FLOORS[steps], gains
    assert min(gains) >= EACH, gains
    assert min(similarity) > 0, similarity
    assert max(shifts) < 1.05, shifts


@pytest.mark.slow
def test_degraded_images_beat_bicubic_and_most_are_detected_as_degraded(pocket: Upscaler) -> None:
    """tests/data/damaged/NAME-SEED.png is realesrgan(NAME, SEED), whose packages are not needed to test."""
    gains, tags = [], []
    for name, high in metrics.built_in():
        for seed in (1, 2):
            low = np.asarray(Image.open(ROOT / f"tests/data/damaged/{name}-{seed}.png"))
            result, _, gain = restored(pocket, low, high, steps=2)
            gains.append(gain)
            tags.append(result.metrics["tags"])
    assert np.mean(gains) >= DAMAGED, gains
    assert min(gains) >= DAMAGED_EACH, gains
    assert sum("damaged" in outcome for outcome in tags) >= 4, tags


@pytest.mark.slow
def test_mildly_damaged_images_beat_bicubic(pocket: Upscaler) -> None:
    gains = [restored(pocket, degradations.mild(high, 1), high, steps=2)[2] for _, high in metrics.built_in()]
    assert np.mean(gains) >= MILD, gains
    assert min(gains) >= MILD_EACH, gains


@pytest.mark.slow
def test_removing_an_input_lowers_the_quality(pocket: Upscaler) -> None:
    losses: dict[str, list[float]] = {variant: [] for variant in LOSSES}
    for _, high in metrics.built_in():
        low = degradations.clean(high, 0)
        results = {
            variant: metrics.psnr(luma(ablate.restore(pocket, low, 1, variant)), luma(high))
            for variant in ("all", *LOSSES)
        }
        for variant, lost in losses.items():
            lost.append(results["all"] - results[variant])
    for variant, least in LOSSES.items():
        assert np.mean(losses[variant]) >= least, (variant, losses[variant])
