"""Weight bundles: manifest, checksums, and missing, unknown or misshapen tensors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from seesr import Engine, Settings, Upscaler, WeightsError
from seesr.networks import models, weights


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def reload(bundle: Path) -> None:
    Upscaler.load(bundle, "cpu")


def change_weights(bundle: Path, part: str, change: object) -> None:
    path = next((bundle / part).glob("*.safetensors"))
    state = load_file(path)
    change(state)  # type: ignore[operator]
    save_file(state, path)
    weights.write_manifest(bundle, "tiny", "test", "none")


def test_missing_weights_say_how_to_fetch_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights at .*scripts/weights"):
        reload(tmp_path / "nowhere")


def test_a_flipped_byte_is_named_with_both_sums(bundle: Path) -> None:
    path = bundle / "unet" / models.DIFFUSION_FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        WeightsError, match=r"unet/diffusion.* is damaged: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"
    ):
        reload(bundle)


def test_a_file_is_read_again_when_it_has_changed_alone(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, digest = [], hashlib.file_digest

    def recorded(file: Any, kind: str) -> Any:
        read.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", recorded)
    for _ in range(2):
        weights.verify(bundle)
    count = len(read)
    assert count == len(weights.verify(bundle).files)
    tags = bundle / "tagger/tags.json"
    tags.write_text(tags.read_text() + " ")
    with pytest.raises(WeightsError, match=r"tags\.json is damaged"):
        weights.verify(bundle)
    assert read[count:] == ["tags.json"]


def test_a_missing_and_an_unlisted_file_are_named(bundle: Path) -> None:
    (bundle / "extra.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"extra\.bin is not listed"):
        reload(bundle)
    (bundle / "extra.bin").unlink()
    (bundle / "tagger" / "tags.json").unlink()
    with pytest.raises(WeightsError, match=r"tags\.json is missing"):
        reload(bundle)


def test_a_broken_manifest_is_an_error(bundle: Path) -> None:
    (bundle / weights.MANIFEST).write_text("{")
    with pytest.raises(WeightsError, match="not a bundle manifest"):
        reload(bundle)


@pytest.mark.parametrize("part", ["unet", "controlnet", "vae", "text_encoder", "tagger"])
def test_missing_surplus_and_wrongly_shaped_keys_are_named(bundle: Path, part: str) -> None:
    path = next((bundle / part).glob("*.safetensors"))
    key = min(k for k, v in load_file(path).items() if v.ndim > 1)
    remaining: dict[str, torch.Tensor] = {}
    change_weights(bundle, part, lambda state: remaining.update({key: state.pop(key)}))
    with pytest.raises(WeightsError, match=f"1 missing keys, first .*{key.removeprefix('text_model.')}"):
        reload(bundle)
    change_weights(bundle, part, lambda state: state.update({key: remaining[key], "surplus": torch.zeros(1)}))
    with pytest.raises(WeightsError, match="1 extra keys, first surplus"):
        reload(bundle)
    change_weights(
        bundle, part, lambda state: (state.pop("surplus"), state.update({key: remaining[key][..., :1].clone()}))
    )
    with pytest.raises(WeightsError, match="has shape"):
        reload(bundle)


def test_truncated_safetensors_are_an_error(bundle: Path) -> None:
    path = bundle / "vae" / models.DIFFUSION_FILE
    path.write_bytes(path.read_bytes()[:200])
    weights.write_manifest(bundle, "tiny", "test", "none")
    with pytest.raises(WeightsError, match="cannot be read"):
        reload(bundle)


def test_the_environment_names_the_bundle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(weights, "FULL", tmp_path / "full")
    monkeypatch.setattr(weights, "POCKET", tmp_path / "pocket")
    assert weights.locate() == tmp_path / "pocket"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / weights.MANIFEST).write_text("{}")
    assert weights.locate() == tmp_path / "full"
    monkeypatch.setenv("SEESR_WEIGHTS", str(tmp_path / "elsewhere"))
    with pytest.raises(WeightsError, match="no weights at .*elsewhere"):
        Engine.load(device="cpu")


def test_no_pickle_is_read_outside_the_converter() -> None:
    root = Path(weights.__file__).parents[1]
    for path in [*root.rglob("*.py"), root.parent / "predict.py"]:
        code = path.read_text()
        assert "import pickle" not in code, path
        if path.name == "convert.py":  # reads published checkpoints: tensors alone
            code = code.replace('torch.load(path, map_location="cpu", weights_only=True, mmap=True)', "")
        assert not re.search(r"(?<!safetensors\.)torch\.load", code), path


def test_the_pocket_bundle_is_whole_small_and_free_of_code() -> None:
    bundle = weights.verify(weights.POCKET)
    assert bundle.kind == "pocket"
    assert sum(path.stat().st_size for path in weights.POCKET.rglob("*") if path.is_file()) <= 20e6
    assert not list(weights.POCKET.rglob("*.py"))  # a folder with code is not split into its own image layer
    assert (
        json.loads((weights.POCKET / "scheduler/scheduler_config.json").read_text())["timestep_spacing"] == "trailing"
    )


def test_the_defaults_of_a_bundle(tmp_path: Path) -> None:
    """As the descriptions of the settings say; a bundle without any has those of its networks' training."""
    described = {field.name: field.metadata["description"] for field in dataclasses.fields(Settings)}
    pocket, full = weights.DEFAULTS["pocket"], weights.DEFAULTS["full"]
    steps = f"{pocket.num_inference_steps} with the bundled pocket weights, {full.num_inference_steps} with the full"
    assert steps in described["num_inference_steps"]
    for defaults in (pocket, full):
        assert f"default: {' or '.join(map(str, defaults.latent_tiled_size))}," in described["latent_tiled_size"]
    assert weights.verify(weights.POCKET).defaults == pocket
    for kind, expected in (("pocket", pocket), ("full", full), ("other", weights.Defaults(4, (64,)))):
        weights.write_manifest(tmp_path, "name", kind, "licence")
        assert weights.read_manifest(tmp_path).defaults == expected


def test_the_digest_of_a_bundle_is_that_of_its_name_and_files(tmp_path: Path) -> None:
    bundle = weights.Bundle(tmp_path, "a", "kind", "licence", {"x": "1", "y": "2"})
    same = bundle._replace(path=tmp_path / "other", kind="another", licence="another", files={"y": "2", "x": "1"})
    assert bundle.digest == same.digest and len(bundle.digest) == 64
    for other in (bundle._replace(name="b"), bundle._replace(files={"x": "1", "y": "3"})):
        assert other.digest != bundle.digest
