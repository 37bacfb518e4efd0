"""Kernel Density Steering, property by property, with formulas in place of networks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seesr import Settings, Upscaler
from seesr.networks import weights
from seesr.networks.schedule import NoiseSchedule
from seesr.pipeline import sampling, steering
from seesr.pipeline.steering import Ensemble, Steering, mean_shift
from seesr.runtime.blending import blend, window
from seesr.runtime.precision import NotFinite
from seesr.runtime.tiling import Place, grid

SCHEDULER = NoiseSchedule({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"})
DELTA = 0.3


def stub(fn: Callable[[Tensor, int], Tensor], tile: int = 64, overlap: int = 16, batch: int = 1) -> Callable:
    """A denoiser of the real shape that applies a pointwise `fn` to tiles, through the real blending."""

    def denoise(z: Tensor, t: int, s: int) -> Tensor:
        tiles = grid(z.shape[2], z.shape[3], tile, overlap)
        weight = window(tiles[0].bottom - tiles[0].top, tiles[0].right - tiles[0].left)

        def run(places: list[Place]) -> Tensor:
            return fn(torch.stack([place.crop(z[n]) for n, place in places]), t)

        return blend(run, tiles, z.shape, batch, weight)

    return denoise


def two_modes(z: Tensor, t: int) -> Tensor:
    """The exact noise prediction for a prior of two values, +1 and -1, with a spread of 0.1, per element."""
    a2 = SCHEDULER.alphas_cumprod[t].item()
    a, v = math.sqrt(a2), a2 * 0.01 + 1 - a2
    mode = torch.tanh(a * z / v)
    x = mode + a * 0.01 / v * (z - a * mode)
    return (z - a * x) / math.sqrt(1 - a2)


def starts(seed: int, count: int, shape: tuple[int, ...] = (1, 4, 32, 32)) -> Tensor:
    return torch.cat(
        [next(sampling.noise_stream(s, shape, torch.device("cpu"))) for s in steering.particle_seeds(seed, count)]
    )


def run(denoise: Callable, z: Tensor, n: int, settings: Steering | None = None) -> tuple[Tensor, Ensemble | None]:
    steps = sampling.schedule(SCHEDULER, n)
    ensemble = Ensemble(settings, n, len(z), (z.shape[2], z.shape[3])) if settings else None
    return sampling.sample(denoise, z, steps, sampling.ddim_step, ensemble or sampling.unsteered), ensemble


def update(x: Tensor, h: float = 0.0, delta: float = DELTA, patch: int = 2) -> Tensor:
    return mean_shift(x, Steering(bandwidth=h, patch=patch), delta)[0]


def spread_ratio(after: Tensor, before: Tensor) -> float:
    return (after.var(0).mean().sqrt() / before.var(0).mean().sqrt()).item()


def test_k1_one_particle_off_and_no_strength_are_the_same_bytes() -> None:
    z = starts(3, 1)
    denoise = stub(two_modes, 16, 4)
    off, _ = run(denoise, z, 4)
    one, _ = run(denoise, z, 4, Steering())
    several, _ = run(denoise, starts(3, 4), 4, Steering(strength=0.0))
    assert torch.equal(off, one)
    assert torch.equal(off, several[:1])
    steered, _ = run(denoise, starts(3, 4), 4, Steering())
    assert not torch.equal(off, steered[:1])  # so the strength alone makes the difference


def test_k2_streams_are_independent_and_do_not_depend_on_their_number() -> None:
    assert torch.equal(starts(7, 10)[:4], starts(7, 4))
    assert not set(steering.particle_seeds(7, 16)) & set(steering.particle_seeds(8, 16))
    assert steering.particle_seeds(7, 3) == [7, 3978831108303801465, 9063393916493061901]  # the same in every version
    noise = starts(7, 6, (1, 4, 128, 128)).flatten(1)
    correlations = torch.corrcoef(noise) - torch.eye(6)
    assert correlations.abs().max() < 0.02


def test_k3_the_recomputed_noise_fits_the_steered_prediction() -> None:
    step = sampling.schedule(SCHEDULER, 4)[1]
    z, x = starts(1, 4), update(torch.randn(4, 4, 32, 32))
    a, g = math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)
    eps = (z - a * x) / g
    torch.testing.assert_close(a * x + g * eps, z, rtol=1e-5, atol=1e-5)
    a_next, g_next = math.sqrt(step.alpha_bar_next), math.sqrt(1 - step.alpha_bar_next)
    torch.testing.assert_close(sampling.ddim_step(z, x, step), a_next * x + g_next * eps, rtol=1e-5, atol=1e-5)


def test_k4_a_tiny_bandwidth_changes_nothing() -> None:
    x = torch.randn(5, 4, 16, 16)
    smallest = min((x[i] - x[k]).abs().min().item() for i in range(5) for k in range(i)) or 1e-6
    assert torch.equal(update(x, max(1e-4 * smallest, 1e-9)), x)


def test_k5_a_huge_bandwidth_pulls_to_the_mean() -> None:
    x = torch.randn(5, 4, 16, 16)
    torch.testing.assert_close(update(x, 1e6), x + DELTA * (x.mean(0) - x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", range(2, 17))
def test_k6_equidistant_particles_contract_by_half_the_strength(count: int) -> None:
    x = torch.eye(count).view(count, count, 1, 1)  # corners of a simplex, one patch
    expected = x.mean(0) + (1 - DELTA / 2) * (x - x.mean(0))
    torch.testing.assert_close(update(x, patch=1), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [4, 10, 16])
@pytest.mark.parametrize("patch", [1, 2, 4, 8, 16])
def test_k7_gaussian_particles_contract_as_computed(count: int, patch: int) -> None:
    x = 0.3 * torch.randn(count, 4, 16 * patch, 16 * patch, generator=torch.Generator().manual_seed(count * patch))
    assert 0.84 <= spread_ratio(update(x, patch=patch), x) <= 0.92


def test_k8_values_stay_inside_and_no_pair_moves_apart() -> None:
    generator = torch.Generator().manual_seed(8)
    for trial in range(200):
        count = int(torch.randint(2, 9, (), generator=generator))
        x = torch.randn(count, 2, 4, 4, generator=generator) * torch.rand((), generator=generator) * 3
        h = 0.0 if trial % 2 else float(torch.rand((), generator=generator)) + 0.01
        moved = update(x, h, float(torch.rand((), generator=generator)), patch=4)
        assert (moved <= x.amax(0)).all() and (moved >= x.amin(0)).all()

        def largest(y: Tensor) -> float:
            return max((y[i] - y[k]).norm().item() for i in range(len(y)) for k in range(i))

        assert largest(moved) <= largest(x) * (1 + 1e-6)


def test_k9_order_does_not_matter() -> None:
    x, order = torch.randn(6, 4, 16, 16), torch.randperm(6)
    torch.testing.assert_close(update(x[order]), update(x)[order], atol=1e-6, rtol=1e-5)
    assert order[steering.choose(x[order], 16, 16)[0]] == steering.choose(x, 16, 16)[0]


def test_k10_shift_and_scale_pass_through() -> None:
    x = torch.randn(5, 4, 16, 16)
    torch.testing.assert_close(update(x + 3), update(x) + 3, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(update(x * 7), update(x) * 7, atol=1e-5, rtol=1e-5)


def test_k11_the_distance_does_not_grow_with_the_patch() -> None:
    x = torch.randn(5, 4, 8, 8)
    doubled = torch.cat([x, x], dim=1)
    torch.testing.assert_close(update(doubled, 0.7)[:, :4], update(x, 0.7), atol=1e-6, rtol=1e-5)


def test_k12_two_clusters_stay_apart() -> None:
    gap = 2.0
    x = torch.cat([torch.zeros(5, 4, 2, 2), torch.full((5, 4, 2, 2), gap)])
    moved = update(x, delta=1.0)
    torch.testing.assert_close(moved[:5], torch.full((5, 4, 2, 2), gap / 12), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moved[5:], torch.full((5, 4, 2, 2), gap * 11 / 12), atol=1e-6, rtol=1e-5)


def test_k13_identical_particles_give_no_nan() -> None:
    x = torch.randn(1, 4, 8, 8).repeat(5, 1, 1, 1)
    assert torch.equal(update(x), x)
    pair = torch.randn(2, 4, 8, 8)
    assert torch.isfinite(update(pair[[0, 0, 1]])).all()


@pytest.mark.parametrize("count", [3, 4])
def test_k13_the_bandwidth_is_the_median_over_pairs_and_their_mean_where_that_is_zero(count: int) -> None:
    x = torch.randn(count, 3, 2, 2)
    x[:, :, 1] = x[:1, :, 1]  # the lower patches agree
    _, result = mean_shift(x, Steering(patch=1), DELTA)
    i, k = zip(*[(i, k) for i in range(count) for k in range(i + 1, count)], strict=True)
    pairs = (x[list(i)] - x[list(k)]).square().mean(1)
    h2 = torch.tensor(np.median(pairs[:, 0].numpy(), axis=0)) / (2 * math.log(count + 1))
    torch.testing.assert_close(result[0], h2.sqrt())
    assert (result[1] == 0).all()
    x = torch.zeros(5, 1, 1, 1)
    x[0] = 2.0  # six pairs agree, four are 4 apart in squares
    _, result = mean_shift(x, Steering(patch=1), DELTA)
    torch.testing.assert_close(result.item(), math.sqrt(1.6 / (2 * math.log(6))))


def test_the_metrics_say_how_far_it_moved_and_whether_that_counts() -> None:
    x = starts(3, 3)
    for bandwidth, effective in ((0.0, True), (1e-3, False)):
        ensemble = Ensemble(Steering(bandwidth=bandwidth), 1, 3, (32, 32))
        moved = ensemble(x, 0)
        assert ensemble.moved == [pytest.approx((moved - x).square().mean().sqrt().item())]
        assert ensemble.winner(moved)[1]["effective"] is effective
    assert Steering() == Steering(bandwidth=0.0, patch=2, strength=0.3)


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_k14_any_size_works_and_border_patches_count_what_they_hold(patch: int) -> None:
    for height in range(1, 2 * patch + 2):
        for width in range(1, 2 * patch + 2):
            x = torch.randn(4, 3, height, width)
            moved = update(x, 0.6, patch=patch)
            for top in range(0, height, patch):
                for left in range(0, width, patch):
                    p = x[:, :, top : top + patch, left : left + patch]
                    d2 = (p[:, None] - p[None]).square().flatten(2).mean(2)
                    w = torch.exp(-d2 / (2 * 0.6**2))
                    mean = torch.einsum("ik,kchw->ichw", w / w.sum(1, keepdim=True), p)
                    expected = p + DELTA * (mean - p)
                    result = moved[:, :, top : top + patch, left : left + patch]
                    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


def test_k14_strips_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 4, 21, 17)
    whole = update(x)
    monkeypatch.setattr(steering, "LATENT_PIXELS", 64)
    assert torch.equal(update(x), whole)


def test_k15_schedule() -> None:
    steered = [[s for s, d in enumerate(steering.strengths(n, DELTA)) if d] for n in range(1, 9)]
    first = [0, 1, 1, 1, 2, 2, 2, 3]
    assert steered == [list(range(f, n)) for n, f in enumerate(first, 1)]
    times = [[step.t for step in sampling.schedule(SCHEDULER, n)] for n in (2, 3, 5, 8)]
    assert times == [[999, 499], [999, 666, 332], [999, 799, 599, 399, 199], [999, 874, 749, 624, 499, 374, 249, 124]]


def test_k16_tiles_do_not_change_the_steering() -> None:
    z = starts(5, 4, (1, 4, 40, 56))
    (whole, a), (tiled, b) = (run(stub(two_modes, tile, 4), z, 2, Steering()) for tile in (64, 16))
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=1e-5)
    assert a and b
    assert a.winner(whole)[1]["chosen"] == b.winner(tiled)[1]["chosen"]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_k17_two_modes_keep_their_shares_while_the_spread_falls(n: int) -> None:
    z = starts(17, 10, (1, 1, 64, 64))
    off, _ = run(stub(two_modes), z, n)
    on, ensemble = run(stub(two_modes), z, n, Steering())
    assert spread_ratio(on, off) < 0.99
    assert abs((on > 0).float().mean() - (off > 0).float().mean()) < 0.03
    assert ensemble and ensemble.winner(on)[1]["effective"]


def test_k18_a_dead_particle_fails_the_image(tiny_upscaler: Upscaler, photo: Image.Image) -> None:
    """Not finite in single precision either: one particle's answer is no better than the network that gave it."""
    unet, calls = tiny_upscaler.networks.unet, []

    def die(module: torch.nn.Module, values: object, prediction: Tensor) -> Tensor:
        calls.append(module)
        return prediction * math.nan if len(calls) == 2 else prediction

    hook = unet.register_forward_hook(die)
    try:
        with pytest.raises(NotFinite, match="denoise"):
            tiny_upscaler(photo, Settings(seed=1, num_inference_steps=1, use_kds=True, num_particles=3))
    finally:
        hook.remove()


def test_k19_a_seed_repeats_and_batches_do_not_matter() -> None:
    z = starts(11, 5, (1, 4, 40, 40))
    first, again, batched = (run(stub(two_modes, 16, 4, batch), z, 3, Steering())[0] for batch in (1, 1, 4))
    assert torch.equal(first, again)
    assert torch.equal(first, batched)


def test_k20_uncertainty() -> None:
    x = torch.zeros(2, 4, 6, 5)
    x[1] = 2.0
    torch.testing.assert_close(steering.spread(x), torch.full((6, 5), math.sqrt(2.0)))
    assert (steering.spread(x[[0, 0, 0]]) == 0).all()


@pytest.mark.full
def test_k21_trained_weights_agree_more_after_steering_and_show_no_grid() -> None:
    """K22 is the table: python -m lab.quality.particles --bundle weights/full"""
    import skimage.data

    from lab.quality import degradations, particles

    upscaler = Upscaler.load(weights.FULL)
    high = particles.middle(skimage.data.astronaut())
    rows = particles.trials(upscaler, degradations.clean(high, 1), high, 4, 1)
    for row in (r for r in rows if r["method"] == "KDS"):
        steered = [s for s, strength in enumerate(steering.strengths(4, DELTA)) if strength]
        assert all(row["spread_after"][s] < row["spread_before"][s] for s in steered)
        assert row["grid_lines"] <= 1.05


def test_the_winner_is_nearest_to_the_mean_within_the_image() -> None:
    z = torch.zeros(3, 1, 4, 4)
    z[0], z[1], z[2] = -1.0, 0.1, 1.0
    z[1, :, :, 3] = 100.0  # padding, not image
    index, distances = steering.choose(z, 4, 3)
    assert index == 1 and distances[1] == min(distances)


def test_the_uncertainty_in_the_metrics_is_that_of_the_image() -> None:
    ensemble = Ensemble(Steering(), 1, 2, (5, 10))
    ensemble.uncertainty = torch.arange(150.0).view(10, 15)
    metrics = ensemble.winner(torch.zeros(2, 1, 10, 15))[1]
    inside = torch.arange(150.0).view(10, 15)[:5, :10].flatten()
    assert metrics["uncertainty_mean"] == pytest.approx(inside.mean().item())
    assert metrics["uncertainty_max"] == 69.0
    assert metrics["uncertainty_p95"] == inside.sort().values[46].item()  # 46 of the 50 are below


@pytest.mark.parametrize(
    ("moved", "before", "effective"),
    [([0.01], [9.0, 1.0], True), ([0.0099], [0.0, 1.0], False), ([0.0], [1.0, 0.0], False), ([0.5], [1.0, 40.0], True)],
)
def test_steering_counts_from_a_hundredth_of_the_spread(
    moved: list[float], before: list[float], effective: bool
) -> None:
    """Of the steps that were steered; the first of two is not."""
    ensemble = Ensemble(Steering(), 2, 2, (4, 4))
    assert ensemble.strengths == [0.0, 0.3]
    ensemble.moved, ensemble.before = moved, before
    assert ensemble.winner(torch.zeros(2, 1, 4, 4))[1]["effective"] is effective


def test_the_upscaler_steers(pocket: Upscaler, photo: Image.Image) -> None:
    plain = Settings(seed=4, num_inference_steps=2, scale_factor=2, latent_tiled_size=32)
    steered = dataclasses.replace(plain, use_kds=True, num_particles=3)
    first, again = pocket(photo, steered), pocket(photo, steered)
    np.testing.assert_array_equal(np.asarray(first.image), np.asarray(again.image))
    kds = first.metrics["kds"]
    assert kds["particles"] == 3 and kds["chosen"] in range(3)
    assert kds["spread_after"][-1] < kds["spread_before"][-1]
    one = pocket(photo, dataclasses.replace(steered, num_particles=1))
    np.testing.assert_array_equal(np.asarray(one.image), np.asarray(pocket(photo, plain).image))
    wide = pocket(photo, dataclasses.replace(steered, bandwidth=5.0))
    assert (np.asarray(wide.image) != np.asarray(first.image)).any()


def test_the_uncertainty_map_has_the_image_size_and_a_fixed_scale(pocket: Upscaler, photo: Image.Image) -> None:
    settings = Settings(
        seed=4, num_inference_steps=2, use_kds=True, num_particles=3, scale_factor=2.3, latent_tiled_size=40
    )
    result = pocket(photo, settings)
    assert result.uncertainty is not None
    assert result.uncertainty.dtype == np.uint16
    assert result.uncertainty.shape[::-1] == result.image.size
    assert result.uncertainty.mean() / 65535 == pytest.approx(result.metrics["kds"]["uncertainty_mean"], rel=0.1)
    assert pocket(photo, Settings(seed=4, num_inference_steps=1)).uncertainty is None
    with pytest.raises(ValueError, match="uncertainty"):
        Settings(output_view="uncertainty")
    with pytest.raises(ValueError, match="uncertainty"):
        Settings(output_view="uncertainty", use_kds=True, num_particles=1)
