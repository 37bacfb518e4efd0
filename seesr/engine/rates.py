"""Measured cost of images on this machine: seconds, bytes and memory, refined by every image and kept in a file."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from seesr.images import write
from seesr.pipeline.work import Outline, Term

LATEST = 50  # images whose errors are kept
MIN_IMAGES = 3  # images without which no deadline is refused
FIRST_MARGIN = 1.5  # actual over quoted seconds that is allowed for before MIN_IMAGES images were measured
MEMORY = 0.9  # weight of all earlier images against the latest one
MIN_VARIATION = 0.01  # squared coefficient of variation of the units, below which they say nothing of fixed costs
PEAK_DECAY = 0.9  # of the memory for a megapixel at each larger image that took less
MIN_SECONDS = 1e-3  # of a stage: what is shorter is not measured well
log = logging.getLogger(__name__)


class CostLines:
    """A line of cost over units of work for every name, by least squares of the relative errors.

    Later values count more. No line has a negative slope or a negative fixed cost.
    """

    def __init__(self, sums: Mapping[str, list[float]] | None = None) -> None:
        self.sums = {name: list(map(float, values)) for name, values in (sums or {}).items()}

    def learn(self, name: str, units: float, cost: float) -> None:
        """Adds a measured cost of that many units."""
        weight = max(cost, MIN_SECONDS) ** -2
        before = self.sums.get(name, [0.0] * 5)
        added = (weight, weight * units, weight * units**2, weight * cost, weight * units * cost)
        self.sums[name] = [MEMORY * old + new for old, new in zip(before, added, strict=True)]

    def at(self, name: str, units: float) -> float | None:
        """The expected cost of that many units; None: none was measured."""
        if name not in self.sums:
            return None
        w, u, uu, c, uc = self.sums[name]
        if uu * w <= (1 + MIN_VARIATION) * u * u:  # all of one size
            return units * uc / uu if uu else c / w
        slope = (w * uc - u * c) / (w * uu - u * u)
        fixed = (c - slope * u) / w
        if slope < 0:
            return c / w
        return units * uc / uu if fixed < 0 else fixed + slope * units


@dataclasses.dataclass(frozen=True)
class Quote:
    """Expected time, size, memory and price of one image on this machine.

    Attributes:
        output_size: WIDTHxHEIGHT of the whole output, pixels.
        tiles: tiles that the denoiser computes over all steps.
        seconds: expected time without waiting; None: no image was measured yet.
        seconds_at_most: upper estimate, which none of the latest images would have exceeded; None as `seconds`.
        bytes: size of the result's file; None: no file of this format was measured yet.
        peak_memory_mb: expected peak memory of the process, by "host" and "device".
        price: price of `seconds` at SEESR_PRICE_PER_HOUR; None without it.
        images: number of images that were measured on this machine.
        wait: expected seconds in the queue.
    """

    output_size: str
    tiles: int
    seconds: float | None
    seconds_at_most: float | None
    bytes: int | None
    peak_memory_mb: dict[str, int]
    price: float | None
    images: int
    wait: float = 0.0

    @property
    def promised(self) -> float | None:
        """Upper estimate of the seconds from now to the result; None: too few images were measured."""
        if not self.seconds or self.seconds_at_most is None or self.images < MIN_IMAGES:
            return None
        return round((self.wait + self.seconds) * self.seconds_at_most / self.seconds, 3)

    def short(self) -> dict[str, float]:
        """The figures for the metrics of an image, without those that are unknown."""
        peak = self.peak_memory_mb.get("host")
        figures = {"seconds": self.seconds, "bytes": self.bytes, "peak_memory_mb": peak, "price": self.price}
        return {name: value for name, value in figures.items() if value is not None}


class Measured(NamedTuple):
    """A finished image.

    Attributes:
        terms: units by stage, see seesr.pipeline.work.terms.
        seconds: by stage, without those that an earlier run had computed.
        quoted: seconds that were expected for the whole; None: nothing was, or stages were reused.
        suffix, shown, length: of the file: its kind, megapixels and bytes.
        megapixels: of the whole output.
        before, after: by "host" and "device", the most memory that the process had held, MB.
    """

    terms: Mapping[str, Term]
    seconds: Mapping[str, float]
    quoted: float | None
    suffix: str
    shown: float
    length: int
    megapixels: float
    before: Mapping[str, int]
    after: Mapping[str, int]


class Rates:
    """Rates of one bundle on one device. Thread-safe.

    Args:
        path: the file that keeps them; None: they last as long as the process.

    Attributes:
        images: number of images that were measured, at least their denoiser.
        memory: by "host" and "device": MB that the process holds without an image, and MB for each megapixel of output.
        errors: actual over quoted seconds of the latest images.
        outline: of the bundle on this device; None: not known.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.lock, self.writing = path, threading.Lock(), threading.Lock()
        self.images, self.lines = 0, CostLines()
        self.memory: dict[str, tuple[float, float]] = {}
        self.errors: collections.deque[float] = collections.deque(maxlen=LATEST)
        self.outline: Outline | None = None
        if path is not None and path.exists():
            try:
                self.restore(json.loads(path.read_text()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                log.warning("%s cannot be used (%s); the rates of this machine are measured again", path, error)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Loads what `state` gave."""
        lines = CostLines(state["lines"])
        memory = {name: (float(base), float(each)) for name, (base, each) in state["memory"].items()}
        errors, images = [float(error) for error in state["errors"]], int(state["images"])
        if "outline" in state:
            outline = Outline(**state["outline"])
            self.outline = outline._replace(sides=tuple(outline.sides))
        self.lines, self.memory, self.images = lines, memory, images
        self.errors.extend(errors)

    def begin(self, peak: Mapping[str, int], outline: Outline) -> None:
        """Notes the loaded bundle, and the memory that the process had held before its first image, MB."""
        with self.lock:
            self.outline = outline
            for name, value in peak.items():
                _, each = self.memory.get(name, (value, 0.0))
                self.memory[name] = float(value), each

    def warm(self, terms: Mapping[str, Term], seconds: Mapping[str, float]) -> None:
        """Takes the first rates from an image of the warm-up, where there are none."""
        with self.lock:
            if not self.images:
                self.add_seconds(terms, seconds)

    def add_seconds(self, terms: Mapping[str, Term], seconds: Mapping[str, float]) -> None:
        for stage, term in terms.items():
            if stage in seconds and term.times:
                for name in term.names:
                    self.lines.learn(name, term.units, seconds[stage] / term.times)

    def learn(self, image: Measured) -> None:
        """Adds a finished image, and writes the file."""
        with self.lock:
            self.add_seconds(image.terms, image.seconds)
            self.lines.learn(f"bytes:{image.suffix}", image.shown, image.length)
            if image.quoted:
                self.errors.append(sum(image.seconds.values()) / image.quoted)
            self.images += "denoise" in image.seconds
            for name, value in image.after.items():
                base, each = self.memory.get(name, (float(value), 0.0))
                if value > image.before[name]:  # else a larger image took it
                    each = max((value - base) / image.megapixels, PEAK_DECAY * each)
                self.memory[name] = base, each
        self.save()

    def seconds(self, terms: Mapping[str, Term]) -> float | None:
        """Expected seconds of an image; None: no image was measured."""
        with self.lock:
            if "denoise" not in self.lines.sums:
                return None
            return sum(self.stage_seconds(term) for term in terms.values())

    def stage_seconds(self, term: Term) -> float:
        """Expected seconds of a stage; 0 for one that was not measured."""
        for name in term.names:
            if (result := self.lines.at(name, term.units)) is not None:
                return term.times * result
        return 0.0

    def length(self, suffix: str, shown: float) -> int | None:
        """Expected bytes of a file of that many megapixels; None: none of its kind was measured."""
        with self.lock:
            result = self.lines.at(f"bytes:{suffix}", shown)
        return None if result is None else round(result)

    def peak(self, megapixels: float) -> dict[str, int]:
        """Expected peak memory of the process with an image, by "host" and "device", MB."""
        with self.lock:
            return {name: round(base + each * megapixels) for name, (base, each) in self.memory.items()}

    @property
    def margin(self) -> float:
        """Largest ratio of actual to quoted seconds among the latest images, at least 1."""
        with self.lock:
            return max(1.0, *self.errors) if len(self.errors) >= MIN_IMAGES else FIRST_MARGIN

    def state(self) -> dict[str, Any]:
        """What `restore` takes over, as JSON has it. A copy: later images do not change it."""
        with self.lock:
            state: dict[str, Any] = {
                "images": self.images,
                "lines": {name: list(sums) for name, sums in self.lines.sums.items()},
                "memory": dict(self.memory),
                "errors": [round(error, 4) for error in self.errors],
            }
            if self.outline is not None:
                state["outline"] = self.outline._asdict()
            return state

    def save(self) -> None:
        """Writes the file. A disk that is full or read-only only logs a warning."""
        if self.path is None:
            return
        with self.writing:  # so that the last state to be written is the latest
            text = json.dumps(self.state())
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write.save(text.encode(), self.path)
            except (OSError, RuntimeError) as error:
                log.warning("the rates of this machine were not saved: %s", error)


def rates_file(folder: Path, digest: str, device: str, threads: int, workers: int) -> Path:
    """The file of a bundle on a device; on a CPU the number of threads counts.

    Args:
        digest: of the bundle.
        device: its name, with the precision if that is not the device's own.
        workers: processes that share the tiles of an image.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", device)
    shared = f"-x{workers}" if workers > 1 else ""
    return folder / f"{digest[:12]}-{name}{f'-{threads}' if device.startswith('cpu') else ''}{shared}.json"


def kept_files(digest: str) -> list[Path]:
    """The files of a user's rates of a bundle, one a device."""
    return list(user_folder().glob(f"{digest[:12]}-*.json"))


def latest_rates(digest: str, device: str | None) -> Rates | None:
    """The user's rates of a bundle that were changed last; None: there are none of such a device.

    Args:
        digest: of the bundle.
        device: "cpu" or "cuda", perhaps with a number; None: any.
    """
    files = kept_files(digest)
    if device is not None:
        files = [path for path in files if device.startswith("cpu") == ("-cpu-" in path.name)]
    return Rates(max(files, key=lambda path: path.stat().st_mtime)) if files else None


def user_folder() -> Path:
    """Where the rates for all programs of one user are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seesr/rates"
