"""Our numbers against the recorded ones of the SeeSR reference, case by case."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from lab.parity import cases, pipeline

GOLDEN = Path(__file__).parent.parent / "data/golden"
MARKS = {"full": pytest.mark.slow, "ram_full": pytest.mark.slow, "vae_tiled": pytest.mark.long}
CASES = [
    pytest.param(path, marks=MARKS.get(path.name, ()), id=path.name)
    for path in sorted(GOLDEN.iterdir())
    if (path / "case.json").exists()
]


@pytest.mark.parametrize("folder", CASES)
def test_case(folder: Path) -> None:
    rows = cases.run(cases.read_case(folder, None))
    assert rows
    assert [row for row in rows if not row["good"]] == []


def test_a_wrong_number_is_noticed(tmp_path: Path) -> None:
    """Moves one recorded value by three tolerances."""
    from safetensors.torch import load_file, save_file

    for file in (GOLDEN / "colorfix").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    outputs = load_file(tmp_path / "outputs.safetensors")
    outputs["a.adain_f32"][0, 1, 2, 3] += 3e-5
    save_file(outputs, tmp_path / "outputs.safetensors")
    rows = cases.run(cases.read_case(tmp_path, None))
    assert len(rows) == 8
    assert [row["output"] for row in rows if not row["good"]] == ["a.adain_f32"]


def test_every_kind_of_case_is_recorded() -> None:
    kinds = {json.loads((p.values[0] / "case.json").read_text())["kind"] for p in CASES}  # type: ignore[operator]
    assert kinds == set(cases.KINDS)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A pipeline case that a test may change."""
    for file in (GOLDEN / "pipe_plain_s1_g1.0").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def change(folder: Path, name: str, value: object) -> None:
    about = json.loads((folder / "case.json").read_text())
    about["options"][name] = value
    (folder / "case.json").write_text(json.dumps(about))


def test_prompts_go_through_the_text_encoder(copied: Path) -> None:
    """The tokens are those of transformers' encoder and tokenizer, and the pipeline runs on them."""
    transformers = pytest.importorskip("transformers")
    case = cases.read_case(GOLDEN / "pipe_plain_s1_g1.0", None)
    encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(**case.config("text_encoder"))).eval()
    state = {key: value for key, value in case.state("text_encoder").items() if "position_ids" not in key}
    if not any(key.startswith("text_model.") for key in encoder.state_dict()):
        state = {key.removeprefix("text_model."): value for key, value in state.items()}
    encoder.load_state_dict(state)
    tokenizer = pipeline.ClipTokenizer(case.bundle / "tokenizer")
    with torch.no_grad():
        expected = encoder(tokenizer.encode_batch(["a cat"]))[0]
    change(copied, "prompt", "a cat")
    with torch.no_grad():
        produce = pipeline.pipeline_case(cases.read_case(copied, GOLDEN / "tiny_bundle"))
    assert (produce("prompt_embeds", None) - expected).abs().max() < 1e-4
    assert torch.isfinite(produce("image", None)).all()


def test_a_pillow_image_in_and_out(copied: Path) -> None:
    from safetensors.torch import load_file, save_file

    inputs, outputs = (load_file(copied / f"{name}.safetensors") for name in ("inputs", "outputs"))
    about = json.loads((copied / "case.json").read_text())
    image = cases.read_case(GOLDEN / "pipe_plain_s1_g1.0", None).inputs["image"]
    inputs["image"] = (image[0].permute(1, 2, 0) * 255).round().byte().contiguous()
    about["inputs"]["image"] = {"shape": list(inputs["image"].shape), "dtype": "uint8"}
    outputs["image"] = (outputs["image"][0].permute(1, 2, 0) * 255).round().byte().contiguous()
    entry = about["outputs"]["image"] | {"max_abs": 1}
    if "take" in entry:  # of [1, 3, H, W]
        entry["take"] = [entry["take"][axis] for axis in (2, 3, 1)]
    about["outputs"]["image"] = entry
    (copied / "case.json").write_text(json.dumps(about))
    for name, tensors in (("inputs", inputs), ("outputs", outputs)):
        save_file(tensors, copied / f"{name}.safetensors")
    rows = cases.run(cases.read_case(copied, GOLDEN / "tiny_bundle"))
    assert [row for row in rows if not row["good"]] == []


@pytest.mark.parametrize(("name", "value"), [("conditioning_scale", 0.7), ("start_point", "noise")])
def test_an_option_that_is_not_offered_is_refused_by_name(
    copied: Path, name: str, value: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    change(copied, name, value)
    arguments = ["cases", str(copied), "--tiny-bundle", str(GOLDEN / "tiny_bundle")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cases.main()
    assert end.value.code == 0
    assert f"{name} {value!r} is not offered" in capsys.readouterr().out
