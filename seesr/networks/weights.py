"""Weight bundles on disk: location, manifest and sha256 verification. Does not import torch.

A bundle is a folder of diffusers-style sub-folders (unet, controlnet, vae, text_encoder, tokenizer, scheduler,
tagger) and a bundle.json that names it and holds the sha256 of every file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

MANIFEST = "bundle.json"
ROOT = Path(__file__).resolve().parents[2] / "weights"
FULL, POCKET = ROOT / "full", ROOT / "pocket"
FETCH = "./scripts/weights"


def gigabytes(size: int) -> float:
    """Bytes as GB."""
    return size / 1e9


class WeightsError(RuntimeError):
    """Weights are missing, damaged or do not fit the networks. The message says which, and what to do."""


class CannotServe(RuntimeError):
    """This machine cannot run this bundle. One line: what is missing, what to do."""


class Defaults(NamedTuple):
    """A bundle's defaults for unset settings.

    Attributes:
        num_inference_steps: denoising steps.
        latent_tiled_size: sides of the denoiser's tiles, latent pixels; the one with the least work is used.
    """

    num_inference_steps: int = 4
    latent_tiled_size: tuple[int, ...] = (64,)


DEFAULTS = {
    "pocket": Defaults(1, (64, 72)),  # more steps cost more and score no better (results/presets.json)
    "full": Defaults(2, (64, 72)),  # as SeeSR's own script for SD-Turbo
}


class Bundle(NamedTuple):
    """A verified bundle. `files` maps relative paths to sha256 sums."""

    path: Path
    name: str
    kind: str
    licence: str
    files: dict[str, str]
    defaults: Defaults = Defaults()

    @property
    def digest(self) -> str:
        """SHA-256 of the name and of all files' sums: distinguishes bundles of the same name."""
        return hashlib.sha256(json.dumps([self.name, sorted(self.files.items())]).encode()).hexdigest()


def locate() -> Path:
    """The bundle to load where none is named: the full one if it is there, else the pocket one."""
    return FULL if (FULL / MANIFEST).exists() else POCKET


def sha256(path: Path) -> str:
    """SHA-256 of a file, cached until the file changes."""
    status = path.stat()
    return sum_of(path, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache
def sum_of(path: Path, *identity: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(path: Path) -> Bundle:
    """What bundle.json says, without a look at the files.

    Raises:
        WeightsError: there is no bundle, or its manifest cannot be read.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        values = manifest.get("defaults", Defaults()._asdict())  # bundles that were converted before have none
        defaults = Defaults(values["num_inference_steps"], tuple(values["latent_tiled_size"]))
        return Bundle(path, manifest["name"], manifest["kind"], manifest["licence"], manifest["files"], defaults)
    except FileNotFoundError:
        raise WeightsError(f"no weights at {path}: set SEESR_WEIGHTS to a bundle, or fetch one with: {FETCH}") from None
    except PermissionError as error:
        raise WeightsError(
            f"{error.filename} cannot be read by user {os.geteuid()}: run: sudo chmod -R a+rX {path}"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{path / MANIFEST} is not a bundle manifest ({error}): fetch it again with: {FETCH}"
        ) from None


def verify(path: Path) -> Bundle:
    """Reads bundle.json and checks every file against it.

    Raises:
        WeightsError: no bundle, or a file that is missing, extra or altered.
    """
    try:
        return _checked(read_manifest(path))
    except PermissionError as error:
        raise WeightsError(
            f"{error.filename} cannot be read by user {os.geteuid()}: run: sudo chmod -R a+rX {path}"
        ) from None


def _checked(bundle: Bundle) -> Bundle:
    """The bundle, when its files are those of its manifest."""
    path = bundle.path
    for folder in {(path / name).parent for name in bundle.files}:
        if folder.is_dir():
            os.scandir(folder).close()  # a folder that cannot be read would look empty
    present = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} - {MANIFEST}
    for name in sorted(set(bundle.files) ^ present):
        fault = "is missing" if name in bundle.files else f"is not listed in {MANIFEST}"
        raise WeightsError(f"{path / name} {fault}: fetch the bundle again with: {FETCH}")
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        sums = dict(zip(bundle.files, pool.map(lambda name: sha256(path / name), bundle.files), strict=True))
    for name, expected in bundle.files.items():
        if sums[name] != expected:
            raise WeightsError(
                f"{path / name} is damaged: sha256 is {sums[name]}, expected {expected}: fetch it again with: {FETCH}"
            )
    return bundle


def write_manifest(path: Path, name: str, kind: str, licence: str) -> None:
    """Writes bundle.json over all files that lie in `path` now, with the defaults of this kind."""
    names: Iterable[str] = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file())
    files = {n: sha256(path / n) for n in names if n != MANIFEST}
    manifest: dict[str, object] = {"name": name, "kind": kind, "licence": licence}
    if kind in DEFAULTS:
        manifest["defaults"] = DEFAULTS[kind]._asdict()
    manifest["files"] = files
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
