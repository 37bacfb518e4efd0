"""The local command, for people with folders: `seesr upscale` and `seesr doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from seesr import logs, weights
from seesr.settings import Settings
from seesr.weights import WeightsError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
KINDS = {"float": float, "int": int, "str": str, "int | None": int}


def parser() -> argparse.ArgumentParser:
    """One flag per field of Settings, with its name, choices, default and description."""
    top = argparse.ArgumentParser(prog="seesr", description="SeeSR super-resolution on this machine.")
    commands = top.add_subparsers(dest="command", required=True)
    upscale = commands.add_parser("upscale", help="enlarge files and folders")
    upscale.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="picture, or folder of pictures")
    upscale.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    upscale.add_argument(
        "--bundle", type=Path, help="folder of weights (default: what SEESR_WEIGHTS names, or what is there)"
    )
    upscale.add_argument("--device", help="torch device (default: the GPU if there is one)")
    for field in dataclasses.fields(Settings):
        flag, words = "--" + field.name.replace("_", "-"), field.metadata["description"].replace("%", "%%")
        if str(field.type) == "bool":
            upscale.add_argument(flag, action=argparse.BooleanOptionalAction, default=field.default, help=words)
        else:
            kind, choices = KINDS[str(field.type)], field.metadata.get("choices")
            upscale.add_argument(flag, type=kind, choices=choices, default=field.default, help=words)
    commands.add_parser("doctor", help="check this installation and say how to mend it")
    return top


def pictures(paths: list[Path]) -> Iterator[tuple[Path, Path]]:
    """Every picture, and where its result goes below the output folder, without a suffix."""
    for path in paths:
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES):
                yield file, file.relative_to(path).with_suffix("")
        else:
            yield path, Path(path.stem)


def upscale(args: argparse.Namespace) -> int:
    """Enlarges every picture; a bad one fails alone. Returns the exit code."""
    from seesr import image
    from seesr.upscaler import Upscaler

    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    jobs: dict[Path, Path] = {}
    failed: list[str] = []
    for source, name in pictures(args.paths):
        target = args.out / name.with_name(f"{name.name}-x{settings.scale_factor:g}.{settings.output_format}")
        if target in jobs:
            failed.append(f"{source}: its result would replace that of {jobs[target]}; rename one")
        else:
            jobs[target] = source
    todo = {target: source for target, source in jobs.items() if not target.exists()}
    print(f"{len(todo)} to do, {len(jobs) - len(todo)} already there")
    upscaler = Upscaler.load(args.bundle, args.device) if todo else None
    for target, source in tqdm(todo.items(), unit="picture", disable=not todo):
        assert upscaler is not None
        try:
            result = upscaler(image.read(source, settings.output_size), settings)
            target.parent.mkdir(parents=True, exist_ok=True)
            image.write(result.view(settings.output_view), target, settings.output_format, settings.output_quality)
        except (ValueError, RuntimeError, OSError) as error:
            failed.append(f"{source}: {error}")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def doctor() -> int:
    """Prints one line per check, and under a problem the command that mends it. Returns the exit code."""
    problems = 0

    def check(good: bool, words: str, remedy: str) -> None:
        nonlocal problems
        problems += not good
        print(f"{'ok     ' if good else 'PROBLEM'} {words}")
        if not good:
            print(f"        mend it with: {remedy}")

    check(sys.version_info >= (3, 11), f"Python {platform.python_version()}", "install Python 3.11 or newer")
    try:
        import torch
    except ImportError as error:
        check(False, f"torch: {error}", "pip install -r requirements.txt")
        return 1
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        words = f"torch {torch.__version__} on {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        check(free > 6 * 2**30, words, "end other programs on the GPU (6 GiB are needed)")
    else:
        check(True, f"torch {torch.__version__} on the CPU: no GPU is visible", "")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    check(memory > 7, f"{memory:.1f} GiB of host memory", "use a machine with at least 8 GiB")
    from seesr import hardware

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kernel = hardware.choose(device, torch.float16 if device.type == "cuda" else torch.float32)
        check(True, f"attention: {kernel}", "")
    except ValueError as error:
        check(False, str(error), "unset SEESR_ATTENTION")
    path = weights.locate()
    try:
        bundle = weights.verify(path)
        check(True, f"weights: {bundle.name} in {path}, {len(bundle.files)} files verified", "")
        if bundle.kind == "pocket":
            print(f"        this is the small model; the full one comes with: {weights.FETCH}")
    except WeightsError as error:
        check(False, f"weights: {error}", weights.FETCH)
    disk = shutil.disk_usage(weights.ROOT).free / 1e9
    check(
        disk > 15, f"{disk:.0f} GB of disk free", "free some space: the public weights and their conversion take 15 GB"
    )
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logs.configure(logging.WARNING)
    try:
        return doctor() if args.command == "doctor" else upscale(args)
    except (ValueError, WeightsError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what is finished stays, and is skipped the next time", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
