"""lab.quality.peers: reads ncnn's files, and averages over the same images for all models."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from experiments.pocket import finetune
from lab.quality import ncnn, peers
from lab.quality.subjects import subjects
from seesr.networks import models


def written(folder: Path, layers: str, data: bytes) -> Path:
    (folder / "net.param").write_text(f"7767517\n0 0\n{layers}")
    (folder / "net.bin").write_bytes(data)
    return folder / "net"


def test_ncnn_files_compute_what_torch_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(12, 3, 3, 3)).astype(np.float16), rng.normal(size=12).astype(np.float32)
    layers = (
        "Input data 0 1 data 0=8 1=8\n"
        "Convolution conv 1 1 data conv 0=12 1=3 4=1 5=1 6=324 9=2 -23310=1,0.2\n"
        "PixelShuffle output 1 1 conv output 0=2\n"
    )
    data = struct.pack("<I", ncnn.HALF) + weight.tobytes() + bias.tobytes()
    x = torch.rand(1, 3, 8, 8)
    plain = F.conv2d(x, torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias), padding=1)
    expected = F.pixel_shuffle(F.leaky_relu(plain, 0.2), 2)
    assert torch.equal(ncnn.Ncnn(written(tmp_path, layers, data))(x), expected)


def test_ncnn_files_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 4 bytes, but the layers use 0"):
        ncnn.Ncnn(written(tmp_path, "Input data 0 1 data\n", bytes(4)))


def test_means_are_over_the_images_that_every_method_has() -> None:
    common = {"kind": "photograph", "damage": "clean", "ssim": 0.5}
    rows = [
        {**common, "image": "a", "method": "bicubic upscale", "psnr": 20.0},
        {**common, "image": "a", "method": "ours", "psnr": 21.0},
        {**common, "image": "b", "method": "bicubic upscale", "psnr": 20.0},
    ]
    plain, ours = peers.summary(rows)
    assert (plain["images"], ours["images"], ours["gain_db"]) == (1, 1, 1.0)


def test_each_kind_of_image_has_its_own_means() -> None:
    rows = [
        {"kind": kind, "damage": "clean", "image": "a", "method": method, "psnr": psnr}
        for kind, gain in (("photograph", 1.0), ("text", 3.0))
        for method, psnr in (("bicubic upscale", 20.0), ("ours", 20.0 + gain))
    ]
    assert [(row["kind"], row["gain_db"]) for row in peers.summary(rows) if row["method"] == "ours"] == [
        ("photograph", 1.0), ("text", 3.0),
    ]  # fmt: skip


def test_every_kind_that_photographs_leave_out_is_measured() -> None:
    drawn = list(subjects())
    assert {kind for kind, _, _ in drawn} == {"text", "line art", "screenshot", "face"}
    assert all(image.shape == (256, 256, 3) and image.dtype == np.uint8 for _, _, image in drawn)
    assert len({image.tobytes() for _, _, image in drawn}) == len(drawn)


def test_a_share_of_the_fine_tuned_weights_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, bundle = tmp_path / "tuned", tmp_path / "bundle"
    tuned.mkdir()
    for name in finetune.PARTS:
        (bundle / name).mkdir(parents=True)
        save_file({"w": torch.zeros(2).half()}, bundle / name / models.DIFFUSION_FILE)
        save_file({"w": torch.full((2,), 4.0).half()}, tuned / f"{name}.safetensors")
    monkeypatch.setattr(finetune.weights, "POCKET", bundle)
    finetune.install(tuned, 0.25)
    assert all(load_file(bundle / name / models.DIFFUSION_FILE)["w"].eq(1).all() for name in finetune.PARTS)
    assert (bundle / "bundle.json").exists()
