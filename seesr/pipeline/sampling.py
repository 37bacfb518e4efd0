"""Few-step sampling: low-resolution start, timestep schedule, DDPM and DDIM updates, and the loop over the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from seesr.networks.schedule import NoiseSchedule

START = 999  # timestep of the LR start (SeeSR's start_steps)


class Step(NamedTuple):
    """One visit of the sampler. z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""

    t: int
    alpha_bar: float
    alpha_bar_next: float  # 1 after the last step


Update = Callable[[Tensor, Tensor, Step], Tensor]  # latents, predicted clean latents, step -> latents of the next step
Steer = Callable[[Tensor, int], Tensor]  # predicted clean latents of all particles, number of the step -> the same


def schedule(scheduler: NoiseSchedule, steps: int) -> list[Step]:
    """The timesteps of `steps` trailing steps, with the cumulative alphas here and at the next one."""
    times = scheduler.timesteps(steps)
    alphas = [scheduler.alphas_cumprod[t].item() for t in times]
    return [Step(t, a, b) for t, a, b in zip(times, alphas, [*alphas[1:], 1.0], strict=True)]


def noise_stream(seed: int, shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Endless standard normal tensors of one shape, float32, from a CPU generator: one seed is one image anywhere.

    Drawn for the whole image, so tiles, batches and the device change nothing.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator).to(device)


def start_latents(z: Tensor, noise: Tensor, scheduler: NoiseSchedule) -> Tensor:
    """Clean scaled latents of the upscaled input -> latents at t = 999: 7 % image, the rest noise (LR start)."""
    alpha_bar = scheduler.alphas_cumprod[START].item()
    return math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * noise


def predicted_x0(eps: Tensor, z: Tensor, step: Step) -> Tensor:
    """Predicted noise -> the clean latents that go with it (Ho et al. 2020, equation 15)."""
    return (z - math.sqrt(1 - step.alpha_bar) * eps) / math.sqrt(step.alpha_bar)


def ddpm_step(z: Tensor, x0: Tensor, step: Step, noise: Tensor) -> Tensor:
    """The posterior of DDPM (Ho et al. 2020, equations 6 and 7) with fixed small variance, in float32.

    After the last step this is x0 plus 1e-10 noise, as in the reference.
    """
    a, q = step.alpha_bar, step.alpha_bar_next
    r = a / q
    mean = math.sqrt(q) * (1 - r) / (1 - a) * x0 + math.sqrt(r) * (1 - q) / (1 - a) * z
    variance = max((1 - r) * (1 - q) / (1 - a), 1e-20)
    return mean + math.sqrt(variance) * noise


def ddim_step(z: Tensor, x0: Tensor, step: Step) -> Tensor:
    """The deterministic update (Song et al. 2021, equation 12 with eta = 0), with the noise that fits `x0`."""
    a, g = math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)
    a_next, g_next = math.sqrt(step.alpha_bar_next), math.sqrt(1 - step.alpha_bar_next)
    return a_next * x0 + (g_next / g) * (z - a * x0)


class Ancestral:
    """The update of SeeSR's reference: DDPM with fresh noise at every step, taken from a stream."""

    def __init__(self, noise: Iterator[Tensor]) -> None:
        self.noise = noise

    def __call__(self, z: Tensor, x0: Tensor, step: Step) -> Tensor:
        return ddpm_step(z, x0, step, next(self.noise))


def unsteered(x0: Tensor, s: int) -> Tensor:
    """The Steer of a single sample: nothing is moved."""
    return x0


def sample(
    denoise: Callable[[Tensor, int, int], Tensor],
    z: Tensor,
    steps: list[Step],
    update: Update,
    steer: Steer = unsteered,
) -> Tensor:
    """Latents at the first step -> clean latents, [N, C, H, W] float32.

    Args:
        denoise: latents, timestep and number of the step -> the noise that the network predicts, the same shape.
        update: Ancestral(noise), or ddim_step where fresh noise would drive particles apart.
        steer: moves the predicted clean latents of all particles before each update.
    """
    for s, step in enumerate(steps):
        x0 = steer(predicted_x0(denoise(z, step.t, s), z, step), s)
        z = update(z, x0, step)
    return z
