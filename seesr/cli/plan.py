"""Plans a run of `seesr upscale`: finds the images, names the results, and skips what is done.

No network is loaded here.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from seesr.images.formats import FORMATS, ZIP
from seesr.images.kinds import SUFFIXES, media_type
from seesr.images.record import read_record, record_of
from seesr.networks.weights import Bundle
from seesr.settings import Settings

STREAM = "-"  # standard input or output
RAW = {".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".pef", ".raf", ".rw2", ".srw"}  # cameras' own kinds of TIFF
SIDECARS = {"thumbs.db", "desktop.ini", "__macosx"}  # and all names that begin with a dot
RESULTS = "results of earlier runs; name a file to upscale it again"


class Failure(Exception):
    """One file cannot be done. The message is one line without the file's name."""


@dataclasses.dataclass
class Task:
    """One image.

    Attributes:
        source: the file, or "-" for standard input.
        place: its path below the folder of the results, with the source's name.
        folder: what `place` is relative to.
        target: the result's file, or "-" for standard output.
        source_size, size: (width, height) of the source and the result; (0, 0) before the header was read.
        error: why it cannot be done.
        done: the result is there already.
        data: the bytes of standard input.
    """

    source: str
    place: Path
    folder: Path
    target: str = ""
    source_size: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    error: str | None = None
    done: bool = False
    data: bytes | None = None


class RunPlan(NamedTuple):
    """All images of a run in their order, and how many files of folders were passed over for which reason."""

    tasks: list[Task]
    passed_over: Counter[str]


class Destination(NamedTuple):
    """Where results go: at most one of a file, a folder and standard output; none: beside each source."""

    file: Path | None = None
    folder: Path | None = None
    stream: bool = False


def find_sources(arguments: list[str], recursive: bool) -> Iterator[tuple[str, Path | None]]:
    """Arguments -> (path, the folder in which it was found; None for a file that was named itself).

    A pattern such as "*.jpg" that the shell has not expanded is expanded here. Names of files that belong to a system
    or a file manager are left out.
    """
    for argument in arguments:
        matches = [argument]
        if glob.has_magic(argument) and not os.path.lexists(argument):
            matches = sorted(glob.glob(argument, recursive=True)) or matches  # noqa: PTH207 (names that are not UTF-8)
        for match in matches:
            if match == STREAM or not os.path.isdir(match):  # noqa: PTH112 (names that are not UTF-8)
                yield match, None
                continue
            for top, folders, files in os.walk(match):
                folders[:] = sorted(name for name in folders if not is_sidecar(name)) if recursive else []
                yield from ((os.path.join(top, name), Path(match)) for name in sorted(files) if not is_sidecar(name))  # noqa: PTH118


def is_sidecar(name: str) -> bool:
    return name.startswith(".") or name.lower() in SIDECARS


def collect(arguments: list[str], recursive: bool) -> RunPlan:
    """The images that the arguments name, each once, without targets; other files in a folder are counted."""
    tasks: list[Task] = []
    seen: set[str] = set()
    passed_over: Counter[str] = Counter()
    for path, folder in find_sources(arguments, recursive):
        real = path if path == STREAM else os.path.realpath(path)
        if real in seen:
            continue
        seen.add(real)
        if path == STREAM:
            tasks.append(Task(path, Path("stdin"), Path()))
        elif folder is None:
            tasks.append(Task(path, Path(os.path.basename(path)), Path(path).parent))  # noqa: PTH119
        else:
            reason = skip_reason(Path(path))
            if reason is None:
                tasks.append(Task(path, Path(path).relative_to(folder), folder))
            else:
                passed_over[reason] += 1
    return RunPlan(tasks, passed_over)


def skip_reason(path: Path) -> str | None:
    """Why a file of a folder is passed over; None: it is upscaled, or fails by name."""
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            head = file.peek()
    except OSError:
        return None
    if suffix not in SUFFIXES and (suffix in RAW or media_type(head) is None):
        return f"{suffix or 'no suffix'}: not a readable image"
    return RESULTS if record_of(path) is not None else None


def choose_output(out: str | None, tasks: list[Task], folders: bool) -> Destination:
    """What `--out` names: `-`, a file if it has the suffix of a format that is written, else a folder.

    Args:
        folders: whether a folder is among the arguments.

    Raises:
        ValueError: one file or standard output for several images.
    """
    if out is None:
        return Destination(stream=[task.source for task in tasks] == [STREAM])
    path = Path(out)
    single = out == STREAM or (
        path.suffix.lower().removeprefix(".").replace("jpeg", "jpg") in (*FORMATS, ZIP)
        and not path.is_dir()
        and not out.endswith("/")
    )
    if not single:
        return Destination(folder=path)
    if len(tasks) != 1 or folders:
        raise ValueError(
            f"--out {out} is one file, and there are {len(tasks)} images: name a folder, such as --out x4/"
        )
    return Destination(stream=True) if out == STREAM else Destination(file=path)


def name_targets(tasks: list[Task], output: Destination, settings: Settings) -> None:
    """Gives every task its own target. Names are extended by the suffix or the folder of the source where they need to.

    Args:
        output: where results go.
    """
    if output.stream or output.file is not None:
        for task in tasks:
            task.target = STREAM if output.stream else str(output.file)
        return
    ending = f"-{settings.label}.{settings.suffix}"
    names = [names_of(task, ending, number) for number, task in enumerate(tasks, 1)]
    levels = [0] * len(tasks)
    while True:
        groups: dict[Path, list[int]] = defaultdict(list)
        for number, task in enumerate(tasks):
            top = output.folder if output.folder is not None else task.folder
            groups[top / names[number][levels[number]]].append(number)
        clashes = [group for group in groups.values() if len(group) > 1]
        if not clashes:
            break
        for group in clashes:
            least = min(levels[number] for number in group)
            for number in group:
                levels[number] += levels[number] == least
    for target, (number,) in groups.items():
        tasks[number].target = str(target)


def names_of(task: Task, ending: str, number: int) -> tuple[Path, ...]:
    """The names that a result can have, the first that is free is taken.

    Returns:
        The source's stem, its name with the suffix, its stem below its folder's name, and its name with the number.
    """
    place = task.place
    stem, whole, numbered = (
        place.with_name(name + ending) for name in (place.stem, place.name, f"{place.name}-{number}")
    )
    return stem, whole, Path(task.folder.resolve().name) / stem, numbered


def check_target(task: Task, sources: set[str], overwrite: bool) -> None:
    """Refuses a target that cannot be written, or must not be.

    Args:
        sources: real paths of all sources.

    Raises:
        Failure: one line.
    """
    target = Path(task.target)
    longest = os.pathconf(existing_parent(target), "PC_NAME_MAX")
    length = len(os.fsencode(target.name))
    if length > longest:
        raise Failure(f"the output name has {length} bytes, the limit is {longest}: choose a shorter name with --out")
    if os.path.realpath(target) in sources:
        raise Failure(f"the output would replace {target}, which is one of the images: choose another --out")
    if target.is_dir():
        raise Failure(f"{target} is a folder: choose another --out")
    if target.exists() and not overwrite and record_of(target) is None:
        raise Failure(f"{target} exists and was not written by seesr: use --overwrite, or choose another --out")


def existing_parent(path: Path) -> Path:
    """The nearest folder above that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def check_folders(tasks: list[Task]) -> None:
    """Sees whether files can be written where the results go.

    Raises:
        ValueError: a folder cannot be written to; one line.
    """
    for folder in {existing_parent(Path(task.target)) for task in tasks}:
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ValueError(f"{folder} cannot be written to: {error.strerror}") from error


def is_done(target: Path, settings: Settings, bundle: Bundle, source_sha256: str) -> bool:
    """Whether the file was made from this source by this bundle with these settings; unset ones are the bundle's own,
    and any seed will do.
    """
    record = record_of(target)
    if record is None or "mask_sha256" in record:
        return False
    requested, recorded, defaults = settings.recorded, record["settings"], bundle.defaults
    if settings.seed is None:
        requested["seed"] = recorded.get("seed")
    if settings.num_inference_steps is None:
        requested["num_inference_steps"] = defaults.num_inference_steps
    if settings.latent_tiled_size is None and recorded.get("latent_tiled_size") in defaults.latent_tiled_size:
        requested["latent_tiled_size"] = recorded["latent_tiled_size"]
    same = recorded == requested and record.get("bundle_sha256") == bundle.digest
    return same and record.get("source_sha256") == source_sha256


def settings_like(path: Path, bundle_digest: str) -> Settings:
    """The settings that a file was made with, to make the same again.

    Raises:
        ValueError: it has no record, or was made by another bundle, whose images differ; one line.
    """
    try:
        record = read_record(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or 'it is not an image'}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if record.get("bundle_sha256") != bundle_digest:
        raise ValueError(f"{path} was made with another bundle ({record.get('bundle')}): select it with --bundle")
    return Settings(**record["settings"])


def in_one_line(work: Callable[[], object]) -> str | None:
    """Runs `work`; why it failed in one line, or None."""
    try:
        work()
    except (Failure, ValueError) as error:
        return str(error)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    except Exception as error:
        return " ".join(f"{type(error).__name__} {error}".split())
    return None
