"""Our numbers against the recorded ones of the SeeSR reference, case by case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.parity import cases

GOLDEN = Path(__file__).parent.parent / "data/golden"
LARGE = {"full", "ram_full"}
CASES = [
    pytest.param(path, marks=pytest.mark.slow if path.name in LARGE else (), id=path.name)
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
