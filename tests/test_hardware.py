from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seesr import Upscaler, hardware, models, weights
from seesr.attention import Attend, Tokens

CPU = torch.device("cpu")
KERNELS = [name for name in hardware.KERNELS if name not in ("flash", "efficient", "cudnn", "xformers")]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("count", "keys"), [(1030, 1030), (64, 77), (1, 145)])
def test_kernels_agree(name: str, count: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "SCORES", 2**16)  # several rounds of rows
    q, k, v = (torch.randn(2, 3, n, 64) for n in (count, keys, keys))
    k = k[:1].expand(2, -1, -1, -1)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(hardware.KERNELS[name](q, k, v), expected, rtol=0, atol=2e-6)


def untuned() -> models.Models:
    return models.load(weights.ROOT / "pocket", CPU, torch.float32)


@torch.no_grad()
def test_tuning_changes_the_order_of_sums_alone() -> None:
    torch.manual_seed(0)
    z, time = torch.randn(2, 16, 16, 16), torch.full((2,), 999)
    z = z.repeat(1, untuned().unet.config["in_channels"] // 16, 1, 1)
    found = []
    for tuned in (False, True):
        networks = untuned()
        if tuned:
            assert hardware.tune(networks) == "rows"
        width = networks.unet.config["cross_attention_dim"]
        generator = torch.Generator().manual_seed(1)
        context = tuple(Tokens(torch.randn(1, n, width, generator=generator)) for n in (77, 145))
        found.append(
            (networks.unet(z, time, context).sample, networks.vae.decode(z).sample, networks.text_encoder(text())[0])
        )
    for plain, tuned in zip(*found, strict=True):
        torch.testing.assert_close(tuned, plain, rtol=0, atol=1e-5 * plain.abs().max().item())


def text() -> torch.Tensor:
    return torch.arange(77)[None]


def test_what_was_chosen_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESR_ATTENTION", "sdpa")
    networks = untuned()
    assert Upscaler(networks).attention == "sdpa"
    kernels = {m.processor.kernel for m in networks.unet.modules() if isinstance(getattr(m, "processor", None), Attend)}
    assert kernels == {F.scaled_dot_product_attention}


@pytest.mark.parametrize(("name", "words"), [("fast", "not one of auto"), ("cudnn", "does not work here")])
def test_a_kernel_that_cannot_work_is_refused(name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEESR_ATTENTION", name)
    with pytest.raises(ValueError, match=words):
        hardware.tune(untuned())
