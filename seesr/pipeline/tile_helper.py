"""Computes tiles of images that other processes have, see `seesr.runtime.shared_tiles`."""

from __future__ import annotations

import collections

import safetensors.torch
import torch
from torch import Tensor

from seesr.networks.attention import Tokens
from seesr.networks.graphs import Graphs
from seesr.networks.models import Models
from seesr.pipeline.denoiser import Denoiser
from seesr.pipeline.tagging import to_floats
from seesr.runtime.shared_tiles import cropped, encoded
from seesr.runtime.tiling import Tile

IMAGES = 2  # whose context a helper keeps


class TileHelper:
    """Computes tile batches of images that other processes have. Not thread-safe.

    Args:
        networks: of the same bundle, on the same kind of device; only UNet and ControlNet are used.
        graphs: those of the networks, if they have any.
    """

    def __init__(self, networks: Models, graphs: Graphs | None = None) -> None:
        self.networks, self.graphs = networks, graphs
        self.denoisers: collections.OrderedDict[str, Denoiser] = collections.OrderedDict()
        self.pixels: dict[Tile, Tensor] = {}  # of the batch that is computed

    def knows(self, image: str) -> bool:
        """Whether the helper has the context of an image."""
        return image in self.denoisers

    def learn(self, image: str, context: bytes) -> None:
        """Takes the context of an image, and drops that of the least recently used one."""
        device, networks = self.networks.device, self.networks
        values = safetensors.torch.load(context)
        self.denoisers[image] = Denoiser(
            unet=networks.unet,
            controlnet=networks.controlnet,
            text=Tokens(values["text"].to(device)),
            image=Tokens(values["image"].to(device)),
            conditioning=lambda tile: to_floats(self.pixels[tile].to(device)),
            tiles=[],
            weight=torch.empty(0),
            guidance=values["guidance"].item(),
            graphs=self.graphs,
        )
        while len(self.denoisers) > IMAGES:
            self.denoisers.popitem(last=False)

    @torch.no_grad()
    def __call__(self, image: str, task: bytes) -> bytes:
        """The result of a batch.

        Raises:
            KeyError: the context of the image is not known.
        """
        values = safetensors.torch.load(task)
        for name, network in (("encode", self.networks.vae.encoder), ("decode", self.networks.vae.decoder)):
            if name in values:
                width, *inner = values["inner"].tolist()
                result = network(values[name].to(self.networks.device))
                return encoded({"result": cropped(result, width, Tile(*inner))})
        denoiser = self.denoisers[image]
        self.denoisers.move_to_end(image)
        z, tiles = values["z"].to(self.networks.device), [Tile(*tile) for tile in values["tiles"].tolist()]
        self.pixels = dict(zip(tiles, values["pixels"], strict=True))
        t = torch.full((len(z),), int(values["t"]), device=z.device)
        features = torch.cat([denoiser.conditioning_features(tile) for tile in tiles])
        return encoded({"result": denoiser.predict(z, t, features)})
