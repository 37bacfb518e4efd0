"""Folders of pictures for the command line: what is to be enlarged, where each result goes, what is done already."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from seesr.images.kinds import SUFFIXES
from seesr.images.record import read_record
from seesr.networks.weights import Bundle
from seesr.settings import Settings


class Task(NamedTuple):
    """One picture and where its result goes."""

    source: Path
    target: Path


class Plan(NamedTuple):
    """What a run has to do.

    Attributes:
        tasks: to do.
        done: how many results of these settings are there already.
        passed_over: a line for each kind of file in the folders that is not taken, with its number.
    """

    tasks: list[Task]
    done: int
    passed_over: list[str]


def make_plan(paths: list[Path], out: Path, settings: Settings, bundle: Bundle, masked: bool = False) -> Plan:
    """Looks through files and folders.

    A result is done if the record in its file names this bundle and these settings (any seed will do where none is
    asked for). Results of earlier runs that lie in the folders are not enlarged again unless they are named.

    Args:
        bundle: the weights in use.
        masked: whether a mask is used; what one made is always made again.
    """
    sources: dict[Path, Path] = {}  # file -> where its result goes below `out`, with the source's suffix
    passed_over: Counter[str] = Counter()
    for path in paths:
        if not path.is_dir():
            sources[path] = Path(path.name)
            continue
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() not in SUFFIXES:
                if not file.is_dir():
                    passed_over[f"{file.suffix.lower() or 'no suffix'}: no picture that can be read"] += 1
            elif record_of(file) is not None:
                passed_over["results of earlier runs; name a file to enlarge it again"] += 1
            else:
                sources[file] = file.relative_to(path)
    stems = Counter(name.with_suffix("") for name in sources.values())
    ending = f"-{settings.label}.{settings.suffix}"
    tasks = []
    for source, name in sources.items():
        stem = name.stem if stems[name.with_suffix("")] == 1 else name.name  # a.jpg beside a.png keep their suffixes
        tasks.append(Task(source, out / name.with_name(stem + ending)))
    todo = [task for task in tasks if masked or not is_done(task.target, settings, bundle)]
    lines = [f"{count} passed over, {reason}" for reason, count in passed_over.items()]
    return Plan(todo, len(tasks) - len(todo), lines)


def is_done(target: Path, settings: Settings, bundle: Bundle) -> bool:
    """Whether the file was made by this bundle with these settings."""
    record = record_of(target)
    if record is None or "mask_sha256" in record:
        return False
    asked, made, own = dataclasses.asdict(settings), record.get("settings", {}), bundle.defaults
    if settings.seed is None:
        asked["seed"] = made.get("seed")
    if settings.num_inference_steps is None:
        asked["num_inference_steps"] = own.num_inference_steps
    if settings.latent_tiled_size is None and made.get("latent_tiled_size") in own.latent_tiled_size:
        asked["latent_tiled_size"] = made["latent_tiled_size"]
    return record.get("bundle_sha256") == bundle.digest and made == asked


def record_of(path: Path) -> dict[str, Any] | None:
    """The settings record of a file, if there is one."""
    try:
        return read_record(path)
    except (ValueError, OSError):
        return None


def settings_like(path: Path, bundle: Bundle) -> Settings:
    """The settings that a file was made with, to make the same again.

    Raises:
        ValueError: it has no record, or was made by another bundle, whose pictures differ; one line.
    """
    try:
        record = read_record(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or 'it is no picture'}") from error
    if record.get("bundle_sha256") != bundle.digest:
        raise ValueError(f"{path} was made by another bundle ({record.get('bundle')}), not by this one ({bundle.name})")
    return Settings(**record["settings"])
