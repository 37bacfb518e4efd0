"""Few-step sampling: LR start, ControlNet and UNet over tiles, guidance, DDPM. Networks are arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from seesr.attention import Tokens
from seesr.budget import Budget
from seesr.graphs import Graphs
from seesr.precision import again_in_float32, check_finite
from seesr.progress import Progress
from seesr.steering import Ensemble
from seesr.tiling import Place, Tile, blend, grid, window

FEATURE_BYTES = 2**28  # hint features kept over steps and particles, at most
START = 999  # timestep of the LR start (SeeSR's start_steps)


class Step(NamedTuple):
    """One visit of the sampler. z = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps."""

    t: int
    alpha_bar: float
    alpha_bar_next: float  # 1 after the last step


def schedule(scheduler: DDPMScheduler, steps: int) -> list[Step]:
    """The timesteps of `steps` trailing steps, with the cumulative alphas here and at the next one."""
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    alphas = [scheduler.alphas_cumprod[t].item() for t in times]
    return [Step(t, a, b) for t, a, b in zip(times, alphas, [*alphas[1:], 1.0], strict=True)]


def noise_stream(seed: int, shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    """Endless standard normal tensors of one shape, float32, from a CPU generator: one seed is one picture anywhere.

    Drawn for the whole picture, so tiles, batches and the device change nothing.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    while True:
        yield torch.randn(shape, generator=generator).to(device)


def start_latents(z: Tensor, noise: Tensor, scheduler: DDPMScheduler) -> Tensor:
    """Clean scaled latents of the enlarged input -> latents at t = 999: 7 % picture, the rest noise (LR start)."""
    alpha_bar = scheduler.alphas_cumprod[START].item()
    return math.sqrt(alpha_bar) * z + math.sqrt(1 - alpha_bar) * noise


def predicted_x0(prediction: Tensor, z: Tensor, step: Step, kind: str) -> Tensor:
    """What the network says the clean latents are. `kind` is the scheduler's prediction_type."""
    a, g = math.sqrt(step.alpha_bar), math.sqrt(1 - step.alpha_bar)
    if kind == "epsilon":
        return (z - g * prediction) / a
    if kind == "v_prediction":
        return a * z - g * prediction
    assert kind == "sample", kind
    return prediction


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """UNet and ControlNet with everything that stays the same for all tiles and steps of one picture.

    Args:
        text: text tokens, B = 1, or B = 2 = (negative, positive) with guidance.
        image: the tagger's image tokens, B = 1.
        hint: takes a tile in latent cells and returns the enlarged input under it, [1, 3, f*h, f*w] in [0, 1].
        guidance: scale; 1 means off.
        conditioning: weight of the ControlNet's residuals.
        tiles: the tiles of the latents, all of one shape.
        weight: blending weight of a tile, [h, w].
        budget: tiles per forward pass, fewer when memory runs out.
        progress: counts finished tiles.
        graphs: records and replays the forward pass; None: it is run.
    """

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    text: Tokens
    image: Tokens
    hint: Callable[[Tile], Tensor]
    tiles: list[Tile]
    weight: Tensor
    guidance: float = 1.0
    conditioning: float = 1.0
    budget: Budget = dataclasses.field(default_factory=Budget)
    progress: Progress = dataclasses.field(default_factory=Progress)
    graphs: Graphs | None = None
    features: dict[Tile, Tensor] = dataclasses.field(default_factory=dict)

    def __call__(self, z: Tensor, t: int) -> Tensor:
        """Latents [N, C, H, W] float32 at timestep t -> the network's predictions, the same shape, float32."""

        def run(places: list[Place]) -> Tensor:
            parts = torch.stack([tile.of(z[n]) for n, tile in places])

            def work() -> Tensor:
                own = self if self.unet.dtype == self.text.values.dtype else self.in_float32()
                predict = own.predict if own.graphs is None else functools.partial(own.graphs.predict, own)
                time = torch.full((len(parts),), t, device=parts.device)
                prediction = predict(parts, time, torch.cat([own.hint_features(tile) for _, tile in places]))
                check_finite(prediction, "denoise")
                return prediction

            prediction = again_in_float32(work, self.budget, self.unet, self.controlnet)
            self.progress.advance(len(places))
            return prediction

        def whole() -> Tensor:
            return blend(run, self.tiles, z.shape, self.budget.batch, self.weight)

        return self.budget.attempt("batch", whole, self.release)

    def release(self) -> None:
        self.features.clear()
        if self.graphs is not None:
            self.graphs.clear()

    def in_float32(self) -> Denoiser:
        """The same for networks that were cast up for a moment."""
        self.release()  # recorded graphs would read weights that are no longer there
        text, image = Tokens(self.text.values.float()), Tokens(self.image.values.float())
        return dataclasses.replace(self, text=text, image=image, features={}, graphs=None)

    @torch.no_grad()
    def hint_features(self, tile: Tile) -> Tensor:
        """What the ControlNet makes of the hint under a tile, [1, C, h, w]: computed once, while there is room."""
        if tile in self.features:
            return self.features[tile]
        features = self.controlnet.controlnet_cond_embedding(self.hint(tile).to(self.text.values.dtype))
        if len(self.features) * features.nbytes < FEATURE_BYTES:
            self.features[tile] = features
        return features

    @torch.no_grad()
    def predict(self, z: Tensor, t: Tensor, hint: Tensor) -> Tensor:
        """One forward pass of tiles.

        Args:
            z: latents [B, C, h, w].
            t: timesteps [B].
            hint: [B, 3, f*h, f*w] in [0, 1], or its features [B, C', h, w].

        Returns:
            Predictions [B, C, h, w], float32.
        """
        dtype = self.text.values.dtype
        branches = len(self.text.values)
        x = z.to(dtype).repeat(branches, 1, 1, 1)
        hint = hint.to(dtype).repeat(branches, 1, 1, 1)
        time = t.repeat(branches)
        context = (self.text, self.image)
        down, mid = self.controlnet(x, time, context, hint, self.conditioning, return_dict=False)
        prediction = self.unet(
            x,
            time,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            return_dict=False,
        )[0].float()
        if branches == 1:
            return prediction
        negative, positive = prediction.chunk(2)
        return negative + self.guidance * (positive - negative)


def sample(
    denoiser: Denoiser,
    z: Tensor,
    steps: list[Step],
    kind: str,
    noise: Iterator[Tensor] | None,
    ensemble: Ensemble | None = None,
) -> Tensor:
    """Latents at the first step -> clean latents, [N, C, H, W] float32.

    Args:
        kind: the scheduler's prediction_type.
        noise: fresh noise for every step (DDPM, as the reference does); None: deterministic steps.
        ensemble: steers the predicted clean latents of N particles; None: they are left alone.
    """
    for s, step in enumerate(steps):
        x0 = predicted_x0(denoiser(z, step.t), z, step, kind)
        if ensemble is not None:
            z, x0 = ensemble.steer(z, x0, s)
        z = ddim_step(z, x0, step) if noise is None else ddpm_step(z, x0, step, next(noise))
    return z


def plan(height: int, width: int, tile: int, overlap: int, device: torch.device) -> tuple[list[Tile], Tensor]:
    """Tiles of latents [height, width] and the blending weight of one, on `device`."""
    tiles = grid(height, width, tile, overlap)
    first = tiles[0]
    return tiles, window(first.bottom - first.top, first.right - first.left).to(device)
