"""Our numbers against the recorded ones of the SeeSR reference, case by case."""

from __future__ import annotations

import json
from pathlib import Path

import parity
import pytest

GOLDEN = Path(__file__).parent / "golden"
LARGE = {"full", "ram_full"}
CASES = [
    pytest.param(path, marks=pytest.mark.slow if path.name in LARGE else (), id=path.name)
    for path in sorted(GOLDEN.iterdir())
    if (path / "case.json").exists()
]


@pytest.mark.parametrize("folder", CASES)
def test_case(folder: Path) -> None:
    outputs, failures = parity.run(parity.read_case(folder, None))
    assert outputs > 0
    assert failures == 0


def test_a_wrong_number_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moves one recorded value by three tolerances."""
    from safetensors.torch import load_file, save_file

    for file in (GOLDEN / "colorfix").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    outputs = load_file(tmp_path / "outputs.safetensors")
    outputs["a.adain_f32"][0, 1, 2, 3] += 3e-5
    save_file(outputs, tmp_path / "outputs.safetensors")
    assert parity.run(parity.read_case(tmp_path, None)) == (8, 1)
    assert "a.adain_f32 3.0" in capsys.readouterr().out


def test_every_kind_of_case_is_recorded() -> None:
    kinds = {json.loads((p.values[0] / "case.json").read_text())["kind"] for p in CASES}  # type: ignore[operator]
    assert kinds | {"controlnet"} == set(parity.KINDS)
