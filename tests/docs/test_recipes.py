"""The recipes of CONTRIBUTING.md, followed on a copy of the repository: they name all files that have to change."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lab.report import ROOT

pytestmark = pytest.mark.long
COPIED = (
    "predict.py",
    "pyproject.toml",
    "README.md",
    "CONTRIBUTING.md",
    ".cog",
    "docs",
    "lab",
    "scripts",
    "seesr",
    "tests",
)
LINKED = (".dockerignore", "cog.yaml", "deploy", "requirements.txt", "results", "weights")
TEXTS = "seesr/serving/page/texts.json"
ALL_TEXTS = "tests/serve/test_page.py::test_every_text_is_in_every_language_and_is_used"
INTERFACE = ("tests/unit/test_settings.py", "tests/server/test_contract.py", ALL_TEXTS)
STAGES = "tests/pipeline/test_stage_cache.py"
HTTP = ("tests/serve/test_access.py", "tests/serve/test_openapi.py")


class Recipe:
    """A copy of the repository in which a section of CONTRIBUTING.md is followed.

    Args:
        heading: of the section.
    """

    def __init__(self, folder: Path, heading: str) -> None:
        self.folder = folder
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "data"))
            else:
                shutil.copy(ROOT / name, folder / name)
        for name in (*LINKED, "tests/data"):
            (folder / name).symlink_to(ROOT / name)
        sections = re.split(r"^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.M)
        (self.text,) = (section for section in sections if section.startswith(f"{heading}\n"))

    def edit(self, path: str, before: str, after: str) -> None:
        """Puts `after` before the one place of `before`, in a file that the recipe names."""
        named = re.findall(r"`([\w./]+)`", self.text)
        assert any(path == name or path.startswith(f"{name}/") for name in named), f"the recipe does not name {path}"
        text = (self.folder / path).read_text()
        assert text.count(before) == 1, (path, before)
        (self.folder / path).write_text(text.replace(before, after + before))

    def label(self, *keys: str) -> None:
        """Adds texts of the page, the same in each language."""
        languages = len(json.loads((self.folder / TEXTS).read_text())["languages"])
        for key in keys:
            self.edit(TEXTS, '"title": ', f'"{key}": {json.dumps([key] * languages)},\n')

    def python(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{self.folder}:{self.folder / 'tests'}"}
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    def check(self, *tests: str, code: str = "") -> None:
        """Runs the commands of the recipe, then the tests that compare the places with each other."""
        commands = re.findall(r"`python -m ([\w.]+)`", self.text)
        assert commands
        for module in commands:
            self.python("-m", module)
        if code:
            self.python("-c", code)
        self.python("-m", "pytest", "-x", "-p", "no:cacheprovider", *tests)


def test_a_setting(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, "Add a setting")
    text = "Mirrors the result."
    field = f'    mirror: bool = _field(False, "{text}", bool)\n'
    recipe.edit("seesr/settings/settings.py", "    seed: int | None = ", field)
    row = f'        mirror: bool = Input(default=False, description="{text}"),\n'
    recipe.edit("predict.py", "        seed: Optional[int] = ", row)
    recipe.edit("seesr/pipeline/stages.py", '    "fidelity", "color_fix", ', '    "mirror",\n')
    recipe.label("mirror", "mirror.about")
    use = "        if settings.mirror:\n            rgb = rgb[:, ::-1].copy()\n"
    recipe.edit("seesr/pipeline/pipeline.py", "        if self.source.colorless:\n", use)
    recipe.edit("tests/unit/test_settings.py", '    "seed": (None, 0', '    "mirror": (False, False, True),\n')
    recipe.edit("tests/pipeline/test_upscaler.py", '    "seed": ({}, 2)', '    "mirror": ({}, True),\n')
    recipe.edit(STAGES, '    "seed": {"seed": 2', '    "mirror": {"mirror": True},\n')
    recipe.check(
        *INTERFACE, f"{STAGES}::test_every_setting_belongs_to_a_stage_or_to_none",
        f"{STAGES}::test_a_change_repeats_only_what_depends_on_it[mirror]",
        "tests/pipeline/test_upscaler.py::test_every_setting_changes_the_file[mirror]",
        "tests/pipeline/test_cli.py::test_there_is_a_flag_for_every_setting", *HTTP,
    )  # fmt: skip


def test_a_format(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, "Add an output format")
    recipe.edit("seesr/images/formats.py", '}\nZIP = "zip"', '    "avif": Format("AVIF", "image/avif"),\n')
    recipe.edit("predict.py", '], description="File format', ', "avif"')
    recipe.label("output_format.avif")
    code = """
import io, numpy as np
from PIL import Image
from seesr.images.image_data import ImageData
from seesr.images.write import encode
rgb = np.full((8, 6, 3), 90, np.uint8)
with Image.open(io.BytesIO(encode(ImageData(rgb, record={"seed": 1}), "avif", 90))) as image:
    assert image.format == "AVIF" and image.size == (6, 8)
"""
    recipe.check(*INTERFACE, *HTTP, code=code)


def test_a_view(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, "Add a view")
    recipe.edit("seesr/settings/view_specs.py", '    "tiles": View(),\n', '    "negative": View(),\n')
    drawing = (
        "def negative(result: Output) -> ImageData:\n    image = result.image_data\n"
        "    return dataclasses.replace(image, rgb=np.iinfo(image.rgb.dtype).max - image.rgb)\n\n\n"
    )
    recipe.edit("seesr/pipeline/views.py", "DRAW: dict[", drawing)
    recipe.edit("seesr/pipeline/views.py", '    "tiles": tiles,\n', '    "negative": negative,\n')
    recipe.edit("predict.py", '"tiles", "uncertainty", ', '"negative", ')
    recipe.label("output_view.negative")
    recipe.check(
        *INTERFACE, *HTTP, "tests/pipeline/test_upscaler.py::test_every_choice_gives_another_file[output_view]"
    )


HELLO = 'def hello(request: Request) -> Response:\n    return Response("hello", media_type="text/plain")\n\n\n'
OPERATION = 'Operation(tag="Health", summary="Says hello.", answers={200: {TEXT: STRING}}),\n'


def test_a_route(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, "Add a route")
    recipe.edit("seesr/serving/health.py", "ROUTES = [", HELLO)
    recipe.edit("seesr/serving/health.py", 'Route("/ready", ready)', 'Route("/hello", hello), ')
    recipe.edit("seesr/serving/access.py", '    ("GET", "/live"),\n', '    ("GET", "/hello"),\n')
    recipe.edit("seesr/serving/openapi.py", "    health.live: ", f"    health.hello: {OPERATION}")
    recipe.edit("tests/serve/test_access.py", '    ("GET", "/live"): OPEN', '    ("GET", "/hello"): OPEN,\n')
    recipe.check(*HTTP)


def test_a_platform(tmp_path: Path) -> None:
    recipe = Recipe(tmp_path, "Add a platform")
    recipe.edit("seesr/serving/platforms.py", "def routes() -> ", HELLO)
    recipe.edit("seesr/serving/platforms.py", '        Route("/ping", ping),\n', '        Route("/hello", hello),\n')
    recipe.edit("seesr/serving/openapi.py", "    platforms.ping: ", f"    platforms.hello: {OPERATION}")
    recipe.edit("tests/serve/test_access.py", '    ("GET", "/status"): KEY', '    ("GET", "/hello"): KEY,\n')
    recipe.edit("seesr/config.py", '"vertex", "sagemaker", "huggingface"]', '"example", ')
    own = '    if platform == "example":\n        return {("GET", "/hello")}\n'
    recipe.edit("seesr/serving/access.py", '    if platform == "sagemaker":\n', own)
    code = """
import pathlib, tempfile
from echo_server import serving
with serving(pathlib.Path(tempfile.mkdtemp()), "http://10.1.2.3:8080", platform="example") as client:
    assert client.get("/hello").text == "hello" and client.get("/status").status_code == 401
"""
    recipe.check(*HTTP, code=code)
