"""Per-device tuning: attention kernels, matrix products, memory formats, and device errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from seesr import Upscaler
from seesr.config import Configuration
from seesr.networks import hardware, kernels, models, weights
from seesr.networks.attention import Attention, Tokens

CPU = torch.device("cpu")
KERNELS = [name for name in kernels.KERNELS if name not in ("flash", "efficient", "cudnn", "xformers")]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("count", "keys"), [(1030, 1030), (64, 77), (1, 145)])
def test_kernels_agree(name: str, count: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SCORES", 2**16)  # several rounds of rows
    q, k, v = (torch.randn(2, 3, n, 64) for n in (count, keys, keys))
    k = k[:1].expand(2, -1, -1, -1)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(kernels.KERNELS[name](q, k, v), expected, rtol=0, atol=2e-6)


def untuned() -> models.Models:
    return models.load(weights.POCKET, CPU, torch.float32)


@torch.no_grad()
def test_tuning_changes_the_order_of_sums_alone() -> None:
    torch.manual_seed(0)
    z, time = torch.randn(2, 16, 16, 16), torch.full((2,), 999)
    z = z.repeat(1, untuned().unet.config["in_channels"] // 16, 1, 1)
    results = []
    for tuned in (False, True):
        networks = untuned()
        if tuned:
            expected = "rows" if hardware.one_dnn_pays() else "sdpa"
            assert hardware.tune(networks) == expected
        width = networks.unet.config["cross_attention_dim"]
        generator = torch.Generator().manual_seed(1)
        context = tuple(Tokens(torch.randn(1, n, width, generator=generator)) for n in (77, 145))
        results.append((networks.unet(z, time, context), networks.vae.decoder(z), networks.text_encoder.hidden(text())))
    for plain, tuned in zip(*results, strict=True):
        torch.testing.assert_close(tuned, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


def text() -> torch.Tensor:
    return torch.arange(77)[None]


def test_what_was_chosen_is_used() -> None:
    networks = untuned()
    assert Upscaler(networks, "sdpa").networks.attention == "sdpa"
    kernels = {m.kernel for m in networks.unet.modules() if isinstance(m, Attention)}
    assert kernels == {F.scaled_dot_product_attention}


def test_the_configuration_names_every_kernel() -> None:
    description = Configuration.model_fields["attention"].description or ""
    assert {"auto", *kernels.KERNELS} <= set(re.findall(r"\w+", description))


@pytest.mark.parametrize(("name", "message"), [("fast", "must be one of auto"), ("cudnn", "does not work here")])
def test_a_kernel_that_cannot_work_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hardware.tune(untuned(), name)


def test_kernel_and_layout_go_by_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.choose("auto", torch.device("cuda"), torch.float16) == "sdpa"
    for capability, expected in (((6, 1), False), ((7, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, values=capability: values)
        assert hardware.channels_last_pays(torch.device("cuda"), torch.float16) == expected
        assert not hardware.channels_last_pays(torch.device("cuda"), torch.float32)


@pytest.mark.parametrize(("version", "message"), [(91500, "no multiple of 128"), (91501, None)])
def test_cudnn_is_taken_where_torch_would_take_it(
    version: int, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setitem(kernels.KERNELS, "cudnn", F.scaled_dot_product_attention)
    if message is None:
        assert hardware.choose("cudnn", CPU, torch.float32) == "cudnn"
        return
    with pytest.raises(ValueError, match=message):
        hardware.choose("cudnn", CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_that_is_chosen_can_compute_in_the_dtype(dtype: torch.dtype) -> None:
    """oneDNN has no half-precision product on processors without AVX-512."""
    kernel = kernels.KERNELS[hardware.choose("auto", CPU, dtype)]
    q = torch.randn(1, 2, 64, 16, dtype=dtype)
    expected = F.scaled_dot_product_attention(q.float(), q.float(), q.float())
    torch.testing.assert_close(kernel(q, q, q).float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(("capability", "expected"), [("AVX2", "sdpa"), ("DEFAULT", "sdpa"), ("AVX512", "rows")])
def test_products_are_onednn_s_where_they_are_faster(
    capability: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(hardware, "one_dnn_multiplies", lambda dtype: True)
    networks = untuned()
    assert hardware.tune(networks) == expected
    linear = networks.controlnet.mid_block.attentions[0].text.proj_in  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(linear, kernels.TileLinear) == (expected == "rows")


@pytest.mark.parametrize("name", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_here_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be used here") as caught:
        hardware.usable(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("flags : fpu avx2 avx512_bf16 sse", True), ("Features : fp asimd bf16", True), ("flags : avx512f avx2", False)],
)
def test_products_in_bfloat16_are_known_from_the_flags_of_the_processor(
    tmp_path: Path, flags: str, expected: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{flags}\n")
    assert hardware.multiplies_bfloat16(tmp_path / "cpuinfo") is expected
    assert not hardware.multiplies_bfloat16(tmp_path / "nowhere")
