"""`seesr doctor` (checks with remedies) and `seesr info` (versions, device, bundle and limits as JSON)."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from seesr.config import Configuration, variable
from seesr.engine import preflight
from seesr.images import limits
from seesr.networks import hardware, weights
from seesr.networks.weights import WeightsError, gigabytes
from seesr.runtime.precision import working_dtype
from seesr.version import __version__

LIBRARIES = ("torch", "tokenizers", "safetensors", "pillow", "numpy", "opencv-python-headless")
DISK_NEED = 15  # GB, for the public weights and their conversion


class Finding(NamedTuple):
    """The result of one check: whether it passed, the message, and the remedy."""

    good: bool
    message: str
    remedy: str = ""


def findings(configuration: Configuration, bundle: Path | None, device: str | None) -> Iterator[Finding]:
    """Checks this installation, part by part."""
    yield Finding(True, f"Python {platform.python_version()}")
    named = device or configuration.device
    try:
        target = hardware.usable(named)
        yield Finding(True, f"torch {torch.__version__} on {hardware.name(target)}")
    except ValueError as error:
        yield Finding(False, str(error), "unset SEESR_DEVICE, or set it to cpu")
        named, target = "cpu", torch.device("cpu")
    try:
        kernel = hardware.choose(configuration.attention, target, working_dtype(target, configuration.precision))
        yield Finding(True, f"attention: {kernel}")
        if target.type == "cpu" and configuration.precision == "auto" and hardware.multiplies_bfloat16():
            yield Finding(True, "precision: float32; SEESR_PRECISION=bfloat16 is faster on this processor")
    except ValueError as error:
        yield Finding(False, str(error), "unset SEESR_ATTENTION and SEESR_PRECISION")
    path = bundle or configuration.weights or weights.locate()
    try:
        loaded = weights.verify(path)
    except WeightsError as error:
        remedy = "point SEESR_WEIGHTS to a bundle" if configuration.weights and not bundle else weights.FETCH
        yield Finding(False, f"weights: {error}", remedy)
    else:
        small = f"; this is the small model; the full one: {weights.FETCH}" if loaded.kind == "pocket" else ""
        yield Finding(True, f"weights: {loaded.name} in {path}, {len(loaded.files)} files verified{small}")
        try:
            preflight.require(path, named, configuration.precision)
            yield Finding(True, "this machine can run it")
        except preflight.CannotServe as error:
            yield Finding(False, str(error), "use a machine that meets this")
    disk = gigabytes(shutil.disk_usage(path if path.exists() else Path.cwd()).free)
    remedy = f"free some space: the public weights and their conversion take {DISK_NEED} GB"
    yield Finding(disk >= DISK_NEED, f"{disk:.0f} GB of disk free", remedy)


def check(configuration: Configuration, bundle: Path | None, device: str | None) -> int:
    """Prints one line per finding, and under a problem the command that repairs it. Returns the exit code."""
    code = 0
    for finding in findings(configuration, bundle, device):
        if finding.good:
            print(f"ok      {finding.message}")
        else:
            code = 1
            print(f"PROBLEM {finding.message}\n        to fix it: {finding.remedy}")
    return code


def problem(bundle: Path, device: str | None, precision: str) -> str | None:
    """Why this machine cannot serve the bundle, in one line; None if it can."""
    try:
        preflight.require(bundle, device, precision)
    except preflight.CannotServe as error:
        return str(error)
    return None


def info(configuration: Configuration, bundle: Path | None, device: str | None) -> dict[str, Any]:
    """Versions, device, GPU memory, bundle with its hashes, configuration and limits, for `json.dumps`.

    Raises:
        WeightsError: there is no bundle, or it is damaged.
        ValueError: the device cannot be used.
    """
    named = device or configuration.device
    target = hardware.usable(named)
    loaded = weights.verify(bundle or configuration.weights or weights.locate())
    return {
        "version": __version__,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        **hardware.about(target),
        "problem": problem(loaded.path, named, configuration.precision),
        "attention": hardware.choose(configuration.attention, target, working_dtype(target, configuration.precision)),
        "bundle": {**loaded._asdict(), "path": str(loaded.path)},
        "configuration": {variable(name): value for name, value in configuration.model_dump(mode="json").items()},
        "limits": {name.lower(): value for name, value in vars(limits).items() if name.startswith("LARGEST_")},
    }
