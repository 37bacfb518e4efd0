"""Shares the tiles of one image with helpers: the side of the process that has the image.

`seesr.pipeline.tile_helper` is the other side. See docs/decisions/0037-one-image-on-many-workers.md.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn

from seesr.runtime.blending import Run
from seesr.runtime.progress import Progress
from seesr.runtime.tile_batches import TileBatches, TilePool
from seesr.runtime.tiling import Place, Tile

OVERDUE = 3.0  # times its own longest batch after which a process computes one that a helper has not returned
POLL = 0.1  # seconds between two calls of the watchers while helpers are waited for


class SharedTiles:
    """Computes the tiles of one image together with helpers: of the denoiser's steps, and of a local autoencoder.

    Args:
        context: from `encode_context`.
        pixels: takes a tile in latent pixels, returns the bicubic upscale under it, [f*h, f*w, 3] integers.
        progress: its watchers are called while helpers are waited for.
        dtype: of the networks before a retry in float32.

    Attributes:
        tiles: number of tiles that helpers have computed, of all steps.
    """

    def __init__(
        self,
        pools: Sequence[TilePool],
        context: bytes,
        pixels: Callable[[Tile], Tensor],
        progress: Progress,
        dtype: torch.dtype,
    ) -> None:
        self.pools, self.context, self.pixels, self.progress = pools, context, pixels, progress
        self.dtype = dtype
        self.image, self.tiles = secrets.token_hex(16), 0
        self.batches: TileBatches | None = None

    def __call__(self, run: Run, groups: list[list[Place]], z: Tensor, t: int) -> Iterator[Tensor]:
        """The same as map(run, groups), in the same order.

        Args:
            run: computes one batch in this process.
            groups: the batches.
            z: latents [N, C, H, W].
            t: timestep.
        """
        tasks = [functools.partial(self.task, group, z, t) for group in groups]
        results = self.share([functools.partial(run, group) for group in groups], tasks, z.device)
        for group, (result, helped) in zip(groups, results, strict=True):
            self.tiles += len(group) if helped else 0
            yield result

    def parts(
        self,
        name: str,
        network: nn.Module,
        run: Callable[[Tile], Tensor],
        source: Callable[[Tile], Tensor],
        tiles: list[Tile],
        inner: list[Tile],
    ) -> Iterator[Tensor]:
        """Tiles of half an autoencoder without global layers, in their order: run(tile) under `inner`.

        Args:
            name: "encode" or "decode".
            network: that half.
            run: computes network(source(tile)) in this process.
            inner: for every tile the part of it that is needed, in latent pixels from its corner.
        """

        def compute(number: int) -> Tensor:
            tile = tiles[number]
            return cropped(run(tile), tile.right - tile.left, inner[number])

        def task(number: int) -> bytes:
            tile, part = tiles[number], inner[number]
            return encoded({name: source(tile), "inner": torch.tensor([tile.right - tile.left, *part])})

        device, dtype = next(network.parameters()).device, next(network.parameters()).dtype
        if dtype != self.dtype:  # it was cast up
            return map(compute, range(len(tiles)))
        numbers = range(len(tiles))
        runs, tasks = [functools.partial(compute, n) for n in numbers], [functools.partial(task, n) for n in numbers]
        return (result for result, _ in self.share(runs, tasks, device))

    def share(
        self, runs: Sequence[Callable[[], Tensor]], tasks: Sequence[Callable[[], bytes]], device: torch.device
    ) -> Iterator[tuple[Tensor, bool]]:
        """The results of all batches in their order, and whether a helper has computed each.

        Args:
            runs: compute the batches in this process.
            tasks: encode them for a helper.
        """
        batches = self.batches = TileBatches(self.image, self.context, len(runs), lambda number: tasks[number]())
        longest = 0.0

        def compute(number: int) -> None:
            nonlocal longest
            started = time.monotonic()
            result = runs[number]()
            if device.type == "cuda":  # else the host would take all batches at once
                torch.cuda.current_stream().synchronize()
            longest = max(longest, time.monotonic() - started)
            batches.put(number, result)

        number_taken = batches.take()  # before the helpers, so that `longest` is known
        if len(runs) > 1:
            for pool in self.pools:
                pool.begin(batches)
        for number in range(len(runs)):
            while (result := batches.pop(number)) is None:
                if number_taken is None:
                    number_taken = batches.take()
                if number_taken is None:
                    number_taken = batches.take_overdue(OVERDUE * longest)
                if number_taken is not None:
                    compute(number_taken)
                    number_taken = None
                elif (result := batches.pop(number, POLL)) is not None:
                    break
                else:
                    self.progress.notify()
            if isinstance(result, bytes):
                yield safetensors.torch.load(result)["result"].to(device), True
            else:
                yield result, False

    def stop(self) -> None:
        """Ends what is shared now: helpers take nothing more."""
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


def cropped(values: Tensor, width: int, inner: Tile) -> Tensor:
    """Values of a tile that is `width` latent pixels wide, under `inner`."""
    return inner.scaled(values.shape[3] // width).crop(values)


def encoded(values: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: value.cpu().contiguous() for name, value in values.items()})


def encode_context(text: Tensor, image: Tensor, guidance: float) -> bytes:
    """What a helper needs of an image once: text tokens [B, n, width], image tokens [1, n, width], guidance scale."""
    return encoded({"text": text, "image": image, "guidance": torch.tensor(guidance, dtype=torch.float64)})
