"""Fetches photographs under free licences from Debian's packages, selects them and reduces them.

    python -m lab.quality.photographs       needs apt and dpkg-deb; nothing is installed

What is kept goes to build/pocket/photographs as JPEG of quality 97 without chroma subsampling, its list with package,
licence and sha256 to results/pocket-photographs.json. A fifth, by hash, is held out of the training.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import json
import logging
import subprocess
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from lab import report
from lab.quality.degradations import Rgb

log = logging.getLogger(__name__)

WORK, SEED = Path("build/pocket"), 20
FOLDER = WORK / "photographs"
LIST = report.RESULTS / "pocket-photographs.json"
WALLPAPERS = (
    "gnome-backgrounds",
    "lomiri-wallpapers-16.04",
    "lomiri-wallpapers-20.04",
    "mate-backgrounds",
    "plasma-workspace-wallpapers",
    "ukui-wallpapers",
)
STAMPS = "tuxpaint-stamps-default"  # photographs of single things, cut out
LONGEST = 960  # of a kept image: at most 1/2.4 of the file's, so that the file's own compression and noise vanish
MIN_SHRINK = 2.4
MIN_DETAIL = 1.3  # mean luma step between neighbours: below are gradients and flat drawings
STAMP_SIDE, STAMP_BYTES, MAX_STAMPS = 224, 35_000, 160


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A kept image: its name in FOLDER, the file it was made from, and whether training may see it."""

    name: str
    package: str
    file: str
    licence: str
    sha256: str
    held_out: bool


def fetch(package: str) -> Path:
    """Downloads and unpacks a package -> the folder with its files."""
    folder = WORK / "packages" / package
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=folder.parent, check=True, stderr=subprocess.DEVNULL)
        (archive,) = folder.parent.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive.name, folder.name], cwd=folder.parent, check=True)
    return folder


def licence_of(folder: Path, path: Path) -> str:
    """From the package's machine-readable copyright file; the last stanza that matches counts."""
    (copyright_file,) = folder.glob("usr/share/doc/*/copyright")
    result = "see the package's copyright file"
    for stanza in copyright_file.read_text().split("\n\n"):
        patterns, licence = [], ""
        for line in stanza.splitlines():
            key, _, value = line.partition(":")
            if key == "Files":
                patterns = [pattern for pattern in value.split() if not pattern.startswith("debian/")]
            elif key == "License":
                licence = value.strip()
        if any(fnmatch.fnmatch(path.name, Path(pattern).name) for pattern in patterns) and licence:
            result = licence
    return result


def detail(image: Rgb) -> float:
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return float(np.abs(np.diff(grey, axis=1)).mean())


def wallpapers(folder: Path) -> list[tuple[Path, Rgb]]:
    """The detailed images of a package, each motif once, averaged down."""
    largest: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png", ".webp") or path.stem.endswith("-d"):
            continue  # -d is the dark twin of -l
        motif = path.parent.parent.parent.name if "contents" in path.parts else path.stem.split("_")[0]
        if motif not in largest or path.stat().st_size > largest[motif].stat().st_size:
            largest[motif] = path
    images = []
    for path in largest.values():
        with Image.open(path) as image:
            width, height = image.size
            shrink = max(MIN_SHRINK, max(width, height) / LONGEST)
            size = round(width / shrink), round(height / shrink)
            if min(size) < 256:
                continue
            small = cv2.resize(np.asarray(image.convert("RGB")), size, interpolation=cv2.INTER_AREA)
        if detail(small) > MIN_DETAIL:
            images.append((path, small))
    return images


def stamps(folder: Path) -> list[tuple[Path, Rgb]]:
    """Cut-out photographs of things, each laid on a soft ground of one or two colours."""
    images = []
    for path in sorted(folder.rglob("*.png")):
        if path.stat().st_size < STAMP_BYTES or path.stem.endswith(("_mirror", "_flip")) or len(images) == MAX_STAMPS:
            continue
        with Image.open(path) as image:
            rgba = np.asarray(image.convert("RGBA")).astype(np.float32)
        if min(rgba.shape[:2]) < STAMP_SIDE or rgba[..., 3].mean() < 80:
            continue
        rng = np.random.default_rng([SEED, len(images)])
        ground = cv2.resize(rng.uniform(0, 255, (2, 2, 3)).astype(np.float32), rgba.shape[1::-1])
        alpha = rgba[..., 3:] / 255
        laid = (alpha * rgba[..., :3] + (1 - alpha) * ground).round().astype(np.uint8)
        if max(laid.shape[:2]) > LONGEST:
            laid = cv2.resize(laid, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        images.append((path, laid))
    return images


def gather() -> list[Photograph]:
    """Fetches all packages and writes the images and their list."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    results = []
    for package in (*WALLPAPERS, STAMPS):
        folder = fetch(package)
        for path, image in (stamps if package == STAMPS else wallpapers)(folder):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            name = f"{package}-{path.parts[-4] if 'contents' in path.parts else path.stem}.jpg"
            Image.fromarray(image).save(FOLDER / name, quality=97, subsampling=0)
            held_out = int(digest, 16) % 5 == 0
            file = str(path.relative_to(folder))
            results.append(Photograph(name, package, file, licence_of(folder, path), digest, held_out))
        log.info("%s: %d images", package, sum(row.package == package for row in results))
    report.write(LIST, [dataclasses.asdict(row) for row in results])
    return results


@functools.cache
def photographs(held_out: bool) -> dict[str, list[Rgb]]:
    """The kept images of both kinds: `wallpapers` and `stamps`."""
    if not LIST.exists() or not FOLDER.exists():
        gather()
    rows = [Photograph(**row) for row in json.loads(LIST.read_text())["rows"]]
    kinds: dict[str, list[Rgb]] = {"wallpapers": [], "stamps": []}
    for row in rows:
        if row.held_out == held_out:
            image = np.asarray(Image.open(FOLDER / row.name))
            kinds["stamps" if row.package == STAMPS else "wallpapers"].append(image)
    return kinds


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    gather()
