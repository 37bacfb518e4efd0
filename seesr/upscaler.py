"""The story of one picture.

    file -image.read-> RGB [H, W, 3] (+ alpha, ICC, EXIF, kept aside)
     |- tagger: the original small picture -> tags, image tokens [1, n, width]
     |   '- text: tags + prompts -> text tokens [B, 77, width], B = 2 only with guidance
     '- image.enlarge, image.pad -> hint [H', W', 3]
           |- autoencoder.encode -> latents z [1, C, H'/f, W'/f]
           |- sampling: noise at t = 999, then every step over tiles -> clean latents
           '- autoencoder.decode -> [3, H', W'] -> color.match_by_strips with the hint
                 '- crop to round(w * scale) x round(h * scale) -> alpha, ICC, EXIF back -> image.write

The factor f, the channel count C and the token widths come from the bundle's configs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import resource
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from seesr import __version__, autoencoder, color, hardware, image, models, sampling, steering, text, weights
from seesr.attention import Tokens
from seesr.budget import Budget
from seesr.graphs import Graphs
from seesr.image import Picture
from seesr.precision import check_finite
from seesr.progress import Progress
from seesr.settings import Settings
from seesr.tiling import Tile

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """What one call gives.

    Attributes:
        picture: the result with alpha, profile and EXIF of the input.
        uncertainty: where the particles of Kernel Density Steering disagreed, uint16 [H, W]; 65535 is a spread of 1
            or more latent units. Relative and uncalibrated. None without steering.
        seed: the seed used, drawn if none was given.
        metrics: tags, sizes, steps, tiles, seconds per stage, peak memory of the process, device, bundle.
        source: the input.
    """

    picture: Picture
    uncertainty: NDArray[np.uint16] | None
    seed: int
    metrics: dict[str, Any]

    source: Picture

    @property
    def image(self) -> Image.Image:
        """The result as an 8-bit Pillow image."""
        return self.picture.pil()

    def view(self, name: str) -> Picture:
        """The picture to write: "image"; "comparison", bicubic left and the result right; or "uncertainty".

        Raises:
            ValueError: there is no uncertainty map without steering.
        """
        if name == "image":
            return self.picture
        if name == "comparison":
            plain = image.enlarge(self.source.rgb, self.picture.size)
            return dataclasses.replace(self.picture, rgb=np.concatenate([plain, self.picture.rgb], axis=1), alpha=None)
        if self.uncertainty is None:
            raise ValueError("there is no uncertainty map without steering")
        return Picture(np.repeat(self.uncertainty[..., None], 3, axis=2), record=self.picture.record)


class Upscaler:
    """Loaded networks, ready for any number of pictures.

    upscaler = Upscaler.load("weights/pocket")
    result = upscaler(Image.open("photo.jpg"), Settings(scale_factor=4, seed=1))
    """

    def __init__(self, networks: models.Models) -> None:
        self.networks = networks
        self.attention = hardware.tune(networks)  # name of the kernel
        self.graphs = Graphs() if hardware.wants_graphs(networks.device) else None

    @classmethod
    def load(cls, bundle: str | Path | None = None, device: str | None = None) -> Upscaler:
        """Loads a bundle: half precision on a GPU, single precision on a CPU.

        Args:
            bundle: the folder; None: SEESR_WEIGHTS, the full bundle or the pocket one, whichever is there.
            device: a torch device; None: the GPU if there is one.

        Raises:
            WeightsError: the bundle is missing, damaged or does not fit.
        """
        path = weights.locate() if bundle is None else Path(bundle)
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        networks = models.load(path, target, torch.float32 if target.type == "cpu" else torch.float16)
        upscaler = cls(networks)
        log.info(
            "bundle %s on %s in %s, %s attention", networks.bundle.name, target, networks.dtype, upscaler.attention
        )
        return upscaler

    def __call__(
        self,
        source: Picture | Image.Image | Path,
        settings: Settings | None = None,
        progress: Progress | None = None,
    ) -> Result:
        """Upscales one picture.

        Raises:
            ValueError: the picture cannot be read, or is too large for the scale; one line.
            RuntimeError: the networks gave no usable picture.
        """
        settings = settings or Settings()
        if isinstance(source, Path):
            source = image.read(source, settings.output_size)
        picture = source if isinstance(source, Picture) else image.from_pil(source)
        return Job(self.networks, settings, picture, progress, self.graphs).run()

    def warm_up(self) -> None:
        """Runs one step on a small grey picture, so that the first caller does not pay for lazy initialisation."""
        side = self.networks.tile * self.networks.factor // 4
        grey = np.linspace(64, 192, side * side * 3).reshape(side, side, 3).astype(np.uint8)
        self(Picture(grey), Settings(num_inference_steps=1, seed=0))

    def healthy(self) -> bool:
        """Whether the device still computes; a GPU does not after an illegal access."""
        try:
            return torch.ones(2, device=self.networks.device).sum().item() == 2
        except RuntimeError as error:
            log.error("the device has failed: %s", error)
            return False


class Job:
    """One picture on its way. The methods are the hops of the road above, in order."""

    def __init__(
        self,
        networks: models.Models,
        settings: Settings,
        picture: Picture,
        progress: Progress | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.networks, self.settings, self.picture = networks, settings, picture
        self.seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
        self.size = settings.output_size(*picture.size)
        self.seconds: dict[str, float] = {}
        self.budget = Budget.plan(networks.device, settings.latent_tiled_size**2)
        self.progress = progress or Progress()
        self.graphs = graphs

    def run(self) -> Result:
        with self.timed("tags"):
            tags, image_tokens = self.tag()
        with self.timed("text"):
            text_tokens = self.encode_text(tags)
        with self.timed("enlarge"):
            hint = self.enlarge()
        with self.timed("encode"):
            start, noise = self.start(hint)
        with self.timed("denoise"):
            denoiser = self.denoiser(hint, text_tokens, image_tokens, start.shape[2:])
            z, uncertainty, kds = self.denoise(denoiser, start, noise)
        with self.timed("decode"):
            restored = self.decode(z)
        with self.timed("finish"):
            result = self.finish(restored, hint)
        metrics = {
            "seed": self.seed,
            "tags": ", ".join(tags),
            "input_size": "x".join(map(str, self.picture.size)),
            "output_size": "x".join(map(str, result.size)),
            "steps": self.settings.num_inference_steps,
            "tiles": len(denoiser.tiles),
            "tile_batch": self.budget.batch,
            "out_of_memory_retries": self.budget.retries,
            "float32_retries": self.budget.redone,
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory_mb": peak_memory(self.networks.device),
            "device": device_name(self.networks.device),
            "bundle": self.networks.bundle.name,
        }
        if kds:
            metrics["kds"] = kds
        log.info("%s", metrics)
        result = dataclasses.replace(result, record=self.record())
        return Result(result, uncertainty, self.seed, metrics, self.picture)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.networks.device.type == "cuda":
            torch.cuda.synchronize(self.networks.device)
        self.seconds[stage] = time.perf_counter() - started

    def record(self) -> dict[str, Any]:
        """All that is needed to make the same picture again from the same input."""
        settings = dataclasses.asdict(dataclasses.replace(self.settings, seed=self.seed))
        return {"version": __version__, "bundle": self.networks.bundle.name, "settings": settings}

    def tag(self) -> tuple[list[str], Tensor]:
        """The original small picture -> tags, image tokens [1, n, width]."""
        return self.networks.tagger(self.pixels(self.picture.rgb))

    def encode_text(self, tags: list[str]) -> Tensor:
        """Tags and prompts -> text tokens [1, 77, width], or [2, 77, width] = (negative, positive) with guidance."""
        settings, tokenizer = self.settings, self.networks.tokenizer
        shown = text.fit_tags(tokenizer, tags, settings.user_prompt, settings.positive_prompt)
        if len(shown) < len(tags):
            log.info("%d of %d tags fit the prompt", len(shown), len(tags))
        prompts = [text.compose(shown, settings.user_prompt, settings.positive_prompt)]
        if settings.cfg_scale > 1:
            prompts.insert(0, settings.negative_prompt)
        return text.encode(self.networks.text_encoder, tokenizer, prompts)

    def enlarge(self) -> image.Pixels:
        """The picture at its final size, mirrored outwards to whole latent tiles: [H', W', 3]."""
        rgb = self.picture.rgb
        if self.picture.alpha is not None:
            rgb = image.fill_hidden(rgb, self.picture.alpha)
        networks = self.networks
        cell = networks.factor * 2 ** (len(networks.unet.config["block_out_channels"]) - 1)
        least = min(networks.tile, self.settings.latent_tiled_size)
        return image.pad(image.enlarge(rgb, self.size), cell, least * networks.factor)

    def pixels(self, rgb: image.Pixels) -> Tensor:
        """[H, W, 3] integers -> [1, 3, H, W] in [0, 1], float32, on the device."""
        tensor = torch.from_numpy(rgb.astype(np.float32)).to(self.networks.device)
        return (tensor / np.iinfo(rgb.dtype).max).permute(2, 0, 1)[None].contiguous()

    def start(self, hint: image.Pixels) -> tuple[Tensor, Iterator[Tensor] | None]:
        """The enlarged picture -> latents at the first step [N, C, h, w], and the noise of every later step.

        Steered particles differ in their first noise alone: they start from the mean of the posterior and then step
        deterministically, since fresh noise would drive them apart again.
        """
        networks, scheduler = self.networks, self.networks.scheduler
        shape = (
            1,
            networks.unet.config["in_channels"],
            hint.shape[0] // networks.factor,
            hint.shape[1] // networks.factor,
        )
        count = self.settings.num_particles if self.settings.steered else 1
        seeds = steering.particle_seeds(self.seed, count)
        streams = [sampling.noise_stream(seed, shape, networks.device) for seed in seeds]
        first = torch.cat([next(stream) for stream in streams])
        posterior = None if self.settings.steered else next(streams[0])
        size = shape[2:]
        z = autoencoder.encode(networks.vae, self.under(hint), size, posterior, self.budget, self.progress)
        return sampling.start_latents(z, first, scheduler), None if self.settings.steered else streams[0]

    def denoise(
        self, denoiser: sampling.Denoiser, start: Tensor, noise: Iterator[Tensor] | None
    ) -> tuple[Tensor, NDArray[np.uint16] | None, dict[str, Any]]:
        """Latents at the first step [N, C, h, w] -> clean latents [1, C, h, w], uncertainty map, steering metrics."""
        settings, scheduler = self.settings, self.networks.scheduler
        steps = sampling.schedule(scheduler, settings.num_inference_steps)
        self.progress.start("denoise", len(steps) * len(start) * len(denoiser.tiles))
        kind = scheduler.config["prediction_type"]
        if not settings.steered:
            return sampling.sample(denoiser, start, steps, kind, noise), None, {}
        factor = self.networks.factor
        area = (-(-self.size[1] // factor), -(-self.size[0] // factor))
        method = steering.Steering(bandwidth=settings.bandwidth)
        ensemble = steering.Ensemble(method, len(steps), len(start), area)
        z, metrics = ensemble.winner(sampling.sample(denoiser, start, steps, kind, noise, ensemble))
        if not metrics["effective"]:
            log.warning("steering moved the particles by less than 1 % of their spread: it had no effect")
        return z, self.uncertainty(ensemble), metrics

    def uncertainty(self, ensemble: steering.Ensemble) -> NDArray[np.uint16] | None:
        """Spread per cell -> 16-bit map at the size of the result."""
        if ensemble.uncertainty is None:
            return None
        factor, (width, height) = self.networks.factor, self.size
        whole = F.interpolate(ensemble.uncertainty[None, None], scale_factor=factor, mode="bilinear")[0, 0]
        return (whole[:height, :width].clamp(max=1) * 65535).round().cpu().numpy().astype(np.uint16)

    def denoiser(
        self, hint: image.Pixels, text_tokens: Tensor, image_tokens: Tensor, z_size: Sequence[int]
    ) -> sampling.Denoiser:
        tile, overlap = self.settings.latent_tiled_size, self.settings.latent_tiled_overlap
        tiles, weight = sampling.plan(z_size[0], z_size[1], tile, overlap, self.networks.device)
        return sampling.Denoiser(
            unet=self.networks.unet,
            controlnet=self.networks.controlnet,
            text=Tokens(text_tokens),
            image=Tokens(image_tokens),
            hint=self.under(hint),
            tiles=tiles,
            weight=weight,
            guidance=self.settings.cfg_scale,
            budget=self.budget,
            progress=self.progress,
            graphs=self.graphs,
        )

    def under(self, hint: image.Pixels) -> Callable[[Tile], Tensor]:
        """The enlarged picture by tiles: a tile in latent cells -> [1, 3, f*h, f*w] in [0, 1]."""

        def pixels(tile: Tile) -> Tensor:
            top, left, bottom, right = tile.times(self.networks.factor)
            return self.pixels(hint[top:bottom, left:right])

        return pixels

    def decode(self, z: Tensor) -> Tensor:
        """Clean latents [1, C, h, w] -> [3, H', W'] in host memory."""
        networks = self.networks
        return autoencoder.decode(networks.vae, z, networks.factor, self.budget, self.progress)

    def finish(self, restored: Tensor, hint: image.Pixels) -> Picture:
        """[3, H', W'] -> the picture in exact size, colours and depth, with alpha and metadata.

        Raises:
            RuntimeError: values that are not finite, or one flat colour from an input that is not.
        """
        width, height = self.size
        depth = self.picture.rgb.dtype
        most = np.iinfo(depth).max
        rgb = np.empty((height, width, 3), depth)
        device = self.networks.device
        strips = color.match_by_strips(
            lambda top, bottom: restored[None, :, top:bottom].to(device),
            lambda top, bottom: self.pixels(hint[top:bottom]),
            len(hint),
            self.settings.color_fix,
        )
        for top, rows in strips:
            pixels = rows[0, :, : height - top, :width].permute(1, 2, 0)
            check_finite(pixels, "color")
            rgb[top : top + len(pixels)] = (pixels.clamp(0, 1) * most).round().cpu().numpy()
        if np.ptp(rgb, axis=(0, 1)).max() == 0 and np.ptp(hint[:height, :width], axis=(0, 1)).max() > most // 32:
            raise RuntimeError("the result is one flat colour although the input is not; nothing is returned")
        alpha = self.picture.alpha
        if alpha is not None:
            alpha = image.enlarge(alpha, self.size, Image.Resampling.LANCZOS)
        exif = self.picture.exif if self.settings.keep_exif else None
        return dataclasses.replace(self.picture, rgb=rgb, alpha=alpha, exif=exif)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most that this process has held so far, in MB (10^6 bytes)."""
    found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 // 10**6}  # KiB on Linux
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device) // 10**6
    return found
