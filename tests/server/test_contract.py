"""What Cog reads without running: predict.py's literals, the schema file, cog.yaml and the pinned versions."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import tomllib

import schema
import yaml
from packaging.version import Version

from seesr import Settings
from seesr.settings import cog_schema
from seesr.settings.cog_schema import MASK

ROOT = schema.ROOT
CONFIG = yaml.safe_load((ROOT / "cog.yaml").read_text())


def test_every_input_is_a_line_of_literals_that_equals_settings() -> None:
    inputs = schema.inputs()
    assert list(inputs)[:2] == ["image", "mask"]
    assert inputs["mask"] == ("Optional[Path]", {"default": None, "description": MASK, "accept": "image/*"})
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    assert list(inputs)[2:] == list(fields)
    for name, field in fields.items():
        annotation, values = inputs[name]
        assert annotation in (str(field.type), f"Optional[{str(field.type).removesuffix(' | None')}]")
        assert values.pop("default") == field.default
        limits = {name: value for name, value in field.metadata.items() if name not in ("kind", "empty")}
        if "choices" in limits:
            limits["choices"] = list(limits["choices"])
        assert values == limits


def test_inputs_follow_cogs_static_rules() -> None:
    source = (ROOT / "predict.py").read_text().splitlines()
    function = schema.run_function()
    assert function.returns is not None
    for argument, default in zip(function.args.args[1:], function.args.defaults, strict=True):
        assert argument.lineno == default.end_lineno, "an Input must stand on one line"
        assert isinstance(default, ast.Call)
        for keyword in default.keywords:
            text = ast.get_source_segment("\n".join(source), keyword.value) or ""
            if keyword.arg in ("ge", "le", "min_length", "max_length"):
                assert re.fullmatch(r"-?\d+(\.\d+)?", text), text  # Cog drops anything but a plain number
            if keyword.arg in ("description", "default") and text.startswith(('"', "'")):
                assert "\\" not in text and text.count('"') == 2  # no escapes, no implicit joining


def test_the_committed_schema_is_made_from_the_settings() -> None:
    assert json.loads(cog_schema.FILE.read_text()) == cog_schema.document()
    assert schema.inputs()["image"] == ("Path", {"description": cog_schema.IMAGE, "accept": "image/*"})


def test_cog_yaml_has_nothing_that_cog_doctor_reports() -> None:
    assert CONFIG["run"] == "predict.py:Predictor"
    assert "predict" not in CONFIG and "concurrency" not in CONFIG
    build = CONFIG["build"]
    assert build["gpu"] is True
    assert re.fullmatch(r"3\.1[0-3]", build["python_version"])
    assert re.fullmatch(r"\d+\.\d+", build["cuda"]) and float(build["cuda"]) >= 11
    assert re.fullmatch(r"\d+\.\d+\.\d+", build["sdk_version"])
    assert not {"python_packages", "pre_install"} & set(build)
    assert (ROOT / build["python_requirements"]).exists()
    for line in CONFIG["environment"]:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]*=\S+", line)
    source = (ROOT / "predict.py").read_text()
    assert "class Predictor(BaseRunner)" in source and "BasePredictor" not in source


def test_pins_are_exact_and_meet_the_projects_needs() -> None:
    pins = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in pins.values())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for need in [*project["dependencies"], *extras["cog"], *extras["heic"]]:
        name, least = need.split(">=")
        if name == "cog":  # the image gets it from sdk_version
            pins[name] = CONFIG["build"]["sdk_version"]
        assert Version(pins.pop(name)) >= Version(least)
    assert set(pins) == {"xformers"}  # the optional backend
    assert (pins["xformers"]) == "0.0.35"  # built for exactly torch 2.10.0


def test_weights_are_in_the_image_and_split_into_layers() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not any(line.startswith("weights") for line in ignored)
    assert not list((ROOT / "weights").rglob("*.py"))


def test_what_the_scripts_need_travels_in_the_image() -> None:
    """./scripts/gpu_check runs inside the image: the recorded numbers and the lab go with it."""
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "tests/*" in ignored and "!tests/data" in ignored
    assert not {"lab", "results", "scripts"} & set(ignored)
