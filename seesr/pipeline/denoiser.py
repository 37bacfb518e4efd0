"""Predicts the noise of the whole latents: ControlNet and UNet over batches of tiles, guidance, blending."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from seesr.networks.attention import Tokens
from seesr.networks.graphs import Graphs
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.pipeline.stages import Tiles
from seesr.runtime.blending import Run, blend, window
from seesr.runtime.memory import Budget
from seesr.runtime.precision import check_finite, retry_in_float32
from seesr.runtime.progress import Progress
from seesr.runtime.shared_tiles import SharedTiles
from seesr.runtime.tiling import Place, Tile, grid

FEATURE_BYTES = 2**28  # of cached conditioning features; more where there is more memory
BATCHES_AHEAD = 1  # batches queued on a GPU behind the running one


@dataclasses.dataclass(frozen=True)
class Forward:
    """One forward pass of a batch of tiles, without memory of any image.

    Args:
        conditioning_scale: weight of the ControlNet's residuals.
    """

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    conditioning_scale: float

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, conditioning: Tensor, text: Tokens, image: Tokens) -> Tensor:
        """Predictions [B, C, h, w], float32; [2B, C, h, w] = (negative, positive) with guidance.

        Args:
            z: latents [B, C, h, w].
            t: timesteps [B].
            conditioning: [B, 3, f*h, f*w] in [0, 1], or its features [B, C', h, w].
        """
        dtype = text.values.dtype
        branches = len(text.values)
        x = z.to(dtype).repeat(branches, 1, 1, 1)
        conditioning = conditioning.to(dtype).repeat(branches, 1, 1, 1)
        time = t.repeat(branches)
        context = (text, image)
        down, mid = self.controlnet(x, time, context, conditioning, self.conditioning_scale)
        return self.unet(x, time, context, down, mid).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
    """UNet and ControlNet with everything that stays the same for all tiles and steps of one image.

    Args:
        text: text tokens, B = 1, or B = 2 = (negative, positive) with guidance.
        image: the tagger's image tokens, B = 1.
        conditioning: takes a tile in latent pixels, returns the bicubic upscale under it, [1, 3, f*h, f*w] in [0, 1].
        tiles: the tiles of the latents, all of one shape.
        weight: blending weight of a tile, [h, w].
        guidance: scale; 1 means off.
        conditioning_scale: weight of the ControlNet's residuals.
        budget: tiles per forward pass, fewer when memory runs out.
        progress: counts finished tiles.
        graphs: records and replays the forward pass; None: it is run.
        needed: for every step the tiles that are denoised; empty: all of them, always.
        finished: tiles of an earlier run of the same job, which are not computed again; None: there are none.
        share: runs the batches together with other processes; None: this process runs them one after the other.
    """

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    text: Tokens
    image: Tokens
    conditioning: Callable[[Tile], Tensor]
    tiles: list[Tile]
    weight: Tensor
    guidance: float = 1.0
    conditioning_scale: float = 1.0
    budget: Budget = dataclasses.field(default_factory=Budget)
    progress: Progress = dataclasses.field(default_factory=Progress)
    graphs: Graphs | None = None
    needed: list[list[Tile]] = dataclasses.field(default_factory=list)
    finished: Tiles | None = None
    share: SharedTiles | None = None
    features: dict[Tile, Tensor] = dataclasses.field(default_factory=dict)

    def __call__(self, z: Tensor, t: int, s: int) -> Tensor:
        """Latents [N, C, H, W] float32 at timestep t, step s -> the network's predictions, the same shape, float32.

        Where no tile is needed they are 0.
        """
        before, tiles = self.progress.position, self.needed[s] if self.needed else self.tiles
        if not tiles:
            return torch.zeros_like(z)

        def run(places: list[Place]) -> Tensor:
            parts = torch.stack([tile.crop(z[n]) for n, tile in places])
            time = torch.full((len(parts),), t, device=parts.device)

            net = self if self.unet.dtype == self.text.values.dtype else self.in_float32
            return net.predict(parts, time, torch.cat([net.conditioning_features(tile) for _, tile in places]))

        def whole() -> Tensor:
            self.progress.position = before  # a second try counts the same tiles
            ahead, batch = Ahead(self.progress, z.device), self.budget.batch.amount
            try:
                prediction = blend(
                    run, tiles, z.shape, batch, self.weight, ahead.launched, functools.partial(self.execute, z, t, s)
                )
            finally:
                if self.share is not None:
                    self.share.stop()
            ahead.wait(0)
            return prediction

        def work() -> Tensor:
            prediction = self.budget.batch.attempt(whole, self.release)
            check_finite(prediction, "denoise")
            return prediction

        return retry_in_float32(work, self.budget, self.unet, self.controlnet)

    def execute(self, z: Tensor, t: int, s: int, run: Run, groups: list[list[Place]]) -> Iterator[Tensor]:
        """The results of a step's batches, in their order: of an earlier run of the job where it has all of a batch.

        A run of some tiles leaves them to later runs. Networks that were cast up are those of this process alone.
        """
        known = [self.known(s, group) for group in groups]
        new = [group for group, predictions in zip(groups, known, strict=True) if predictions is None]
        share = self.share if self.unet.dtype == self.text.values.dtype else None
        computed = map(run, new) if share is None else share(run, new, z, t)
        for group, predictions in zip(groups, known, strict=True):
            if predictions is not None:
                yield torch.stack(predictions)
                continue
            result = next(computed)
            if self.finished is not None and self.needed:
                for (_, tile), prediction in zip(group, result, strict=True):
                    self.finished.put(s, tile, prediction)
            yield result

    def known(self, s: int, group: list[Place]) -> list[Tensor] | None:
        """The predictions of a batch that an earlier run of the job has left; None: not all of them are there."""
        if self.finished is None:
            return None
        cached = [self.finished.get(s, tile) for _, tile in group]
        predictions = [prediction for prediction in cached if prediction is not None]
        if len(predictions) < len(group):
            return None
        self.finished.reused += len(group)
        return predictions

    def release(self) -> None:
        self.features.clear()

    @functools.cached_property
    def in_float32(self) -> Denoiser:
        """The same for networks that were cast up."""
        self.release()
        text, image = Tokens(self.text.values.float()), Tokens(self.image.values.float())
        return dataclasses.replace(self, text=text, image=image, features={}, graphs=None)

    @torch.no_grad()
    def conditioning_features(self, tile: Tile) -> Tensor:
        """The ControlNet's embedding of the conditioning image at a tile, [1, C, h, w]; cached while there is room."""
        if tile in self.features:
            return self.features[tile]
        embed, networks = self.controlnet.controlnet_cond_embedding, (self.controlnet,)
        inputs = (self.conditioning(tile).to(self.text.values.dtype),)
        features = embed(*inputs) if self.graphs is None else self.graphs.run(embed, inputs, networks=networks)
        if len(self.features) * features.nbytes < max(FEATURE_BYTES, self.budget.hold.amount // 8):
            self.features[tile] = features
        return features

    def predict(self, z: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """Predictions of tiles, see Forward, guided; replayed as a graph where there are graphs."""
        forward = Forward(self.unet, self.controlnet, self.conditioning_scale)
        inputs, contexts = (z, t, conditioning), (self.text, self.image)
        if self.graphs is None:
            prediction = forward(*inputs, *contexts)
        else:
            prediction = self.graphs.run(forward, inputs, contexts, (self.unet, self.controlnet))
        if len(self.text.values) == 1:
            return prediction
        negative, positive = prediction.chunk(2)
        return negative + self.guidance * (positive - negative)


class Ahead:
    """Keeps the host near a GPU: counts tiles when they are finished, so that a cancellation waits for two batches."""

    def __init__(self, progress: Progress, device: torch.device) -> None:
        self.progress, self.device = progress, device
        self.batches: collections.deque[tuple[torch.cuda.Event, int]] = collections.deque()

    def launched(self, count: int) -> None:
        """A batch of `count` tiles was sent to the device."""
        if self.device.type != "cuda":
            self.progress.advance(count)
            return
        event = torch.cuda.Event()
        event.record()
        self.batches.append((event, count))
        self.wait(BATCHES_AHEAD)

    def wait(self, limit: int) -> None:
        """Until at most `limit` batches are unfinished."""
        while len(self.batches) > limit:
            event, count = self.batches.popleft()
            event.synchronize()
            self.progress.advance(count)


def layout(height: int, width: int, tile: int, overlap: int, device: torch.device) -> tuple[list[Tile], Tensor]:
    """Tiles of latents [height, width] and the blending weight of one, on `device`."""
    tiles = grid(height, width, tile, overlap)
    first = tiles[0]
    return tiles, window(first.bottom - first.top, first.right - first.left).to(device)
