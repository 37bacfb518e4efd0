"""The VAE in strips and tiles equals one pass over the whole image, also after out-of-memory errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from lab.quality.metrics import psnr
from seesr import Progress, Upscaler
from seesr.networks.autoencoders import AutoencoderKL, AutoencoderTiny
from seesr.runtime import tiling
from seesr.runtime.memory import Budget, OutOfMemory
from seesr.runtime.progress import Position
from seesr.runtime.tiling import Tile
from seesr.vae import autoencoder, global_layers, lockstep_tiles, row_strips

HELD = 2**40
SIZE = (40, 57)  # latent pixels, larger than the tiles of these tests


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "TILE", 32)


def encode(vae: Any, x: Tensor, budget: Budget, noise: Tensor | None = None) -> Tensor:
    """x [1, 3, 8h, 8w] in [0, 1]."""
    size = x.shape[2] // 8, x.shape[3] // 8
    posterior = autoencoder.encode(vae, lambda tile: tile.scaled(8).crop(x), size, budget, Progress())
    return posterior.mean() if noise is None else posterior.sample(noise)


def decode(vae: Any, z: Tensor, budget: Budget) -> Tensor:
    return autoencoder.decode(vae, z, 8, budget, Progress())


def near(a: Tensor, b: Tensor) -> float:
    """PSNR against the range of b, dB."""
    return psnr(a, b, (b.max() - b.min()).item())


@torch.no_grad()
def moments(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents by one pass."""
    mean, log_variance = vae.quant_conv(vae.encoder(2 * x - 1)).chunk(2, dim=1)
    return mean, (log_variance / 2).exp()


def test_one_tile_is_the_library(tiny_upscaler: Upscaler) -> None:
    vae = tiny_upscaler.networks.vae
    z, x = torch.randn(1, 4, 6, 9), torch.rand(1, 3, 48, 40)
    scaling = vae.config["scaling_factor"]
    expected = vae.decoder(vae.post_quant_conv(z / scaling))[0] / 2 + 0.5  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(decode(vae, z, Budget()), expected, atol=2e-5, rtol=1e-5)
    mean, deviation = moments(vae, x)
    torch.testing.assert_close(encode(vae, x, Budget()), mean * scaling, atol=2e-5, rtol=1e-5)
    noise = torch.randn(1, 4, 6, 5)
    expected = (mean + deviation * noise) * scaling
    torch.testing.assert_close(encode(vae, x, Budget(), noise), expected, atol=2e-5, rtol=1e-4)


def test_tiles_are_near_one_pass_over_the_whole(tiny_upscaler: Upscaler, small_tiles: None) -> None:
    """Random weights; docs/decisions/0005 has the distances of the full-size network on photographs."""
    vae = tiny_upscaler.networks.vae
    z = torch.randn(1, 4, *SIZE) * torch.linspace(0.2, 2, SIZE[1]) + torch.linspace(-1, 1, SIZE[0])[:, None]
    whole = vae.decoder(vae.post_quant_conv(z / vae.config["scaling_factor"]))[0] / 2 + 0.5  # pyright: ignore[reportCallIssue]
    assert near(decode(vae, z, Budget(hold=HELD)), whole) > 60
    x = torch.rand(1, 3, 8 * SIZE[0], 8 * SIZE[1]) * torch.linspace(0, 1, 8 * SIZE[1])
    mean = moments(vae, x)[0] * vae.config["scaling_factor"]
    assert near(encode(vae, x, Budget(hold=HELD)), mean) > 60


@pytest.mark.parametrize("strip", [2**12, 2**16, 2**28])
def test_strips_are_one_pass_over_the_whole(
    tiny_upscaler: Upscaler, small_tiles: None, monkeypatch: pytest.MonkeyPatch, strip: int
) -> None:
    monkeypatch.setattr(row_strips, "STRIP", strip)
    vae, scaling = tiny_upscaler.networks.vae, tiny_upscaler.networks.vae.config["scaling_factor"]
    z, x = torch.randn(1, 4, *SIZE), torch.rand(1, 3, 8 * SIZE[0], 8 * SIZE[1])
    whole = vae.decoder(vae.post_quant_conv(z / scaling))[0] / 2 + 0.5  # pyright: ignore[reportCallIssue]
    assert near(decode(vae, z, Budget(whole=HELD)), whole) > 100
    mean = moments(vae, x)[0] * scaling
    assert near(encode(vae, x, Budget(whole=HELD)), mean) > 100
    enough = row_strips.peak(vae.decoder, SIZE, frugal=True)
    assert enough < row_strips.peak(vae.decoder, SIZE)
    assert near(decode(vae, z, Budget(whole=enough)), whole) > 100


@pytest.mark.parametrize("frugal", [False, True])
def test_strips_count_their_layers_and_hold_what_they_say(
    tiny_upscaler: Upscaler, small_tiles: None, frugal: bool
) -> None:
    vae, positions = tiny_upscaler.networks.vae, []
    progress, needed = Progress(positions.append), row_strips.peak(vae.decoder, SIZE, frugal)
    autoencoder.decode(vae, torch.randn(1, 4, *SIZE), 8, Budget(whole=needed), progress)
    assert [position.done for position in positions] == list(range(row_strips.layers(vae.decoder) + 1))
    assert positions[-1].done == positions[-1].total
    needed = row_strips.peak(vae.decoder, SIZE, frugal=True)
    budget = Budget(hold=HELD, whole=needed - 1)
    assert autoencoder.run_whole("decode", vae.decoder, lambda tile: torch.empty(0), SIZE, budget, Progress()) is None


def test_tiles_are_used_when_one_pass_does_not_fit(
    tiny_upscaler: Upscaler, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae, z = tiny_upscaler.networks.vae, torch.randn(1, 4, *SIZE)
    tiled = decode(vae, z, Budget(hold=HELD))

    def no_room(self: Any, *args: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(row_strips.Strips, "resnet", no_room)
    budget = Budget(hold=HELD, whole=HELD)
    assert torch.equal(decode(vae, z, budget), tiled)
    assert budget.retries == 2 and budget.whole.amount == 0  # the frugal pass was tried, too


@pytest.mark.parametrize("method", ["observe", "finish"])
def test_recovers_where_the_statistics_of_the_whole_do_not_fit(
    tiny_upscaler: Upscaler, small_tiles: None, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    vae, z = tiny_upscaler.networks.vae, torch.randn(1, 4, *SIZE)
    undisturbed = decode(vae, z, Budget(hold=HELD))
    original, calls = getattr(global_layers.GlobalNorm, method), []

    def short(self: Any, *args: Any) -> Any:
        calls.append(method)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 132.00 MiB")
        return original(self, *args)

    monkeypatch.setattr(global_layers.GlobalNorm, method, short)
    budget = Budget(hold=HELD)
    assert torch.equal(decode(vae, z, budget), undisturbed)
    assert budget.retries == 1


def test_cached_activations_do_not_change_the_result(tiny_upscaler: Upscaler, small_tiles: None) -> None:
    vae = tiny_upscaler.networks.vae
    z, x = torch.randn(1, 4, *SIZE), torch.rand(1, 3, 8 * SIZE[0], 8 * SIZE[1])
    for hold in (0, 2_000_000):
        assert torch.equal(decode(vae, z, Budget(hold=hold)), decode(vae, z, Budget(hold=HELD)))
        assert torch.equal(encode(vae, x, Budget(hold=hold)), encode(vae, x, Budget(hold=HELD)))


def test_recovers_from_running_out_of_memory(
    tiny_upscaler: Upscaler, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation fails for as long as something is held."""
    vae = tiny_upscaler.networks.vae
    z = torch.randn(1, 4, *SIZE)
    undisturbed = decode(vae, z, Budget(hold=HELD))
    budget = Budget(hold=HELD)
    layer = vae.decoder.up_blocks[2].resnets[0].conv1  # pyright: ignore[reportAttributeAccessIssue]
    failures = []

    def allocate(module: Any, args: Any) -> None:
        if budget.hold.amount > HELD // 2:
            failures.append(module)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = layer.register_forward_pre_hook(allocate)
    try:
        assert torch.equal(decode(vae, z, budget), undisturbed)
    finally:
        hook.remove()
    assert len(failures) == budget.retries == 1
    assert budget.hold.amount == HELD // 2  # half of it, not nothing: what is not held is computed many times


def test_out_of_memory_with_the_smallest_tile_is_an_error(tiny_upscaler: Upscaler) -> None:
    def allocate(module: Any, args: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")

    vae = tiny_upscaler.networks.vae
    hook = vae.decoder.conv_in.register_forward_pre_hook(allocate)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with pytest.raises(OutOfMemory, match="device with more free memory"):
            decode(vae, torch.randn(1, 4, 8, 8), Budget(hold=1))
    finally:
        hook.remove()


def test_attention_samples_evenly_spread_latent_pixels_of_a_large_image(
    tiny_upscaler: Upscaler, small_tiles: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_upscaler.networks.vae
    attention = vae.decoder.mid_block.attentions[0]  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(tiling, "PAIRS", 600 * SIZE[0] * SIZE[1])
    whole = global_layers.GlobalAttention(attention, SIZE)
    assert whole.stride == 2
    latents = torch.randn(1, 16, *SIZE)
    for part in (Tile(0, 0, 13, 57), Tile(13, 0, 40, 20), Tile(13, 20, 40, 57)):
        whole.observe(part.crop(latents), part)
    whole.finish()
    expected = attention.to_k(latents[..., ::2, ::2].flatten(2).transpose(1, 2))  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    assert sorted(whole.keys[0, 0, :, 0].tolist()) == pytest.approx(sorted(expected[0, :, 0].tolist()))


def test_gpu_variants_of_the_global_layers_agree() -> None:
    """Sums of half-precision values, a softmax divided at its end, batch norm for a group norm that is known."""
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(1, 32, 40, 50, generator=generator) * 3 + 5).contiguous(memory_format=torch.channels_last)
    for a, b in zip(global_layers.moments_by_sums(values, 8), global_layers.moments_by_norm(values, 8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    half = global_layers.moments_by_sums(values.half(), 8)
    torch.testing.assert_close(half[0], global_layers.moments_by_norm(values.half(), 8)[0], rtol=1e-4, atol=0)
    q, keys, rows = (3 * torch.randn(1, 1, n, 64, generator=generator) for n in (30, 200, 200))
    expected = torch.nn.functional.scaled_dot_product_attention(q, keys, rows)
    torch.testing.assert_close(global_layers.attend_by_products(q, keys, rows), expected, rtol=1e-4, atol=1e-5)


def test_attention_to_many_equal_latent_pixels_stays_within_half_precision() -> None:
    """A sum of 2^18 values that are all weighted alike: seen not finite on a GPU at 4096 x 4096 pixels."""
    q, keys = torch.zeros(1, 1, 2, 8).half(), torch.zeros(1, 1, 2**18, 8).half()
    values = torch.full((1, 1, 2**18, 8), 1.5).half()
    result = global_layers.attend_by_products(q, keys, values)
    torch.testing.assert_close(result.float(), torch.full((1, 1, 2, 8), 1.5), rtol=2e-3, atol=0)


@pytest.mark.parametrize("amount", [0, 2**40], ids=["tiles of the least side", "larger tiles, then one pass"])
@torch.no_grad()
def test_an_autoencoder_without_global_layers_gives_one_pass_bit_for_bit(
    pocket: Upscaler, monkeypatch: pytest.MonkeyPatch, amount: int
) -> None:
    monkeypatch.setattr(autoencoder, "TILE", 40)
    monkeypatch.setattr(autoencoder, "TILE_TINY", 48)
    vae, factor = pocket.networks.vae, pocket.networks.factor
    for size in ((40, 48), (40, 60)):
        z = torch.randn(1, vae.config["latent_channels"], *size)
        expected = vae.decoder(z / vae.config["scaling_factor"])[0] / 2 + 0.5
        seen: list[Position] = []
        result = autoencoder.decode(vae, z, factor, Budget(whole=amount), Progress(seen.append))
        assert torch.equal(result, expected)
        assert (
            seen[-1].done == seen[-1].total == {(0, 48): 2, (0, 60): 4, (2**40, 48): 1, (2**40, 60): 2}[amount, size[1]]
        )


def test_the_tile_of_a_tiny_autoencoder_grows_with_the_memory(pocket: Upscaler) -> None:
    decoder = pocket.networks.vae.decoder
    sides = [autoencoder.tiny_side(decoder, amount) for amount in (0, 2**27, 2**28, 2**29, 2**40)]
    assert sides == sorted(sides) and sides[0] == autoencoder.TILE and sides[-1] == autoencoder.TILE_TINY


def test_the_memory_of_a_tile_of_a_tiny_autoencoder() -> None:
    """Six activations of 64 channels at eight times the size, in single precision."""
    with torch.device("meta"):
        vae = AutoencoderTiny()
    each = 6 * 64 * 8 * 8 * 4
    for network in (vae.encoder, vae.decoder):
        for side in (100, 255):
            assert autoencoder.tiny_side(network, each * side**2) == side
            assert autoencoder.tiny_side(network, each * side**2 - 1) == side - 1


def test_the_posterior_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logarithm of the variance is limited on both sides."""
    values = torch.cat([torch.randn(1, 4, 2, 2), torch.linspace(-100, 100, 16).view(1, 4, 2, 2)], dim=1)
    monkeypatch.setattr(autoencoder, "run_part", lambda *_: iter([(Tile(0, 0, 2, 2), values)]))
    vae = SimpleNamespace(encoder=None, quant_conv=None, config={"scaling_factor": 0.5})
    posterior = autoencoder.encode(vae, lambda tile: torch.empty(0), (2, 2), Budget(), Progress())
    theirs = DiagonalGaussianDistribution(values)
    torch.testing.assert_close(posterior.centre, theirs.mean)
    torch.testing.assert_close(posterior.deviation, theirs.std)
    noise = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(posterior.sample(noise), 0.5 * (theirs.mean + theirs.std * noise))
    torch.testing.assert_close(posterior.mean(), 0.5 * theirs.mean)


def test_tiles_count_every_layer_at_which_they_wait(tiny_upscaler: Upscaler, small_tiles: None) -> None:
    positions: list[Position] = []
    vae = tiny_upscaler.networks.vae
    autoencoder.decode(vae, torch.randn(1, 4, *SIZE), 8, Budget(hold=HELD), Progress(positions.append))
    tiles = 2 * 3  # of 32 latent pixels, with twice the halo in common
    assert positions[-1].total == tiles * (lockstep_tiles.waits(vae.decoder) + 1)
    assert [position.done for position in positions] == list(range(positions[-1].total + 1))


def test_all_keys_are_seen_up_to_4096_pixels() -> None:
    assert tiling.stride((512, 512)) == 1 and tiling.attention_keys((512, 512)) == 512**2
    assert tiling.stride((512, 520)) == 2 and tiling.attention_keys((513, 521)) == 256 * 260
    assert tiling.stride((1024, 1024)) == 4 and tiling.attention_keys((1024, 1024)) == 256**2


@pytest.mark.parametrize(
    ("channels", "decoder", "frugal", "encoder"),
    [
        ((8, 16), 96, 64, 64),  # the first block of the last level; what the frugal way has there; the first level
        ((2, 16), 80, 32, 34),  # the step to the next level; the level before it; the last level's first block
    ],
)
def test_the_largest_activations_of_a_pass(channels: tuple[int, int], decoder: int, frugal: int, encoder: int) -> None:
    """Channels held at once, in units of latent pixels, by hand: input and output of a block or of a step, and the
    inner activation of a block whose output is larger than its input. Beside them six strips.
    """
    types = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=channels, norm_num_groups=2, **types)
    area, strip = 4 * 30 * 50, row_strips.STRIP  # bytes of one channel of float32
    assert row_strips.peak(vae.decoder, (30, 50)) == decoder * area + 6 * strip
    assert row_strips.peak(vae.decoder, (30, 50), frugal=True) == frugal * area + 3 * strip
    assert row_strips.peak(vae.encoder, (30, 50)) == encoder * area + 6 * strip


@pytest.mark.parametrize("strip", [2**13, 2**15])
@torch.no_grad()
def test_no_strip_has_more_bytes_than_allowed(
    tiny_upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, strip: int
) -> None:
    """Of the wider of input and output, beside one row of each neighbour; at least one row."""
    monkeypatch.setattr(row_strips, "STRIP", strip)
    vae, size = tiny_upscaler.networks.vae, (12, 10)
    heights: dict[nn.Module, list[int]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda module, inputs: heights.setdefault(module, []).append(inputs[0].shape[2])
        )
        for module in vae.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    try:
        row_strips.Strips(vae.encoder, lambda: None).run(torch.rand(1, 3, 8 * size[0], 8 * size[1]))
        row_strips.Strips(vae.decoder, lambda: None).run(torch.rand(1, 4, *size))
    finally:
        for handle in handles:
            handle.remove()
    several = 0
    for module, seen in heights.items():
        assert isinstance(module, nn.Conv2d)
        halved = module.stride == (2, 2)
        scales = []
        for scale in (1, 2, 4, 8):  # the levels at which a convolution of this size can be
            height, width = scale * size[0], scale * size[1]
            bytes_of_row = 4 * width * max(module.in_channels, module.out_channels) * (4 if halved else 1)
            rows = max(1, strip // bytes_of_row)
            spans = [(top, min(top + rows, height)) for top in range(0, height, rows)]
            borders = [min(height, end + 1) - max(0, top - 1) for top, end in spans]
            scales.append([2 * (end - top) + 1 for top, end in spans] if halved else borders)
        assert seen in scales, module
        several += len(seen) > 2
    assert several > 5


@pytest.mark.parametrize("weights", [1, 3000, 2**28])
@torch.no_grad()
def test_parts_of_the_middle_attention_are_the_whole(
    tiny_upscaler: Upscaler, monkeypatch: pytest.MonkeyPatch, weights: int
) -> None:
    monkeypatch.setattr(global_layers, "WEIGHTS", weights)
    attention: Any = tiny_upscaler.networks.vae.decoder.mid_block.attentions[0]  # pyright: ignore[reportAttributeAccessIssue]
    x, tiles = torch.randn(1, 16, 9, 14), (Tile(0, 0, 9, 5), Tile(0, 5, 9, 14))
    rows = attention.group_norm(x)
    whole = global_layers.GlobalAttention(attention, (9, 14))
    for tile in tiles:
        whole.observe(tile.crop(rows), tile)
    whole.finish()
    results = [whole(tile.crop(rows)) for tile in tiles]
    expected = attention(x) - x
    torch.testing.assert_close(torch.cat(results, dim=3), expected, atol=1e-5, rtol=1e-5)


def test_a_kernel_of_the_card_computes_strips_that_are_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, calls = nn.GroupNorm(2, 4), torch.randn(1, 4, 6, 5), []

    def kernel(x: Tensor, scale: Tensor, shift: Tensor, activate: bool) -> Tensor:
        calls.append(activate)
        result = x * scale[:, None, None] + shift[:, None, None]
        return torch.nn.functional.silu(result) if activate else result

    monkeypatch.setattr(global_layers.hardware, "strips_kernel", lambda device: kernel)
    whole = global_layers.GlobalNorm(norm)
    for part in (Tile(0, 0, 2, 5), Tile(2, 0, 6, 5)):
        whole.observe(part.crop(x), part)
    whole.finish()
    with torch.no_grad():
        expected = norm(x)
        for activate in (False, True):
            if activate:
                expected = torch.nn.functional.silu(expected)
            for values in (x, x.contiguous(memory_format=torch.channels_last)):
                torch.testing.assert_close(whole(values, activate), expected, atol=1e-5, rtol=1e-5)
        whole(x.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    assert calls == [False, True], "one image that is channels-last"


@pytest.mark.parametrize(
    ("entered", "allowance", "kept"),
    [
        (True, 800, "walk"),
        (True, 799, "stage"),
        (True, 400, "stage"),
        (True, 399, ""),
        (False, 400, "walk"),
        (False, 399, ""),
    ],
)
def test_a_waiting_tile_keeps_what_is_allowed(entered: bool, allowance: int, kept: str) -> None:
    """The input of its stage has 400 bytes; where it waits, the layer's input and the residual have 200 each."""
    tile = Tile(0, 0, 4, 4)
    walk = lockstep_tiles.TileWalk([], lambda tile: torch.empty(0), tile, tile)
    walk.latest = stage = (2, torch.zeros(100)) if entered else (0, None)
    walk.walk, walk.x = (layer for layer in ()), torch.zeros(50)  # type: ignore[assignment]
    walk.spare(allowance)
    assert (walk.walk is not None) == (walk.x.numel() == 50) == (kept == "walk")
    assert walk.mark[0] == (stage[0] if kept else 0) and walk.latest[0] == walk.mark[0]
    assert (walk.mark[1] is stage[1]) == bool(kept) or not entered
