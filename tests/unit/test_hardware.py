"""Per-device tuning: attention kernels, matrix products, memory formats, and device errors."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import seesr.networks as networks_package
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


@pytest.mark.parametrize(
    ("linear", "changed"),
    [
        (torch.nn.Linear(64, 128), True),
        (torch.nn.Linear(64, 127), False),  # starting oneDNN would cost more
        (torch.nn.Linear(64, 128, dtype=torch.bfloat16), False),
        (torch.nn.Conv2d(64, 128, 1), False),
    ],
    ids=["large", "small", "bfloat16", "a convolution"],
)
def test_large_layers_of_single_precision_are_onednn_s(linear: torch.nn.Module, changed: bool) -> None:
    network, before = torch.nn.Sequential(linear), type(linear)
    kernels.use_one_dnn(network, kernels.TileLinear)
    assert type(network[0]) is (kernels.TileLinear if changed else before)


def test_a_dtype_that_onednn_cannot_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = kernels.one_dnn_multiplies.__wrapped__
    monkeypatch.setattr(kernels, "matrix_product", lambda x, weight, bias: x @ weight.T)
    assert ask(torch.float32)
    monkeypatch.setattr(kernels, "matrix_product", lambda x, weight, bias: x)
    assert not ask(torch.float32), "it gives something else"

    def fails(*_: object) -> torch.Tensor:
        raise RuntimeError("not supported\nhere")

    monkeypatch.setattr(kernels, "matrix_product", fails)
    assert not ask(torch.float32)


class Triton:
    """Stands in for `seesr.networks.fused`, which needs a GPU."""

    CLASSES = dict.fromkeys(("group_norm", "geglu", "layer_norm"))
    scaled = object()

    def __init__(self, works: bool) -> None:
        self.works, self.fused = works, []

    def group_norm(self, x: torch.Tensor, groups: int, *values: object) -> torch.Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] % groups == 0
        if not self.works:
            raise RuntimeError("no compiler\nwas found")
        return x

    def fuse(self, network: object, kinds: frozenset[str]) -> None:
        self.fused.append((network, kinds))


@pytest.fixture
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Triton:
    stand_in = Triton(getattr(request, "param", True))
    monkeypatch.setattr(networks_package, "fused", stand_in, raising=False)
    monkeypatch.setitem(sys.modules, "seesr.networks.fused", stand_in)
    return stand_in


@pytest.mark.parametrize("triton", [True, False], indirect=True)
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_fused_kernels_are_used_on_cards_where_they_were_measured(
    triton: Triton, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hardware.use_fused_kernels(SimpleNamespace(device=CPU, dtype=torch.float32, unet="unet", controlnet="controlnet"))
    used = capability == (9, 0) and triton.works
    kinds = frozenset({"group_norm", "geglu", "layer_norm"})
    assert triton.fused == ([("unet", kinds), ("controlnet", kinds)] if used else [])
    assert ("Triton kernels are disabled: no compiler" in caplog.text) == (capability == (9, 0) and not triton.works)


def test_the_kernel_of_row_strips(triton: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    find = hardware.strips_kernel.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(hardware, "FUSED", {(9, 0): {"strips"}, (8, 0): {"geglu"}})
    assert find(torch.device("cuda")) is triton.scaled and find(CPU) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert find(torch.device("cuda")) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("fused", [False, True])
def test_networks_on_a_gpu_are_channels_last_in_half_precision(
    dtype: torch.dtype, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("unet", "controlnet", "vae", "text_encoder", "tagger")
    layers = {name: torch.nn.Conv2d(4, 4, 3) for name in names}
    networks, tuned = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, **layers), []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(hardware, "use_fused_kernels", tuned.append)
    assert hardware.tune(networks, fused=fused) == "sdpa"
    half = dtype == torch.float16
    for name, layer in layers.items():
        channels_last = layer.weight.is_contiguous(memory_format=torch.channels_last)
        assert channels_last == (half and name in ("unet", "controlnet", "vae")), name
    assert tuned == ([networks] if half and fused else [])


def test_what_is_said_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {
        "get_device_name": "a card", "get_device_capability": (9, 0), "mem_get_info": (10, 20), "memory_reserved": 5,
        "max_memory_allocated": 3_500_000_000,
    }  # fmt: skip
    for name, value in state.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    expected = {"device": "a card", "capability": (9, 0), "gpu_memory": {"free": 10, "total": 20, "held": 5}}
    assert hardware.about(torch.device("cuda")) == {**expected, "device_index": 0}
    assert hardware.about(torch.device("cuda", 2))["device_index"] == 2
    assert hardware.about(CPU) == {"device": "cpu"}
    monkeypatch.setattr(hardware.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=2_000_000))
    assert hardware.peak_memory(CPU) == {"host": 2048}
    assert hardware.peak_memory(torch.device("cuda")) == {"host": 2048, "device": 3500}
