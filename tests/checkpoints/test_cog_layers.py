"""Cog's rule for layers of weights, ported from pkg/weights/weights.go: which folders become a layer of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

from seesr.networks import weights

ROOT = weights.ROOT.parent
LARGE = 10 * 1024 * 1024
PREFIXES = (".cog", ".git", "__pycache__")
SUFFIXES = (
    ".py .ipynb .whl .jpg .jpeg .png .webp .svg .gif .avif .heic .mp4 .mov .avi .wmv .mkv .webm .mp3 .wav .ogg .flac"
    " .aac .m4a .log"
)


def folders(files: dict[str, int]) -> list[str]:
    """Folders that Cog copies as layers, for the sizes of all files of a project."""
    code = [path for path in files if path.endswith((".py", ".ipynb"))]
    large = [
        path
        for path, size in files.items()
        if size >= LARGE and not path.startswith(PREFIXES) and not path.endswith(tuple(SUFFIXES.split()))
    ]
    results: list[str] = []
    for path in sorted(large, key=lambda path: (path.count("/"), path)):
        folder = path.rpartition("/")[0]
        if folder and not any((folder + "/").startswith(parent + "/") for parent in results):
            results.append(folder)
    return [folder for folder in results if not any(path.startswith(folder) for path in code)]


def test_folders_above_the_layer_size_become_layers() -> None:
    files = {"a/b/c.bin": LARGE, "a/b/d/e.bin": LARGE, "f.bin": LARGE, "g/h.bin": LARGE, "g/i.py": 1, "j/k.png": LARGE}
    assert folders(files) == ["a/b"]


def test_cog_finds_the_two_bundles_and_nothing_else() -> None:
    """Of the committed files, a full bundle, and what the command leaves: the downloads are outside of the project."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    files = {path: (ROOT / path).stat().st_size for path in tracked if (ROOT / path).is_file()}
    for name in ("unet", "controlnet", "vae", "text_encoder", "tagger"):
        files[f"weights/full/{name}/model.safetensors"] = 2**30
    parents = {Path(*Path(folder).parts[:2]).as_posix() for folder in folders(files)}
    assert parents <= {"weights/full", "weights/pocket"} and "weights/full" in parents
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not [folder for folder in parents if folder in ignored]


def test_no_document_asks_for_separate_weights() -> None:
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert "cog push <the image name of your model> --separate-weights" not in path.read_text(), path
