"""The denoiser's prediction of whole latents, with networks that return their input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from seesr.networks.attention import Tokens
from seesr.pipeline import denoiser
from seesr.pipeline.denoiser import Ahead, Denoiser, layout
from seesr.runtime.progress import Progress
from seesr.runtime.tiling import Tile


class ControlNet(nn.Module):
    """The features are every eighth conditioning pixel; the residual is their mean times the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.looked: list[Tensor] = []

    def controlnet_cond_embedding(self, conditioning: Tensor) -> Tensor:
        self.looked.append(conditioning)
        return conditioning[..., ::8, ::8] * self.weight

    def forward(self, x: Tensor, t: Tensor, context: object, conditioning: Tensor, scale: float) -> tuple:
        assert len(conditioning) == len(x) == len(t)
        return (), scale * conditioning.mean((1, 2, 3), keepdim=True) * self.weight


class UNet(nn.Module):
    """Predicts latents + text + the ControlNet's residual."""

    dtype = torch.float32

    def forward(self, x: Tensor, t: Tensor, context: tuple[Tokens, Tokens], sides: tuple, middle: Tensor) -> Tensor:
        text = context[0].values.repeat_interleave(len(x) // len(context[0].values), 0)
        return x + text[:, :1, :1, None] + middle


CONDITIONING = torch.arange(128.0 * 128).view(1, 1, 128, 128).expand(1, 3, -1, -1) / 128**2


def build(text: Tensor, side: int = 16, tile: int = 16, **options: float) -> Denoiser:
    tiles, weight = layout(side, side, tile, 0, torch.device("cpu"))
    return Denoiser(
        unet=UNet(), controlnet=ControlNet(), text=Tokens(text), image=Tokens(torch.zeros(1, 5, 24)),
        conditioning=lambda tile: tile.scaled(8).crop(CONDITIONING), tiles=tiles, weight=weight, **options,
    )  # fmt: skip


def test_guidance_and_weight_of_the_controlnet() -> None:
    z, text = torch.zeros(1, 4, 16, 16), torch.tensor([2.0, 5.0])[:, None, None].expand(2, 77, 16)
    residual = float(CONDITIONING[..., ::8, ::8].mean())
    for predict, expected in (
        (build(text[:1]), 2 + residual),
        (build(text), 5 + residual),  # guidance 1 is the positive branch
        (build(text, guidance=2.0), 2 + 2 * 3 + residual),
        (build(text[:1], conditioning_scale=0.5), 2 + residual / 2),
    ):
        prediction = predict(z, 999, 0)
        torch.testing.assert_close(prediction, torch.full_like(z, expected))
        assert not prediction.requires_grad


def test_every_branch_of_a_batch_has_its_own_tile_and_words() -> None:
    text = torch.tensor([2.0, 5.0])[:, None, None].expand(2, 77, 16)
    one = build(text, tile=8, guidance=2.0)
    z = torch.randn(2, 4, 16, 16)
    one.budget.batch.amount = 1
    several = build(text, tile=8, guidance=2.0)
    several.budget.batch.amount = 4
    torch.testing.assert_close(several(z, 999, 0), one(z, 999, 0))


def test_conditioning_features_are_kept_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = build(torch.zeros(1, 77, 16), tile=8)
    size = 3 * 8 * 8 * 4
    monkeypatch.setattr(denoiser, "FEATURE_BYTES", 2 * size)
    for _ in range(2):
        for tile in predict.tiles:
            features = predict.conditioning_features(tile)
            torch.testing.assert_close(features, tile.scaled(8).crop(CONDITIONING)[..., ::8, ::8])
            assert not features.requires_grad
    assert list(predict.features) == predict.tiles[:2]
    assert len(predict.controlnet.looked) == 4 + 2
    predict.release()
    assert not predict.features


def test_tiles_that_no_step_needs_are_not_denoised() -> None:
    predict = build(torch.zeros(1, 77, 16), tile=8)
    first = predict.tiles[0]
    predict.needed.extend([[first], []])
    z = torch.ones(1, 4, 16, 16)
    some, none = predict(z, 999, 0), predict(z, 500, 1)
    assert (first.crop(some) > 0.9).all() and int((some != 0).sum()) == 4 * 8 * 8
    assert not none.any() and predict.progress.position.done == 1


def test_the_weight_of_a_tile_has_its_shape() -> None:
    tiles, weight = layout(20, 40, 16, 4, torch.device("cpu"))
    assert weight.shape == (16, 16) and all(tile.bottom - tile.top == 16 for tile in tiles)
    tiles, weight = layout(8, 40, 16, 4, torch.device("cpu"))
    assert weight.shape == (8, 16) and tiles[0] == Tile(0, 0, 8, 16)


def test_more_features_are_kept_where_there_is_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = build(torch.zeros(1, 77, 16), tile=8)
    size = 3 * 8 * 8 * 4
    monkeypatch.setattr(denoiser, "FEATURE_BYTES", size)
    predict.budget.hold.amount = 8 * 3 * size  # an eighth of it
    for tile in predict.tiles:
        predict.conditioning_features(tile)
    assert list(predict.features) == predict.tiles[:3] and len(predict.tiles) == 4


@pytest.mark.parametrize(("device", "counted"), [("cuda", [0, 4, 9]), ("cpu", [4, 9, 17])])
def test_the_host_is_at_most_a_batch_ahead_of_a_gpu(
    device: str, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a cancellation waits for two batches at most."""
    calls: list[str] = []
    event = type("Event", (), {name: lambda self, name=name: calls.append(name) for name in ("record", "synchronize")})
    monkeypatch.setattr(torch.cuda, "Event", event)
    progress = Progress()
    progress.start("denoise", 17)
    ahead, seen = Ahead(progress, torch.device(device)), []
    for count in (4, 5, 8):
        ahead.launched(count)
        seen.append(progress.position.done)
    assert seen == counted
    ahead.wait(0)
    assert progress.position.done == 17
    assert calls == (["record", *["record", "synchronize"] * 2, "synchronize"] if device == "cuda" else [])
