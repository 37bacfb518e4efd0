"""Runs our pipeline with the recorded noise of the reference, and compares both pipelines.

Where the reference tiles, its own tiles and weights stand in for ours (docs/decisions/0002); all else is the product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lab.parity import reference
from lab.parity.case import Case
from seesr import Progress, Settings
from seesr.images.image_data import ImageData
from seesr.networks import models, weights
from seesr.networks.text_encoder import ClipTokenizer
from seesr.pipeline import prompt, sampling
from seesr.pipeline.pipeline import UpscaleRun
from seesr.pipeline.tagging import to_floats
from seesr.runtime.shared_tiles import SharedTiles
from seesr.runtime.tiling import Tile
from seesr.vae.autoencoder import Posterior

OFFERED = {"conditioning_scale": 1.0, "start_point": "lr"}  # options of the reference that have one value here


class Refused(ValueError):
    """A recorded case with an option that the product does not offer. The message names it."""


def refuse(options: dict[str, Any]) -> None:
    """Raises Refused for an option that the product does not offer."""
    for name, only in OFFERED.items():
        if options.get(name, only) != only:
            raise Refused(f"{name} {options[name]!r} is not offered: the product always uses {only!r}")


class Recorded(UpscaleRun):
    """One image, already enlarged, on its way with the noise of a recorded case."""

    def __init__(self, case: Case) -> None:
        refuse(case.options)
        missing: Any = None  # the pipeline starts at the upscaled image: no tagger
        prompted = case.options.get("prompt") is not None
        networks = models.Models(
            bundle=weights.Bundle(case.bundle, "recorded", "test", "none", {}),
            unet=case.unet(),
            controlnet=case.controlnet(),
            vae=case.vae(),
            text_encoder=case.text_encoder() if prompted else missing,
            tokenizer=ClipTokenizer(case.bundle / "tokenizer") if prompted else missing,
            scheduler=models.scheduler(case.bundle / "scheduler"),
            tagger=missing,
            device=case.device,
            dtype=case.dtype,
        )
        options, image = case.options, case.inputs["image"].cpu()
        if image.dtype != torch.uint8:  # [1, 3, H, W] in [0, 1]; a Pillow image is stored as [H, W, 3]
            image = (image[0].permute(1, 2, 0) * 255).round().byte()
        pixels = image.reshape(image.shape[-3:]).numpy()
        settings = Settings(
            scale_factor=1,
            num_inference_steps=options["steps"],
            cfg_scale=options["guidance_scale"],
            latent_tiled_size=options["latent_tile"] or 256,
            latent_tiled_overlap=options["latent_overlap"] or 0,
            seed=0,
        )
        super().__init__(networks, settings, ImageData(pixels), Progress())
        self.case = case
        self.reached: dict[str, Tensor] = {}

    def start(self, posterior: Posterior) -> tuple[Tensor, sampling.Update]:
        start, update = super().start(posterior)

        def followed(z: Tensor, x0: Tensor, step: sampling.Step) -> Tensor:
            z = update(z, x0, step)
            self.reached[f"latents_after_step{sum(name.startswith('latents') for name in self.reached)}"] = z
            return z

        return start, followed

    def noise(self, shape: tuple[int, ...]) -> list[Iterator[Tensor]]:
        """In the order in which the reference drew it: for the start, the posterior, every step."""
        i = self.case.inputs
        steps = [i[f"noise.step{n}"] for n in range(self.settings.num_inference_steps)]
        return [iter([i["noise.init0"], i["noise.vae0"][:1], *steps])]

    def encode(
        self, conditioning: Tensor, size: tuple[int, int], part: Tile | None = None, share: SharedTiles | None = None
    ) -> Posterior:
        tile, vae = self.case.options["vae_encoder_tile"], self.networks.vae
        if tile is None:
            return super().encode(conditioning, size, part)
        x = (2 * to_floats(conditioning) - 1).to(vae.dtype)
        mean, log_variance = vae.quant_conv(reference.tiled_encoder(vae.encoder, x, tile)).float().chunk(2, dim=1)  # pyright: ignore[reportCallIssue]
        return Posterior(mean, (log_variance.clamp(-30, 20) / 2).exp(), vae.config["scaling_factor"])

    def decode(self, z: Tensor, share: SharedTiles | None = None) -> Tensor:
        tile, vae = self.case.options["vae_decoder_tile"], self.networks.vae
        if tile is None:
            return super().decode(z)
        z = vae.post_quant_conv((z / vae.config["scaling_factor"]).to(vae.dtype))  # pyright: ignore[reportCallIssue]
        return (reference.tiled_decoder(vae.decoder, z, tile).float() / 2 + 0.5)[0]

    def text_tokens(self) -> dict[str, Tensor]:
        """The prompts of the case through the text encoder; empty where the case has the tokens as inputs."""
        networks, options = self.networks, self.case.options
        if options.get("prompt") is None:
            return {}
        prompts = [options["negative_prompt"] or "", options["prompt"]]
        negative, positive = prompt.encode(networks.text_encoder, networks.tokenizer, prompts, self.budget).chunk(2)
        return {"negative_prompt_embeds": negative, "prompt_embeds": positive}

    def contexts(self) -> tuple[Tensor, Tensor]:
        """Text tokens, (negative, positive) with guidance, and image tokens."""
        i, dtype = self.case.inputs | self.text_tokens(), self.networks.dtype
        names = ["negative_prompt_embeds", "prompt_embeds"] if self.settings.cfg_scale > 1 else ["prompt_embeds"]
        return torch.cat([i[name] for name in names]).to(dtype), i["ram_encoder_hidden_states"].to(dtype)


def pipeline_case(case: Case) -> Callable[[str, Any], Tensor]:
    """Runs the pipeline once; returns its outputs under the names of the recorded ones."""
    run = Recorded(case)
    reached = run.reached

    def keep_first(module: Any, values: Any, result: Tensor) -> None:
        reached.setdefault("first_noise_pred", result)

    run.networks.unet.register_forward_hook(keep_first)
    conditioning = torch.from_numpy(run.source.rgb).to(case.device)
    size = conditioning.shape[0] // run.factor, conditioning.shape[1] // run.factor
    denoiser = run.denoiser(conditioning, *run.contexts(), size)
    posterior = run.encode(conditioning, size)
    tile = case.options["latent_tile"]
    if tile:
        tiles = reference.latent_tiles(*size, tile, case.options["latent_overlap"])
        weight = reference.gaussian_window(tiles[0].bottom - tiles[0].top, tiles[0].right - tiles[0].left)
        denoiser = dataclasses.replace(denoiser, tiles=tiles, weight=weight.float().to(case.device))

    reached["latents"], _, _ = run.denoise(denoiser, posterior)
    image = run.decode(reached["latents"])[None].clamp(0, 1)
    pillow = case.outputs["image"].dtype == torch.uint8  # [H, W, 3], rounded as diffusers does
    reached["image"] = (image[0].permute(1, 2, 0) * 255).round().byte() if pillow else image
    reached |= run.text_tokens()
    return lambda name, call: reached[name]
