"""The numbers of loaded networks that planning needs."""

from __future__ import annotations

from seesr.networks.models import Models
from seesr.pipeline.work import Outline
from seesr.runtime.memory import Budget
from seesr.vae import autoencoder


def outline_of(networks: Models) -> Outline:
    """The outline of networks on their device, with its present free memory."""
    vae, defaults = networks.vae, networks.bundle.defaults
    local, amount = autoencoder.is_local(vae), Budget.for_device(networks.device, 1).whole.amount
    return Outline(
        factor=networks.factor,
        levels=len(networks.unet.config["block_out_channels"]),
        tile=networks.tile,
        steps=defaults.num_inference_steps,
        sides=tuple(defaults.latent_tiled_size),
        halo=autoencoder.halo(vae) if local else None,
        encoder_side=autoencoder.tiny_side(vae.encoder, amount) if local else 0,
        decoder_side=autoencoder.tiny_side(vae.decoder, amount) if local else 0,
    )
