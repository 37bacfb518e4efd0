"""Every program in examples/ runs."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from scripts.cog_server import ROOT

# Replicate's client leaves sockets and short programs leave files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

EXAMPLES = ROOT / "examples"
WRITES = {
    "one_image.py": (["photo.jpg"], "photo-x2.png"),
    "folder.py": (["holiday"], "holiday/one-x2.webp"),
    "numpy_pipeline.py": ([], None),
    "asynchronous.py": (["photo.jpg"], "photo-x2.png"),
    "replicate_client.py": (["photo.jpg"], "photo-x2.png"),
}


def test_every_program_is_run_and_listed() -> None:
    programs = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    assert programs == {*WRITES, "notebook.ipynb"}
    listed = (EXAMPLES / "README.md").read_text()
    assert all(f"[{name}]({name})" in listed for name in programs)


@pytest.mark.parametrize("name", WRITES)
def test_program(
    name: str,
    reader: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, target = WRITES[name]
    if name == "replicate_client.py":
        monkeypatch.setenv("REPLICATE_BASE_URL", request.getfixturevalue("echo"))
        monkeypatch.setenv("REPLICATE_API_TOKEN", "none")
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    if target is not None:
        with Image.open(reader / target) as image:
            assert image.size == ((24, 20) if name == "replicate_client.py" else (48, 40))
    else:
        assert "(48, 64, 3) float32" in capsys.readouterr().out


def test_notebook(reader: Path) -> None:
    names: dict[str, object] = {}
    for cell in json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert (reader / "notebook-x2.png").exists()
