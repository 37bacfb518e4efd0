"""Upper bounds for the counted cost of the full-size networks; needs no GPU and times nothing."""

from __future__ import annotations

import pytest

from lab.speed import count
from lab.speed.counter import Stage
from seesr import Settings

TWO_STEPS = Settings(num_inference_steps=2)


@pytest.fixture(scope="module")
def at_2048() -> dict[str, Stage]:
    return count.count(2048, int(75e9), TWO_STEPS)


@pytest.mark.long
def test_the_host_waits_a_fixed_number_of_times_and_moves_each_pixel_once_each_way(at_2048: dict[str, Stage]) -> None:
    small = count.count(512, int(75e9), TWO_STEPS)
    for stages, side in ((small, 512), (at_2048, 2048)):
        assert sum(stage.synchronisations for stage in stages.values()) <= 28
        assert sum(stage.bus_bytes for stage in stages.values()) <= 8 * side**2
    assert small["decode"].flop() / 1e12 == pytest.approx(2.515, rel=0.01)
    assert small["denoise"].flop() / 1e12 == pytest.approx(2 * 1.61, rel=0.02)
    assert sum(stage.launches for stage in small.values()) <= 6100


@pytest.mark.long
def test_the_autoencoder_computes_nothing_twice_and_holds_little(at_2048: dict[str, Stage]) -> None:
    """An un-tiled decoder takes 39.5 TFLOP of convolutions at 2048 pixels, 8.8 of attention, and 6.45 GB."""
    decode = at_2048["decode"]
    assert decode.flop("convolution") <= 1.02 * 39.5e12
    assert decode.flop("attention") <= 1.01 * 8.8e12
    assert decode.peak <= 3.6e9
    assert decode.launches <= 2000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "free", "conv", "attention", "peak"),
    [
        (4096, 75e9, 1.1 * 158, 150, 13.5),
        (4096, 19e9, 1.1 * 158, 150, 13.5),
        (4096, 11e9, 1.35 * 158, 150, 9),  # a card of 16 GB
        (8192, 131e9, 1.15 * 633, 220, 52),
        (8192, 43e9, 1.4 * 633, 220, 35),
    ],
)
def test_the_decoder_of_large_images(size: int, free: float, conv: float, attention: float, peak: float) -> None:
    decode = count.count(size, int(free), TWO_STEPS)["decode"]
    assert decode.flop("convolution") <= conv * 1e12
    assert decode.flop("attention") <= attention * 1e12
    assert decode.peak <= peak * 1e9


@pytest.mark.long
def test_a_row_of_counts_is_complete() -> None:
    stages = count.count(512, int(20e9), TWO_STEPS)
    row = count.row(512, 20, 2, stages)
    assert {"size", "free_gb", "launches", "synchronisations", "bus_bytes_per_pixel", "stages"} <= row.keys()
    assert {"conv_tflop", "attention_tflop", "moved_gb", "peak_gb", "launches"} <= row["stages"]["decode"].keys()
    for card in count.CARDS:
        assert 0 < count.floor(stages, card) < count.expected(stages, card)
