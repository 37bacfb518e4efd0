"""Shares the tile batches of the denoiser with helpers: the side of the process that has the image, and the helper's.

See docs/decisions/0037-one-image-on-many-workers.md.
"""

from __future__ import annotations

import collections
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

import safetensors.torch
import torch
from torch import Tensor

from seesr.networks.attention import Tokens
from seesr.networks.graphs import Graphs
from seesr.networks.models import Models
from seesr.pipeline.denoiser import Denoiser
from seesr.pipeline.tagging import to_floats
from seesr.runtime.progress import Progress
from seesr.runtime.tile_batches import TileBatches, TilePool
from seesr.runtime.tiling import Place, Tile

OVERDUE = 3.0  # times its own longest batch after which a process computes one that a helper has not returned
LOOK = 0.1  # seconds between two calls of the watchers while helpers are waited for
IMAGES = 2  # whose context a helper keeps


class SharedTiles:
    """Computes the batches of every step of one image together with helpers.

    Args:
        context: from `encode_context`.
        pixels: takes a tile in latent pixels, returns the bicubic upscale under it, [f*h, f*w, 3] integers.
        progress: its watchers are called while helpers are waited for.

    Attributes:
        tiles: number of tiles that helpers have computed, of all steps.
    """

    def __init__(
        self, pools: Sequence[TilePool], context: bytes, pixels: Callable[[Tile], Tensor], progress: Progress
    ) -> None:
        self.pools, self.context, self.pixels, self.progress = pools, context, pixels, progress
        self.image, self.tiles = secrets.token_hex(16), 0
        self.batches: TileBatches | None = None

    def __call__(
        self, run: Callable[[list[Place]], Tensor], groups: list[list[Place]], z: Tensor, t: int
    ) -> Iterator[Tensor]:
        """The same as map(run, groups), in the same order.

        Args:
            run: computes one batch in this process.
            groups: the batches.
            z: latents [N, C, H, W].
            t: timestep.
        """
        batches = self.batches = TileBatches(
            self.image, self.context, len(groups), lambda number: self.task(groups[number], z, t)
        )
        longest = 0.0

        def compute(number: int) -> None:
            nonlocal longest
            started = time.monotonic()
            result = run(groups[number])
            if z.is_cuda:  # else the host would take all batches at once
                torch.cuda.current_stream().synchronize()
            longest = max(longest, time.monotonic() - started)
            batches.put(number, result)

        own = batches.take()  # before the helpers, so that `longest` is known
        if len(groups) > 1:
            for pool in self.pools:
                pool.begin(batches)
        for number, group in enumerate(groups):
            while (result := batches.pop(number)) is None:
                if own is None:
                    own = batches.take()
                if own is None:
                    own = batches.take_overdue(OVERDUE * longest)
                if own is not None:
                    compute(own)
                    own = None
                elif (result := batches.pop(number, LOOK)) is not None:
                    break
                else:
                    self.progress.tell()
            if isinstance(result, bytes):
                self.tiles += len(group)
                result = safetensors.torch.load(result)["prediction"].to(z.device)
            yield result

    def stop(self) -> None:
        """Ends the running step, where one runs: helpers take nothing more."""
        if self.batches is not None:
            self.batches.close()
            self.batches = None

    def task(self, places: list[Place], z: Tensor, t: int) -> bytes:
        """What a helper needs for a batch."""
        values = {
            "z": torch.stack([tile.crop(z[n]) for n, tile in places]),
            "pixels": torch.stack([self.pixels(tile) for _, tile in places]),
            "tiles": torch.tensor([list(tile) for _, tile in places]),
            "t": torch.tensor(t),
        }
        return encoded(values)


def encoded(values: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.cpu().contiguous() for name, value in values.items()})


def encode_context(text: Tensor, image: Tensor, guidance: float) -> bytes:
    """What a helper needs of an image once: text tokens [B, n, width], image tokens [1, n, width], guidance scale."""
    return encoded({"text": text, "image": image, "guidance": torch.tensor(guidance, dtype=torch.float64)})


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

    def __call__(self, image: str, task: bytes) -> bytes:
        """The prediction of a batch.

        Raises:
            KeyError: the context of the image is not known.
        """
        denoiser, values = self.denoisers[image], safetensors.torch.load(task)
        self.denoisers.move_to_end(image)
        z, tiles = values["z"].to(self.networks.device), [Tile(*tile) for tile in values["tiles"].tolist()]
        self.pixels = dict(zip(tiles, values["pixels"], strict=True))
        t = torch.full((len(z),), int(values["t"]), device=z.device)
        features = torch.cat([denoiser.conditioning_features(tile) for tile in tiles])
        return encoded({"prediction": denoiser.predict(z, t, features)})
