"""Public checkpoints -> a bundle: names, low-rank updates, the single file, and what is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from published import GOLDEN, old_vae_name
from safetensors.torch import load_file, save_file

from lab.parity import cases, reference
from seesr.checkpoints import convert, single_file
from seesr.networks import models, weights
from seesr.networks.autoencoders import AutoencoderKL
from seesr.networks.weights import WeightsError


def change_pickle(path: Path, change: object) -> None:
    state = torch.load(path, weights_only=True)
    change(state)  # type: ignore[operator]
    torch.save(state, path)


def test_renamed_missing_and_surplus_keys_are_named(
    downloads: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ram, dape = downloads / "ram/ram_swin_large_14m.pth", downloads / "dape/DAPE.pth"
    remaining = {path: path.read_bytes() for path in (ram, dape)}

    def refuses(message: str) -> None:
        with pytest.raises(WeightsError, match=message):
            convert.convert(downloads, tmp_path / "full", "licences")
        assert not (tmp_path / "full").exists() and not (tmp_path / "full.part").exists()
        for path, data in remaining.items():
            path.write_bytes(data)

    change_pickle(ram, lambda s: s["model"].update({"wordvec_proj2.weight": s["model"].pop("wordvec_proj.weight")}))
    refuses(r"1 missing keys, first wordvec_proj\.weight")
    assert "RAM: 1 keys of wordvec_proj2 are not known and not used" in caplog.text
    change_pickle(ram, lambda s: s["model"].update({"vision_multi.more.weight": torch.zeros(1)}))
    refuses(r"unknown key: tagging_head\.more\.weight")
    change_pickle(ram, lambda s: s["model"].pop("fc.bias"))
    refuses(r"1 missing keys, first fc\.bias")
    change_pickle(ram, lambda s: s["model"].update({"visual_encoder.more.weight": torch.zeros(1)}))
    refuses(r"1 extra keys, first visual_encoder\.more\.weight")
    change_pickle(ram, lambda s: s.pop("model"))
    refuses(r"has no entry .model.")
    change_pickle(ram, lambda s: s["model"].pop("image_proj.weight"))
    refuses(r"lacks 'image_proj.weight': it is not RAM")
    key = "visual_encoder.layers.0.blocks.0.attn.qkv.lora_B"
    change_pickle(dape, lambda s: s.pop(key))
    refuses(f"DAPE lacks {key}")
    change_pickle(dape, lambda s: s.update({"visual_encoder.strange": torch.zeros(1)}))
    refuses(r"unknown key: visual_encoder\.strange")
    tied = "tag_encoder.encoder.layer.0.crossattention.self.query.lora_B"
    change_pickle(dape, lambda s: s[tied].fill_(0.1))
    refuses("is not zero, although these weights are shared")
    unet = downloads / "seesr/unet/image_attentions.safetensors"
    state = load_file(unet)
    first = min(state)
    save_file({k: v for k, v in state.items() if k != first}, unet)
    refuses(r"1 missing keys, first .*\.image\.")
    unet.write_bytes(unet.read_bytes()[:100])
    refuses("image_attentions.safetensors cannot be read")


def test_surplus_keys_of_an_unknown_module_are_left_out(downloads: Path, tmp_path: Path) -> None:
    """Upstream loads RAM without strictness, so a checkpoint may hold more than is used."""
    change_pickle(
        downloads / "ram/ram_swin_large_14m.pth", lambda s: s["model"].update({"text_encoder2.x": torch.zeros(1)})
    )
    convert.convert(downloads, tmp_path / "full", "licences")
    assert weights.verify(tmp_path / "full").kind == "full"


def test_a_pickle_with_code_is_refused_and_not_run(downloads: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model": Payload()}, downloads / "ram/ram_swin_large_14m.pth")
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        convert.convert(downloads, tmp_path / "full", "licences")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_an_error(downloads: Path, tmp_path: Path) -> None:
    path = downloads / "ram/ram_swin_large_14m.pth"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="not a file of plain tensors"):
        convert.convert(downloads, tmp_path / "full", "licences")


def test_the_listing_is_diffable(converted: Path) -> None:
    lines = list(convert.listing(converted / "full"))
    assert "tagger/model.safetensors fc.bias [1] F16" in lines
    assert len(lines) == len(set(lines)) > 1000


def test_the_bytes_of_the_configs_are_those_of_every_conversion(converted: Path) -> None:
    """The sums of the bundle depend on them."""
    case = cases.read_case(GOLDEN / "ram_small", None)
    swin, head = case.options["swin"], case.options["tagging_head"]
    config = {
        "image_size": case.options["image_size"],
        "swin": {name: swin[name] for name in ("patch_size", "embed_dim", "depths", "num_heads", "window_size")},
        "token_width": head["encoder_width"],
        "label_width": case.state("base")["label_embed"].shape[1],
        "head": {
            name: head[name]
            for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        },
    }
    assert (converted / "full/tagger/config.json").read_text() == json.dumps(config, indent=1) + "\n"


def test_everybody_can_read_a_bundle(tmp_path: Path) -> None:
    file = tmp_path / "bundle/unet/config.json"
    file.parent.mkdir(parents=True)
    file.touch(0o600)
    for folder in (file.parent, tmp_path / "bundle"):
        folder.chmod(0o700)
    convert.readable(tmp_path / "bundle")
    paths = (tmp_path / "bundle", file.parent, file)
    assert [stat.S_IMODE(path.stat().st_mode) for path in paths] == [0o755, 0o755, 0o644]


def test_a_folder_is_preferred_to_a_single_file(downloads: Path) -> None:
    (downloads / "sd-turbo/sd_turbo.safetensors").write_bytes(b"")
    assert convert.turbo(downloads / "sd-turbo").keys() == {"unet", "vae", "text_encoder"}


def test_stable_diffusion_2_pads_prompts_with_its_first_token(converted: Path) -> None:
    """The repository's own tokenizer_config.json is not used: it does not always name the padding."""
    config = json.loads((converted / "full/tokenizer/tokenizer_config.json").read_text())
    assert config["pad_token"] == "!" and config["model_max_length"] == 77


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


def test_lora_is_merged_as_in_the_reference() -> None:
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


@pytest.fixture
def single(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A miniature sd_turbo.safetensors: the networks of `converted` under Stability's names."""
    source = converted / "downloads/sd-turbo"
    configs: dict[str, dict[str, Any]] = {
        name: convert.config_of(source / name) for name in ("unet", "vae", "text_encoder")
    }
    unet, vae, text = (convert.read_network(source / name) for name in configs)
    attention = tuple("CrossAttn" in kind for kind in configs["unet"]["up_block_types"])
    state = {
        single_file.UNET + single_file.unet_name(key, configs["unet"]["layers_per_block"], attention): value
        for key, value in unet.items()
    }
    for key, value in convert.vae_keys(vae).items():
        value = value[..., None, None] if ".attentions.0.to_" in key and value.ndim == 2 else value
        state[single_file.VAE + single_file.vae_name(key, len(configs["vae"]["block_out_channels"]))] = value
    text = {key.removeprefix("text_model."): value for key, value in text.items() if "position_ids" not in key}
    prefix = single_file.TEXT[0]
    layers = configs["text_encoder"]["num_hidden_layers"]
    for number in range(layers):
        block, ours = f"{prefix}transformer.resblocks.{number}", f"encoder.layers.{number}"
        for kind in ("weight", "bias"):
            qkv = [text[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{block}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for new, old in single_file.LAYER.items():
                state[f"{block}.{old}.{kind}"] = text[f"{ours}.{new}.{kind}"]
    state[f"{prefix}transformer.resblocks.{layers}.ln_1.weight"] = torch.zeros(1)  # a last layer that SD 2 skips
    state[f"{prefix}token_embedding.weight"] = text["embeddings.token_embedding.weight"]
    state[f"{prefix}positional_embedding"] = text["embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        state[f"{prefix}ln_final.{kind}"] = text[f"final_layer_norm.{kind}"]
    monkeypatch.setattr(single_file, "CONFIGS", {**single_file.CONFIGS, **configs})
    path = tmp_path / "any-name.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def test_the_single_file_gives_the_same_bundle(
    single: Path, converted: Path, hub: Any, run: Any, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    run("--from", str(converted / "downloads"), "--source", f"sd-turbo={single}")
    for name in ("unet", "vae", "text_encoder"):
        ours, other = (
            next((folder / name).glob("*.safetensors")) for folder in (tmp_path / "full", converted / "full")
        )
        first, second = load_file(ours), load_file(other)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_single_file_is_refused_by_its_content(single: Path, converted: Path, hub: Any, run: Any) -> None:
    save_file({"model.diffusion_model.x": torch.zeros(1)}, single)
    with pytest.raises(SystemExit, match=r"has no '.*': it is not SD-Turbo; name another file"):
        run("--from", str(converted / "downloads"), "--source", f"sd-turbo={single}")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("encoder.mid_block.resnets.0.conv1.weight", "encoder.mid.block_1.conv1.weight"),
        ("decoder.mid_block.resnets.1.norm2.bias", "decoder.mid.block_2.norm2.bias"),
        ("encoder.mid_block.attentions.0.group_norm.weight", "encoder.mid.attn_1.norm.weight"),
        ("encoder.mid_block.attentions.0.to_out.0.bias", "encoder.mid.attn_1.proj_out.bias"),
        ("encoder.down_blocks.1.resnets.0.conv_shortcut.weight", "encoder.down.1.block.0.nin_shortcut.weight"),
        ("encoder.down_blocks.2.downsamplers.0.conv.weight", "encoder.down.2.downsample.conv.weight"),
        ("decoder.up_blocks.0.resnets.2.conv1.weight", "decoder.up.3.block.2.conv1.weight"),
        ("decoder.up_blocks.2.upsamplers.0.conv.bias", "decoder.up.1.upsample.conv.bias"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
    ],
)
def test_names_of_the_vae_in_the_single_file(ours: str, theirs: str) -> None:
    assert single_file.vae_name(ours, 4) == theirs


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("down_blocks.0.resnets.0.conv1.weight", "input_blocks.1.0.in_layers.2.weight"),
        ("down_blocks.1.resnets.1.time_emb_proj.bias", "input_blocks.5.0.emb_layers.1.bias"),
        ("down_blocks.1.attentions.0.norm.weight", "input_blocks.4.1.norm.weight"),
        ("down_blocks.1.downsamplers.0.conv.weight", "input_blocks.6.0.op.weight"),
        ("mid_block.resnets.1.conv2.weight", "middle_block.2.out_layers.3.weight"),
        ("mid_block.attentions.0.norm.weight", "middle_block.1.norm.weight"),
        ("up_blocks.1.resnets.2.conv_shortcut.bias", "output_blocks.5.0.skip_connection.bias"),
        ("up_blocks.1.attentions.0.norm.weight", "output_blocks.3.1.norm.weight"),
        ("up_blocks.0.upsamplers.0.conv.weight", "output_blocks.2.1.conv.weight"),
        ("up_blocks.1.upsamplers.0.conv.weight", "output_blocks.5.2.conv.weight"),
    ],
)
def test_names_of_the_unet_in_the_single_file(ours: str, theirs: str) -> None:
    assert single_file.unet_name(ours, 2, (False, True, True, True)) == theirs


@pytest.mark.slow  # imports diffusers
def test_single_file_names_are_those_that_diffusers_knows() -> None:
    """diffusers' own converters, at SD-Turbo's real sizes, turn our names back into its own."""
    from diffusers.loaders import single_file_utils

    configs = single_file.CONFIGS
    keys = list(single_file.unet_keys())
    attention = tuple("CrossAttn" in kind for kind in configs["unet"]["up_block_types"])
    names = [single_file.UNET + single_file.unet_name(key, 2, attention) for key in keys]
    assert len(set(names)) == len(keys) == 686
    state = {name: torch.full((1,), float(number)) for number, name in enumerate(names)}
    back = single_file_utils.convert_ldm_unet_checkpoint(state, dict(configs["unet"]))
    assert {key: int(value.item()) for key, value in back.items()} == {key: n for n, key in enumerate(keys)}
    keys = list(single_file.shapes("vae"))
    state = {
        single_file.VAE + single_file.vae_name(key, 4): torch.full((1, 1, 1, 1), float(number))
        for number, key in enumerate(keys)
    }
    back = single_file_utils.convert_ldm_vae_checkpoint(state, dict(configs["vae"]))
    assert {key: int(value.item()) for key, value in back.items()} == {key: n for n, key in enumerate(keys)}
