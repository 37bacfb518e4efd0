"""Download -> convert -> load -> upscale from a loopback hub that serves miniature checkpoints in the public layout."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub import COMMIT, Hub
from PIL import Image
from safetensors.torch import load_file, save_file

from lab import report
from lab.parity import cases, reference
from scripts import convert, download
from seesr import Settings, Upscaler, WeightsError
from seesr.networks import models
from seesr.networks.autoencoders import AutoencoderKL

GOLDEN = Path(__file__).parent.parent / "data/golden"
TINY = GOLDEN / "tiny_bundle"
OLD_VAE = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_vae_name(key: str) -> str:
    for new, old in OLD_VAE.items():
        key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return key


def publish(root: Path) -> None:
    """Miniatures with the public repositories' names, file names, wrapping and key names, weights by recipe."""
    pipeline = cases.read_case(GOLDEN / "pipe_plain_s1_g1.0", None)
    merge = cases.read_case(GOLDEN / "unet_turbo_merge", None)
    ram = cases.read_case(GOLDEN / "ram_small", None)
    turbo = root / "models/stabilityai/sd-turbo"
    seesr = root / "models/alexnasa/SEESR"

    def put(path: Path, config: dict, state: dict[str, torch.Tensor]) -> None:
        path.parent.mkdir(parents=True)
        (path.parent / "config.json").write_text(json.dumps(config))
        save_file(state, path)

    def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.half() for key, value in state.items()}

    unet = merge.config("unet")
    stock = {key: value for key, value in unet.items() if key != "use_image_cross_attention"}
    put(
        turbo / "unet/diffusion_pytorch_model.fp16.safetensors",
        {**stock, "_class_name": "UNet2DConditionModel"},
        half(merge.state("sd")),
    )
    put(seesr / "seesr/unet/diffusion_pytorch_model.safetensors", unet, merge.state("seesr"))
    put(
        seesr / "seesr/controlnet/diffusion_pytorch_model.safetensors",
        pipeline.config("controlnet"),
        pipeline.state("controlnet"),
    )
    vae = {old_vae_name(key): value for key, value in half(pipeline.state("vae")).items()}
    put(
        turbo / "vae/diffusion_pytorch_model.fp16.safetensors",
        {**pipeline.config("vae"), "_class_name": "AutoencoderKL"},
        vae,
    )
    text = half(pipeline.state("text_encoder"))
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    put(turbo / "text_encoder/model.fp16.safetensors", pipeline.config("text_encoder"), text)
    for name in ("tokenizer", "scheduler"):
        shutil.copytree(TINY / name, turbo / name)
    dape = ram.state("dape")
    for key, value in ram.state("dape_unused").items():
        dape[key] = torch.zeros_like(value) if key.endswith("lora_B") else value
    torch.save(dape, seesr / "DAPE.pth")
    base = {key.replace("tagging_head", "vision_multi"): value for key, value in ram.state("base").items()}
    base["visual_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(144, 144, dtype=torch.long)
    base["visual_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 144, 144)
    base["text_decoder.bert.embeddings.position_ids"] = torch.zeros(1, 4)
    repository = root / "models/xinyu1205/recognize_anything_model"
    repository.mkdir(parents=True)
    torch.save({"model": base}, repository / "ram_swin_large_14m.pth")
    code = root / "spaces/xinyu1205/recognize-anything/ram/data"
    code.mkdir(parents=True)
    (code / "ram_tag_list.txt").write_text("\n".join(ram.options["tags"]))  # no end of line after the last
    (code / "ram_tag_list_threshold.txt").write_text(
        "\n".join(str(x) for x in ram.inputs["class_threshold"].tolist()) + "\n"
    )


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    publish(root)
    return root


@pytest.fixture
def hub(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(Path(shutil.copytree(published, tmp_path / "hub"))) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setattr(download, "PAUSE", 0.01)
        yield running


@pytest.fixture
def fetched(hub: Hub, tmp_path: Path) -> Path:
    download.download(tmp_path / "downloads", tmp_path / "weights.lock")
    return tmp_path / "downloads"


def test_download_convert_load_upscale(
    hub: Hub, tmp_path: Path, photo: Image.Image, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "weights.lock"
    download.download(tmp_path / "downloads", lock)
    told = capsys.readouterr().out
    assert "stabilityai/sd-turbo@0123456789ab" in told and "Community License" in told
    pins = download.read_lock(lock)
    assert {pin.commit for pin in pins} == {COMMIT}
    assert all(pin.sha256 and len(pin.sha256) == 64 and pin.size and pin.licence for pin in pins)
    assert not (tmp_path / "downloads/.staging").exists()

    bundle = tmp_path / "full"
    convert.convert(tmp_path / "downloads", bundle, "licences")
    upscaler = Upscaler.load(bundle, "cpu")
    assert upscaler.networks.bundle.kind == "full"
    result = upscaler(photo, Settings(num_inference_steps=1, seed=1, scale_factor=2))
    assert result.image.size == (128, 96)

    ram = cases.read_case(GOLDEN / "ram_small", None)  # half precision, so a wider tolerance than parity's
    tokens = upscaler.networks.tagger.tokens(ram.inputs["image"])
    assert (tokens - ram.outputs["image_embeds"]).abs().max() < 0.03
    merge = cases.read_case(GOLDEN / "unet_turbo_merge", None)
    context = (merge.inputs["encoder_hidden_states"], merge.inputs["image_encoder_hidden_states"])
    found = upscaler.networks.unet(merge.inputs["sample"], 999, context)
    assert (found - merge.outputs["noise_pred"]).abs().max() < 0.03


def test_a_second_run_fetches_nothing_and_obeys_the_lock(hub: Hub, fetched: Path, tmp_path: Path) -> None:
    hub.requests.clear()
    download.download(fetched, tmp_path / "weights.lock")
    assert hub.requests == []
    config = fetched / "sd-turbo/unet/config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(WeightsError, match=r"unet/config.json has \d+ bytes, expected \d+"):
        download.download(fetched, tmp_path / "weights.lock")


def test_a_flipped_byte_on_the_way_is_noticed_and_can_be_fetched_again(hub: Hub, tmp_path: Path) -> None:
    hub.lie.add("controlnet/diffusion_pytorch_model.safetensors")
    with pytest.raises(WeightsError, match=r"damaged: checksum is [0-9a-f]+, expected [0-9a-f]+"):
        download.download(tmp_path / "downloads", tmp_path / "weights.lock")
    assert not (tmp_path / "downloads/seesr/controlnet/diffusion_pytorch_model.safetensors").exists()
    assert not (tmp_path / "weights.lock").exists()
    hub.lie.clear()
    download.download(tmp_path / "downloads", tmp_path / "weights.lock")


def test_a_small_file_is_checked_too(hub: Hub, tmp_path: Path) -> None:
    hub.lie.add("tokenizer/vocab.json")
    with pytest.raises(WeightsError, match="vocab.json is damaged"):
        download.download(tmp_path / "downloads", tmp_path / "weights.lock")


def test_a_server_that_vanishes_half_way_is_resumed(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what arrived in whole chunks is kept
    name = "DAPE.pth"
    hub.fail[name] = 2
    download.download(tmp_path / "downloads", tmp_path / "weights.lock")
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith(name)]
    assert len(ranges) == 3 and ranges[0] is None
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:] if r]
    assert 0 < starts[0] < starts[1]


def test_a_server_that_stays_away_is_a_clear_error(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's client waits between its own tries too
    hub.fail["DAPE.pth"] = -1
    with pytest.raises(WeightsError, match=r"DAPE\.pth could not be fetched in 5 tries"):
        download.download(tmp_path / "downloads", tmp_path / "weights.lock")
    assert not (tmp_path / "downloads/seesr/DAPE.pth").exists()


def test_a_file_that_moved_is_found_and_one_that_is_gone_is_named(hub: Hub, tmp_path: Path) -> None:
    repository = hub.folder / "models/alexnasa/SEESR"
    (repository / "preset/models").mkdir(parents=True)
    (repository / "DAPE.pth").rename(repository / "preset/models/DAPE.pth")
    download.download(tmp_path / "downloads", tmp_path / "weights.lock")
    (tmp_path / "weights.lock").unlink()
    (repository / "preset/models/DAPE.pth").unlink()
    with pytest.raises(WeightsError, match=r"no file like DAPE\.pth was found: alexnasa/SEESR holds seesr/controlnet"):
        download.download(tmp_path / "downloads", tmp_path / "weights.lock")


def test_a_full_disk_is_refused_before_and_named_during(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(WeightsError, match=r"GB are to be fetched, but .* has 0.00 GB free"):
        download.download(tmp_path / "downloads", tmp_path / "weights.lock")
    monkeypatch.undo()

    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(WeightsError, match="no space is left"):
        download.retried(full, "a file")


def test_a_local_folder_can_stand_in(fetched: Path, tmp_path: Path) -> None:
    download.copy_from(fetched, tmp_path / "copy", tmp_path / "weights.lock")
    convert.convert(tmp_path / "copy", tmp_path / "full", "licences")
    (fetched / "seesr/DAPE.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match="has 1 bytes"):
        download.copy_from(fetched, tmp_path / "copy", tmp_path / "weights.lock")


def change_pickle(path: Path, change: object) -> None:
    state = torch.load(path, weights_only=True)
    change(state)  # type: ignore[operator]
    torch.save(state, path)


def test_renamed_missing_and_surplus_keys_are_named(fetched: Path, tmp_path: Path) -> None:
    ram, dape = fetched / "ram/ram_swin_large_14m.pth", fetched / "seesr/DAPE.pth"
    kept = {path: path.read_bytes() for path in (ram, dape)}

    def refuses(words: str) -> None:
        with pytest.raises(WeightsError, match=words):
            convert.convert(fetched, tmp_path / "full", "licences")
        assert not (tmp_path / "full").exists()
        for path, data in kept.items():
            path.write_bytes(data)

    change_pickle(ram, lambda s: s["model"].update({"wordvec_proj2.weight": s["model"].pop("wordvec_proj.weight")}))
    refuses(r"unknown key: wordvec_proj2\.weight")
    change_pickle(ram, lambda s: s["model"].pop("fc.bias"))
    refuses(r"1 missing keys, first fc\.bias")
    change_pickle(ram, lambda s: s["model"].update({"visual_encoder.more.weight": torch.zeros(1)}))
    refuses(r"1 extra keys, first visual_encoder\.more\.weight")
    key = "visual_encoder.layers.0.blocks.0.attn.qkv.lora_B"
    change_pickle(dape, lambda s: s.pop(key))
    refuses(f"DAPE lacks {key}")
    change_pickle(dape, lambda s: s.update({"visual_encoder.strange": torch.zeros(1)}))
    refuses(r"unknown key: visual_encoder\.strange")
    tied = "tag_encoder.encoder.layer.0.crossattention.self.query.lora_B"
    change_pickle(dape, lambda s: s[tied].fill_(0.1))
    refuses("is not zero, although these weights are shared")
    unet = fetched / "seesr/unet/diffusion_pytorch_model.safetensors"
    state = load_file(unet)
    first = min(k for k in state if "image_attentions" in k)
    save_file({k: v for k, v in state.items() if k != first}, unet)
    refuses(r"1 missing keys, first .*\.image\.")


def test_a_pickle_with_code_is_refused_and_not_run(fetched: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Payload()}, fetched / "ram/ram_swin_large_14m.pth")
    with pytest.raises(WeightsError, match="no file of plain tensors"):
        convert.convert(fetched, tmp_path / "full", "licences")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_an_error(fetched: Path, tmp_path: Path) -> None:
    path = fetched / "ram/ram_swin_large_14m.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="no file of plain tensors"):
        convert.convert(fetched, tmp_path / "full", "licences")


def test_the_listing_is_diffable(fetched: Path, tmp_path: Path) -> None:
    convert.convert(fetched, tmp_path / "full", "licences")
    lines = list(convert.listing(tmp_path / "full"))
    assert "tagger/model.safetensors fc.bias [1] F16" in lines
    assert len(lines) == len(set(lines)) > 1000


def test_the_commands_print_one_line_on_failure(tmp_path: Path) -> None:
    for script, options in (("convert.py", ["--source"]), ("download.py", ["--folder", str(tmp_path), "--from"])):
        done = subprocess.run(
            [sys.executable, f"scripts/{script}", *options, str(tmp_path / "nothing")],
            capture_output=True,
            text=True,
            cwd=report.ROOT,
        )
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_key_names_go_there_and_back() -> None:
    case = cases.read_case(GOLDEN / "unet_turbo_merge", None)
    state = convert.merge_turbo(case.state("sd"), case.state("seesr"))
    ours = convert.diffusion_keys(state)
    assert len(ours) == len(state)
    assert reference.foreign_keys(ours).keys() == state.keys()


def test_old_vae_attention_names_and_convolutions_load() -> None:
    pipeline = cases.read_case(GOLDEN / "pipe_plain_s1_g1.0", None)
    state = pipeline.state("vae")
    old = {
        old_vae_name(k): v[..., None, None] if ".attentions.0.to_" in k and v.ndim == 2 else v for k, v in state.items()
    }
    assert any(".proj_attn.weight" in key for key in old)
    with torch.device("meta"):
        network = AutoencoderKL(**pipeline.config("vae"))
    models.fill(network, convert.vae_keys(old), Path("vae"))
    z = torch.randn(1, 4, 6, 6)
    assert torch.equal(network.decoder(z), pipeline.vae().decoder(z))


def test_lora_goes_where_the_reference_puts_it() -> None:
    case = cases.read_case(GOLDEN / "ram_small", None)
    base, dape = case.state("base"), case.state("dape")
    merged = convert.merge_lora(base, dape)
    changed = {key for key in base if not torch.equal(base[key].float(), merged[key].float())}
    assert len(changed) == len(dape) // 2
    key = "visual_encoder.layers.0.blocks.0.attn.qkv"
    width = base[f"{key}.weight"].shape[1]
    change = (merged[f"{key}.weight"] - base[f"{key}.weight"]).numpy()
    assert np.abs(change[width : 2 * width]).max() == 0  # keys are untouched
    expected = (dape[f"{key}.lora_B"][width:] @ dape[f"{key}.lora_A"][8:] / 8).numpy()
    np.testing.assert_allclose(change[2 * width :], expected, atol=1e-6)
