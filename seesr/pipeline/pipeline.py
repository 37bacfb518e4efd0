"""The pipeline of one image.

    bytes -images.read.decode-> RGB [H, W, 3] (+ alpha, ICC, EXIF, kept aside)
     |- tagger: the original small image -> tags, image tokens [1, n, width]
     |   '- text: tags + prompts -> text tokens [B, 77, width], B = 2 only with guidance
     '- image_data.resize, image_data.pad -> conditioning image [H', W', 3]
           |- autoencoder.encode -> posterior of the latents z [1, C, H'/f, W'/f]
           |- sampling: noise at t = 999, then every step over tiles (denoiser) -> clean latents
           '- autoencoder.decode -> [3, H', W'] -> color.match_by_strips with the conditioning image
                 '- crop to round(w * scale) x round(h * scale) -> alpha, ICC, EXIF back -> Output.data -> bytes

The factor f, the channel count C and the token widths come from the bundle's configs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from seesr.images import color
from seesr.images.image_data import ImageData, Pixels, pad, resize, to_grey
from seesr.images.mask import Grey
from seesr.networks import hardware, models
from seesr.networks.attention import Tokens
from seesr.networks.graphs import Graphs
from seesr.pipeline import confidence, postprocess, prompt, sampling, steering
from seesr.pipeline.denoiser import Denoiser, layout
from seesr.pipeline.outline import outline_of
from seesr.pipeline.result import Metrics, Output, record
from seesr.pipeline.stages import JobStages, Scope, StageCache
from seesr.pipeline.tagging import tag, to_floats
from seesr.pipeline.tile_skipping import bounds, needed, visible_part
from seesr.runtime.blending import covered
from seesr.runtime.memory import Budget
from seesr.runtime.precision import chosen_precision
from seesr.runtime.progress import Progress
from seesr.runtime.shared_tiles import SharedTiles, encode_context
from seesr.runtime.tile_batches import TilePool
from seesr.runtime.tiling import BATCHES, Tile, least_work
from seesr.settings import Settings
from seesr.vae import autoencoder

log = logging.getLogger(__name__)
NO_GRAPHS = "off (not enabled, or no GPU)"


class UpscaleRun:
    """The run of one image. The methods are the stages of the pipeline above, in order."""

    def __init__(
        self,
        networks: models.Models,
        settings: Settings,
        image: ImageData,
        progress: Progress,
        graphs: Graphs | None = None,
        mask: Grey | None = None,
        cache: StageCache | None = None,
        pools: Sequence[TilePool] = (),
    ) -> None:
        self.pools = pools
        self.networks, self.source, self.progress, self.graphs, self.mask = networks, image, progress, graphs, mask
        self.factor = networks.factor
        self.outline, steps = outline_of(networks), settings.num_inference_steps
        self.steps = self.outline.steps if steps is None else steps
        self.sides = self.outline.tile_sides(settings)
        self.size = settings.output_size(*image.size)
        self.scale = self.size[0] / image.size[0]
        self.z_size = self.outline.latent_size(self.sides, self.size)
        side = least_work(*self.z_size, self.sides, settings.latent_tiled_overlap)
        seeded = dataclasses.replace(settings.seeded(), num_inference_steps=self.steps)
        self.settings = dataclasses.replace(seeded, latent_tiled_size=side)
        self.calibration = confidence.require(self.settings, self.steps, mask is not None, networks.bundle)
        self.part: Tile | None = None  # latent pixels that the region needs; None: all, or a global VAE
        if self.outline.halo is not None:
            self.part = visible_part(self.settings, self.scale, self.factor, self.z_size)
        self.stages = JobStages.of(cache or StageCache(), seeded, image, networks.device)
        self.seconds: dict[str, float] = {}
        self.events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        pool, spare = (graphs.held, graphs.spare) if graphs is not None else (0, bool)
        self.budget = Budget.for_device(networks.device, max(self.sides) ** 2, pool, spare)

    def run(self) -> Output:
        try:
            return self.upscale()
        finally:
            self.budget.restore()

    def upscale(self) -> Output:
        with self.timed("tags"):
            tags, image_tokens = self.cached("tags", None, self.tag)
        with self.timed("text"):
            fitted, text_tokens = self.cached("text", None, lambda: self.encode_text(tags))
        with self.timed("enlarge"):
            conditioning, bicubic = self.enlarge()
        with self.timed("encode"):
            denoiser = self.denoiser(conditioning, text_tokens, image_tokens, self.z_size)
            share, first = denoiser.share, (denoiser.needed or [denoiser.tiles])[0]
            part = None if self.part is None else bounds([self.part, *first])
            posterior = self.cached("encode", part, lambda: self.encode(conditioning, self.z_size, part, share))
        scope = (self.part, tuple(map(tuple, denoiser.needed))) if denoiser.needed else None
        with self.timed("denoise"):
            z, spread, kds = self.cached("denoise", scope, lambda: self.denoise(denoiser, posterior))
        with self.timed("decode"):
            restored = self.cached("decode", scope, lambda: self.decode(z[:1], share))
            particle_spread = None
            if self.calibration is not None:
                particle_spread = self.cached("particles", scope, lambda: self.compare(restored, z, share))
        with self.timed("finish"):
            image, trust = self.finish(restored, conditioning, bicubic, spread)
            disagreement = None if particle_spread is None else confidence.disagreement(particle_spread, image.rgb)
        shown = {name: value for view in self.settings.views.values() for name, value in view.metrics.items()}
        metrics = self.metrics(image, denoiser, fitted) | trust | kds | shown
        if self.calibration is not None and disagreement is not None:
            trusted = float((disagreement < self.calibration.threshold).mean())
            metrics["confidence"] = {**self.calibration.short(), "trusted": round(trusted, 4)}
        log.info("%s", {name: value for name, value in metrics.items() if name != "prompt_cut"})
        uncertainty, layout = postprocess.to_map(spread, self.factor, self.size), (denoiser.tiles, self.factor)
        return Output(
            image,
            uncertainty,
            self.settings,
            cast(Metrics, metrics),
            self.source,
            layout,
            disagreement=disagreement,
            calibration=self.calibration,
        )

    def cached(self, stage: str, scope: Scope, compute: Callable[[], Any]) -> Any:
        """The result of a stage, computed now or by an earlier run; see `JobStages.result`."""
        return self.stages.result(stage, scope, compute, lambda: not self.budget.redone)

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Begins a stage and measures its seconds. Stages with many tiles set their number themselves.

        On a GPU these are the seconds between two events there: the host does not wait for the stage to end.
        """
        self.progress.start(stage)
        if self.networks.device.type == "cuda":
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.events[stage] = first, last
            first.record()
            yield
            last.record()
        else:
            started = time.perf_counter()
            yield
            self.seconds[stage] = time.perf_counter() - started
        self.progress.finish()

    def finished_seconds(self) -> dict[str, float]:
        """Seconds of every stage, once all of them have ended."""
        for stage, (first, last) in self.events.items():
            last.synchronize()
            self.seconds[stage] = first.elapsed_time(last) / 1000
        return {stage: round(value, 3) for stage, value in self.seconds.items()}

    def metrics(self, image: ImageData, denoiser: Denoiser, fitted: prompt.Prompt) -> dict[str, Any]:
        return {
            "seed": self.settings.seed,
            "tags": ", ".join(fitted.tags),
            "tags_left_out": ", ".join(fitted.left_out),
            "prompt_cut": fitted.cut,
            "input_size": "x".join(map(str, self.source.size)),
            "output_size": "x".join(map(str, image.size)),
            "warnings": "; ".join(self.source.warnings),
            "steps": self.steps,
            "tile_size": self.settings.latent_tiled_size,
            "tiles": len(denoiser.tiles),
            "tiles_skipped": len(denoiser.tiles) - len(denoiser.needed[-1]) if denoiser.needed else 0,
            "region": self.settings.region or "",
            "tile_batch": self.budget.batch.amount,
            "reused": ", ".join(self.stages.reused),
            "tiles_reused": 0 if denoiser.finished is None else denoiser.finished.reused,
            "tiles_shared": 0 if denoiser.share is None else denoiser.share.tiles,
            "out_of_memory_retries": self.budget.retries,
            "float32_retries": self.budget.redone,
            "seconds": self.finished_seconds(),
            "peak_memory_mb": hardware.peak_memory(self.networks.device),
            "device": hardware.name(self.networks.device),
            "attention": self.networks.attention,
            "graphs": NO_GRAPHS if self.graphs is None else self.graphs.state,
            "bundle": self.networks.bundle.name,
        }

    def tag(self) -> tuple[list[str], Tensor]:
        """The input at its original size -> tags, image tokens [1, n, width]."""
        tags, tokens = tag(self.networks.tagger, self.source.visible, self.budget)
        return tags, tokens.to(self.networks.dtype)

    def encode_text(self, tags: list[str]) -> tuple[prompt.Prompt, Tensor]:
        """Tags and prompts -> the prompt, text tokens [B, 77, width]; B = 2, (negative, positive), with guidance."""
        settings, tokenizer = self.settings, self.networks.tokenizer
        fitted = prompt.fit(tokenizer, tags, settings.user_prompt, settings.positive_prompt)
        if fitted.cut:
            log.warning("the prompt is too long; its end is ignored")
        prompts = [fitted.text]
        if settings.cfg_scale > 1:
            prompts.insert(0, settings.negative_prompt)
        tokens = prompt.encode(self.networks.text_encoder, tokenizer, prompts, self.budget)
        return fitted, tokens.to(self.networks.dtype)

    def enlarge(self) -> tuple[Tensor, Pixels]:
        """The bicubic upscale with a mirrored border [H', W', 3] on the device, without it [H, W, 3] in host memory.

        With the border the image is at least one tile large, unless it is thin.
        """
        padded = pad(resize(self.source.visible, self.size), *self.outline.padding(self.sides, self.size))
        return torch.from_numpy(padded).to(self.networks.device), padded[: self.size[1], : self.size[0]]

    def start(self, posterior: autoencoder.Posterior) -> tuple[Tensor, sampling.Update]:
        """The input's latents -> the latents at the first step [N, C, h, w], and the update from step to step.

        Steered particles start from the posterior's mean and differ only in their first noise; their steps add none.
        """
        networks, settings = self.networks, self.settings
        streams = self.noise(tuple(posterior.centre.shape))
        first = torch.cat([next(stream) for stream in streams])
        if settings.steered:
            return sampling.start_latents(posterior.mean(), first, networks.scheduler), sampling.ddim_step
        z = posterior.sample(next(streams[0]))
        return sampling.start_latents(z, first, networks.scheduler), sampling.Ancestral(streams[0])

    def noise(self, shape: tuple[int, ...]) -> list[Iterator[Tensor]]:
        """A stream of noise for every particle; the seed itself belongs to the first."""
        count = self.settings.num_particles if self.settings.steered else 1
        assert self.settings.seed is not None
        seeds = steering.particle_seeds(self.settings.seed, count)
        return [sampling.noise_stream(seed, shape, self.networks.device) for seed in seeds]

    def encode(
        self, conditioning: Tensor, size: tuple[int, int], part: Tile | None = None, share: SharedTiles | None = None
    ) -> autoencoder.Posterior:
        """The conditioning image -> the posterior of its latents, (h, w) = size; only `part` is needed."""
        pixels = self.conditioning_tiles(conditioning)
        return autoencoder.encode(self.networks.vae, pixels, size, self.budget, self.progress, part, share)

    def denoise(
        self, denoiser: Denoiser, posterior: autoencoder.Posterior
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """The input's latents -> clean latents [N, C, h, w], spread [h, w], steering metrics.

        The chosen particle is the first. Where no tile was needed the latents are those of the input.
        """
        settings, factor, (start, update) = self.settings, self.factor, self.start(posterior)
        steps = sampling.schedule(self.networks.scheduler, self.steps)
        per_step = denoiser.needed or [denoiser.tiles] * len(steps)
        self.progress.start("denoise", max(1, len(start) * sum(map(len, per_step))))
        if not settings.steered:
            z = sampling.sample(denoiser, start, steps, update)
            return torch.where(covered(per_step[-1], z), z, posterior.mean()), None, {}
        area = (-(-self.size[1] // factor), -(-self.size[0] // factor))
        method = steering.Steering(bandwidth=settings.bandwidth)
        ensemble = steering.Ensemble(method, len(steps), len(start), area)
        particles = sampling.sample(denoiser, start, steps, update, ensemble)
        chosen, metrics = ensemble.winner(particles)
        if not metrics["effective"]:
            log.warning("steering had no effect: it moved the particles by less than 1 % of their spread")
        others = [z for index, z in enumerate(particles.split(1)) if index != metrics["chosen"]]
        return torch.cat([chosen, *others]), ensemble.uncertainty, {"kds": metrics}

    def denoiser(
        self, conditioning: Tensor, text_tokens: Tensor, image_tokens: Tensor, z_size: tuple[int, int]
    ) -> Denoiser:
        """The denoiser of this image, for latents of (h, w) = z_size."""
        side, share = self.settings.latent_tiled_size, None
        assert side is not None
        tiles, weight = layout(*z_size, side, self.settings.latent_tiled_overlap, self.networks.device)
        if self.pools:
            context = encode_context(text_tokens, image_tokens, self.settings.cfg_scale)
            share = SharedTiles(self.pools, context, self.crops(conditioning), self.progress, self.networks.dtype)
        return Denoiser(
            unet=self.networks.unet,
            controlnet=self.networks.controlnet,
            text=Tokens(text_tokens),
            image=Tokens(image_tokens),
            conditioning=self.conditioning_tiles(conditioning),
            tiles=tiles,
            weight=weight,
            guidance=self.settings.cfg_scale,
            budget=self.budget,
            progress=self.progress,
            graphs=self.graphs,
            finished=self.stages.tiles(),
            share=share,
            needed=needed(
                self.outline.halo,
                self.settings,
                self.steps,
                self.mask,
                tiles,
                self.size,
                conditioning.shape[:2],
                self.scale,
            ),
        )

    def record(self) -> None:
        """Records graphs of the conditioning embedding and of the denoiser at every batch size that fits, on zeros."""
        tags, image_tokens = self.tag()
        (_, text_tokens), device, side = self.encode_text(tags), self.networks.device, self.sides[0]
        conditioning = torch.zeros(side * self.factor, side * self.factor, 3, dtype=torch.uint8, device=device)
        denoiser = self.denoiser(conditioning, text_tokens, image_tokens, (side, side))
        features = denoiser.conditioning_features(denoiser.tiles[0])
        for size in BATCHES:
            if size <= self.budget.batch.amount:
                z = torch.zeros(size, self.networks.unet.config["in_channels"], side, side, device=device)
                t = torch.full((size,), sampling.START, device=device)
                denoiser.predict(z, t, features.repeat(size, 1, 1, 1))

    def conditioning_tiles(self, conditioning: Tensor) -> Callable[[Tile], Tensor]:
        """The bicubic upscale by tiles: a tile in latent pixels -> [1, 3, f*h, f*w] in [0, 1]."""
        crop = self.crops(conditioning)
        return lambda tile: to_floats(crop(tile))

    def crops(self, conditioning: Tensor) -> Callable[[Tile], Tensor]:
        """A tile in latent pixels -> its pixels of the bicubic upscale, [f*h, f*w, 3] integers."""
        planes = conditioning.permute(2, 0, 1)
        return lambda tile: tile.scaled(self.factor).crop(planes).permute(1, 2, 0)

    def decode(self, z: Tensor, share: SharedTiles | None = None) -> Tensor:
        """Clean latents [1, C, h, w] -> [3, H', W'], of which only the region is needed."""
        return autoencoder.decode(self.networks.vae, z, self.factor, self.budget, self.progress, self.part, share)

    def compare(self, restored: Tensor, z: Tensor, share: SharedTiles | None = None) -> Tensor:
        """The chosen particle's image [3, H', W'] and the latents of all [N, C, h, w] -> their spread [H', W']."""
        others = (self.decode(each, share) for each in z[1:].split(1))
        return confidence.spread(itertools.chain([restored], others))

    def finish(
        self, restored: Tensor, conditioning: Tensor, bicubic: Pixels, spread: Tensor | None
    ) -> tuple[ImageData, dict[str, float]]:
        """[3, H', W'] -> the image in exact size, colors and depth, with metadata; measures of the added detail.

        Args:
            restored: from `decode`.
            conditioning, bicubic: from `enlarge`.
            spread: of the particles [h, w]; None: there are none.

        Raises:
            RuntimeError: values are not finite, or the decoder produced no image.
        """

        def content(top: int, bottom: int) -> Tensor:
            return restored[None, :, top:bottom]

        def style(top: int, bottom: int) -> Tensor:
            return to_floats(conditioning[top:bottom])

        settings, mask = self.settings, self.mask
        generated = settings.fidelity < 1 and (mask is None or bool(mask.any()))
        if generated:
            self.check_decoded(content, style)
        strips = color.match_by_strips(content, style, len(conditioning), settings.color_fix)
        rgb = postprocess.to_integers(strips, self.size, self.source.rgb.dtype)
        masks = [m for m in (mask, postprocess.textured(self.source.visible, self.scale)) if m is not None]
        if settings.fidelity > 0 or masks:
            share = postprocess.at_every_pixel(settings.fidelity, spread, self.factor, self.size)
            rgb = postprocess.blend_bicubic(rgb, bicubic, share, masks, self.scale / 2)
        if self.source.colorless:
            rgb = to_grey(rgb)
        precision = chosen_precision(self.networks.device, self.networks.dtype)
        provenance = record(settings, self.networks.bundle, mask, self.calibration, precision)
        image = self.source.with_pixels(rgb, provenance, settings.keep_exif, generated)
        if settings.dpi is not None:
            image = image.with_dpi(settings.dpi)
        if settings.rectangle is not None:
            return image.cropped(*settings.rectangle), {}
        return image, postprocess.trust(rgb, bicubic, self.source.visible)

    def check_decoded(self, content: color.Rows, style: color.Rows) -> None:
        """Rejects output without an image, see `postprocess.check_decoded`; only the decoded part is checked."""
        if self.part is None:
            return postprocess.check_decoded(content, style, self.size)
        (width, height), part = self.size, self.part.scaled(self.factor)
        bottom, right = min(part.bottom, height), min(part.right, width)

        def inside(rows: color.Rows) -> color.Rows:
            return lambda first, last: rows(part.top + first, part.top + last)[..., part.left : right]

        return postprocess.check_decoded(inside(content), inside(style), (right - part.left, bottom - part.top))
