"""Our networks equal diffusers', transformers' and timm's classes on the same weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import stock
import tiny
import torch
import transformers
from timm.models.swin_transformer import SwinTransformer as StockSwin
from torch import nn

from seesr.networks import blocks, models, tagger, weights
from seesr.networks.autoencoders import AutoencoderKL, AutoencoderTiny
from seesr.networks.schedule import NoiseSchedule
from seesr.networks.swin import SwinTransformer
from seesr.networks.text_encoder import ClipTokenizer, TextEncoder
from seesr.networks.unet import ControlNetModel, UNet2DConditionModel
from seesr.networks.weights import WeightsError

THREE = {  # uneven counts, one number of heads, three resolutions
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "norm_eps": 1e-4,
    "attention_head_dim": 4,
    "cross_attention_dim": 12,
    "use_linear_projection": True,
    "image_cross_attention_dim": 20,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"), "sample_size": 16}
KL = {**tiny.KL, "block_out_channels": (16, 32), "layers_per_block": 2}
KL |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def randomised(network: nn.Module) -> nn.Module:
    """Other weights than those of the start, some of which are zero or one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return network.eval()


def same(ours: nn.Module, theirs: nn.Module) -> tuple[Any, Any]:
    """Both with the same weights, whose names and shapes must agree."""
    randomised(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs


@pytest.mark.parametrize("size", [(16, 16), (12, 8), (10, 14)], ids=str)
@pytest.mark.parametrize("config", [{**tiny.UNET}, {**THREE, **UP}], ids=["two", "three"])
@torch.no_grad()
def test_unet_and_controlnet(config: dict[str, Any], size: tuple[int, int]) -> None:
    unet, their_unet = same(
        UNet2DConditionModel(**config), stock.diffusion_network(diffusers.UNet2DConditionModel, config)
    )
    side = {key: value for key, value in config.items() if key not in ("sample_size", "up_block_types")}
    side["conditioning_embedding_out_channels"] = (8, 16, 16, 16)
    controlnet, their_controlnet = same(
        ControlNetModel(**side), stock.diffusion_network(diffusers.ControlNetModel, side)
    )
    x, conditioning = torch.randn(2, 4, *size), torch.rand(2, 3, 8 * size[0], 8 * size[1])
    context = torch.randn(2, 7, config["cross_attention_dim"]), torch.randn(2, 5, config["image_cross_attention_dim"])
    times = torch.tensor([999, 249])
    sides, middle = controlnet(x, times, context, conditioning, 0.5)
    their_sides, their_middle = their_controlnet(x, times, context, conditioning, 0.5, return_dict=False)
    for ours, theirs in zip([*sides, middle], [*their_sides, their_middle], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    expected = their_unet(
        x, times, context,
        down_block_additional_residuals=their_sides, mid_block_additional_residual=their_middle, return_dict=False,
    )[0]  # fmt: skip
    torch.testing.assert_close(unet(x, times, context, sides, middle), expected, atol=1e-5, rtol=1e-5)
    expected = their_unet(x, 999, context, return_dict=False)[0]
    torch.testing.assert_close(unet(x, 999, context), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_autoencoders() -> None:
    ours, theirs = same(AutoencoderKL(**KL), diffusers.AutoencoderKL(**KL))
    x, z = torch.randn(2, 3, 24, 16), torch.randn(2, 4, 6, 5)
    torch.testing.assert_close(ours.encoder(x), theirs.encoder(x))
    torch.testing.assert_close(ours.decoder(z), theirs.decoder(z))
    config = models.read_config(weights.POCKET / "vae")
    config = {key: value for key, value in config.items() if key != "block_out_channels"}
    ours, theirs = same(AutoencoderTiny(**config), diffusers.AutoencoderTiny(**config))
    assert ours.config["block_out_channels"] == theirs.config["block_out_channels"]
    z = torch.randn(2, config["latent_channels"], 6, 5)
    assert torch.equal(ours.encoder(x), theirs.encoder(x)) and torch.equal(ours.decoder(z), theirs.decoder(z))


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_text_encoder(activation: str) -> None:
    config = {**tiny.TEXT, "hidden_act": activation}
    ours, theirs = same(TextEncoder(**config), transformers.CLIPTextModel(transformers.CLIPTextConfig(**config)))
    ids = torch.randint(0, 1000, (2, 77))
    torch.testing.assert_close(ours.hidden(ids), theirs(ids).last_hidden_state)


WORDS = [
    "a cat, clean, high-resolution, 8k", "", "  Two\n  dogs\t!", "it's, we'll and THEY'VE", "naïve café Ünïcödé ﬁ",
    "日本語のテキスト", "👩‍👩‍👧 emoji 🐈", "x<|endoftext|>y", "3.14159, 1000000", "!!! ?! #$%", "a" * 300, "dark " * 90,
    "e\u0301 e\u0301", "\u00a0no-break\u2003spaces", "it''s 'till 'em", "\u0130stanbul", "\ufffd\u200b",
]  # fmt: skip


def test_tokenizer(rng: np.random.Generator) -> None:
    folder = weights.POCKET / "tokenizer"
    ours, theirs = ClipTokenizer(folder), transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    assert ours.model_max_length == theirs.model_max_length == 77
    alphabet = list("abcdefghijklmnopqrstuvwxyz,.!?'-0123456789 ÄÖéñß\u4e2d\U0001f408")
    drawn = ["".join(rng.choice(alphabet, rng.integers(1, 60))) for _ in range(200)]
    for text in WORDS + drawn:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids[1:-1]) == theirs.decode(ids[1:-1]), text
    options: Any = {"padding": "max_length", "truncation": True, "max_length": 77, "return_tensors": "pt"}
    assert torch.equal(ours.encode_batch(WORDS), theirs(WORDS, **options)["input_ids"])


@pytest.mark.parametrize(
    ("image_size", "swin"),
    [
        (96, tiny.TAGGER["swin"]),
        (112, {"patch_size": 8, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 6}),
        (192, models.read_config(weights.POCKET / "tagger")["swin"]),
    ],
)
@torch.no_grad()
def test_swin(image_size: int, swin: dict[str, Any]) -> None:
    theirs = StockSwin(img_size=image_size, num_classes=0, drop_path_rate=0.0, **swin)
    ours, theirs = same(SwinTransformer(image_size, **swin), theirs)
    pixels = torch.randn(2, 3, image_size, image_size)
    assert torch.equal(ours.forward_features(pixels), theirs.forward_features(pixels))
    assert ours.num_features == theirs.num_features


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_schedule(kind: str) -> None:
    config = {"beta_schedule": kind, "beta_start": 0.00085, "beta_end": 0.012}
    ours = NoiseSchedule(config)
    theirs = diffusers.DDPMScheduler.from_config(config, timestep_spacing="trailing")
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)  # pyright: ignore[reportAttributeAccessIssue]
    for steps in range(1, 9):
        theirs.set_timesteps(steps)  # pyright: ignore[reportAttributeAccessIssue]
        assert ours.timesteps(steps) == theirs.timesteps.tolist()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("build", "config", "message"),
    [
        (
            UNet2DConditionModel,
            {**tiny.UNET, "act_fn": "gelu"},
            "act_fn is 'gelu' in the config of the UNet2D.*: only silu works",
        ),
        (UNet2DConditionModel, {**tiny.UNET, "addition_embed_type": "text"}, "addition_embed_type is 'text'"),
        (AutoencoderKL, {**KL, "shift_factor": 0.1}, "shift_factor is 0.1"),
    ],
)
def test_unsupported_configs_are_refused(build: Any, config: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        build(**config)


def test_the_tokenizer_of_the_public_weights_has_no_other_files(tmp_path: Path) -> None:
    """transformers writes special tokens as objects, or not at all."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((weights.POCKET / "tokenizer" / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"model_max_length": 77, "bos_token": {"content": "<|startoftext|>"}, "pad_token": "!"}'
    )
    assert ClipTokenizer(tmp_path).encode("cat") == ClipTokenizer(weights.POCKET / "tokenizer").encode("cat")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (UNet2DConditionModel, diffusers.UNet2DConditionModel),
        (ControlNetModel, diffusers.ControlNetModel),
        (AutoencoderKL, diffusers.AutoencoderKL),
        (AutoencoderTiny, diffusers.AutoencoderTiny),
    ],
)
def test_keys_that_a_config_leaves_out_have_the_values_of_diffusers(ours: Any, theirs: Any) -> None:
    """`sample_size` is that of Stable Diffusion, and every transformer has linear projections."""
    known = {name: value.default for name, value in inspect.signature(theirs.__init__).parameters.items()}
    keys = (ours.DEFAULTS.keys() | ours.FIXED.keys()) & known.keys() - {"sample_size", "use_linear_projection"}
    assert {key: {**ours.DEFAULTS, **ours.FIXED}[key] for key in keys} == {key: known[key] for key in keys}
    assert ours.FIXED.keys() & known.keys()


def test_networks_of_an_empty_config() -> None:
    with torch.device("meta"):
        pairs = [
            (AutoencoderTiny(), diffusers.AutoencoderTiny()),
            (AutoencoderKL(), diffusers.AutoencoderKL()),
            (TextEncoder(), transformers.CLIPTextModel(transformers.CLIPTextConfig())),
        ]
    for ours, theirs in pairs:
        shapes = [
            {key.removeprefix("text_model."): value.shape for key, value in each.state_dict().items()}
            for each in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]
    assert AutoencoderTiny(latent_channels=4).config["block_out_channels"] == (64, 64, 64, 64)
    config = transformers.CLIPTextConfig()
    assert {key: getattr(config, key) for key in TextEncoder.DEFAULTS} == TextEncoder.DEFAULTS


def test_a_swin_of_few_arguments_is_that_of_timm() -> None:
    swin: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    theirs = StockSwin(img_size=56, num_classes=0, drop_path_rate=0.0, **swin)
    ours, theirs = same(SwinTransformer(56, **swin), theirs)
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        assert torch.equal(ours.forward_features(pixels), theirs.forward_features(pixels))


def test_the_schedule_of_an_empty_config() -> None:
    theirs = diffusers.DDPMScheduler(timestep_spacing="trailing")
    ours = NoiseSchedule({})
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod) and ours.count == 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "squaredcos_cap_v2"}, "the noise schedule squaredcos_cap_v2 is not supported"),
        ({"rescale_betas_zero_snr": True}, "the noise schedule linear is not supported"),
        ({"trained_betas": [0.1]}, "the noise schedule linear is not supported"),
        ({"prediction_type": "sample"}, "networks that predict sample are not supported"),
    ],
)
def test_other_schedules_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        NoiseSchedule(config)


def test_images_are_normalised_as_those_of_imagenet() -> None:
    from timm.data import constants

    assert (tagger.MEAN, tagger.STD) == (constants.IMAGENET_DEFAULT_MEAN, constants.IMAGENET_DEFAULT_STD)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((63, 2, 4, 4), False),
        ((64, 2, 4, 4), True),
        ((1, 2, 2**14, 2**14), False),
        ((1, 2, 2**14, 2**14 + 1), True),
    ],
    ids=str,
)
def test_large_upsampling_is_not_channels_last(
    shape: tuple[int, ...], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch fails there: of 64 images and more, and where the result has more than 2^31 values."""
    seen: list[bool] = []

    def interpolate(x: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(x.is_contiguous())
        return x

    monkeypatch.setattr(torch.nn.functional, "interpolate", interpolate)
    with torch.device("meta"):
        upsample = blocks.Upsample(2)
        x = torch.empty(shape).to(memory_format=torch.channels_last)
    for size in (None, (5, 5)):
        upsample(x, size)
    assert seen == [expected] * 2
