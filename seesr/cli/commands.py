"""The local command, for people with folders: `seesr upscale`, `seesr doctor`, `seesr info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seesr import logs
from seesr.cli.folder import make_plan, settings_like
from seesr.config import Configuration
from seesr.fleet import ORDERS
from seesr.images import write
from seesr.networks.weights import CannotServe, WeightsError
from seesr.runtime.progress import Bar
from seesr.settings import Settings
from seesr.settings.cog_schema import MASK
from seesr.settings.presets import PRESETS


def parser(preset: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """One flag per field of Settings, with its name, range, default (that of the preset, if any) and description."""
    preset = preset or {}
    top = argparse.ArgumentParser(prog="seesr", description="SeeSR super-resolution on this machine.")
    commands = top.add_subparsers(dest="command", required=True)
    upscale = commands.add_parser("upscale", help="enlarge files and folders")
    upscale.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="picture, or folder of pictures")
    upscale.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    upscale.add_argument(
        "--like", type=Path, metavar="FILE", help="take all settings from a file that was made before, not from flags"
    )
    upscale.add_argument("--preset", choices=PRESETS, help="a named set of settings; flags that are given go before it")
    upscale.add_argument("--mask", type=Path, metavar="FILE", help=MASK)
    doctor = commands.add_parser("doctor", help="check this installation and say how to repair it")
    info = commands.add_parser("info", help="print versions, device, bundle, configuration and limits as JSON")
    serve = commands.add_parser("serve", help="answer HTTP: Replicate's API, a plain one, and a page")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    serve.add_argument("--port", type=int, default=5000, help="0 takes any that is free (default: 5000)")
    commands.add_parser("worker", help="make the pictures of a fleet on this GPU (SEESR_REDIS, SEESR_STORE)")
    fleet = commands.add_parser("fleet", help="look after the workers of a fleet")
    fleet.add_argument("order", choices=ORDERS, help="; ".join(f"{name}: {words}" for name, words in ORDERS.items()))
    fleet.add_argument("worker", nargs="?", help="its name, as status shows it (default: all, one after the other)")
    for command in (upscale, doctor, info, serve):
        command.add_argument("--bundle", type=Path, help="folder of weights (default: SEESR_WEIGHTS, or what is there)")
        command.add_argument("--device", help="torch device (default: SEESR_DEVICE, or the GPU if there is one)")
    for field in dataclasses.fields(Settings):
        about = field.metadata
        flag, words = "--" + field.name.replace("_", "-"), about["description"].replace("%", "%%")
        value = preset.get(field.name, field.default)
        default = about.get("empty", "none") if value is None else repr(value)
        if about["kind"] is bool:
            words += f" (default: {'on' if value else 'off'})"
            upscale.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=words)
            continue
        span = f"{about['ge']} to {about['le']}, " if "ge" in about else ""
        words += f" ({span}default: {default})"
        upscale.add_argument(
            flag, type=about["kind"], choices=about.get("choices"), default=value, help=words,
            metavar=None if "choices" in about else about["kind"].__name__.upper(),
        )  # fmt: skip
    return top


def upscale(args: argparse.Namespace) -> int:
    """Enlarges every picture; a bad one fails alone. Returns the exit code."""
    from seesr.engine.engine import Engine

    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        write.save(b"", probe := args.out / ".seesr-probe")
        probe.unlink()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"--out {args.out} cannot be written to: {getattr(error, 'strerror', error)}") from error
    engine = Engine.load(args.bundle, args.device)
    if args.like:
        settings = settings_like(args.like, engine.loaded)
    plan = make_plan(args.paths, args.out, settings, engine.loaded, args.mask is not None)
    print(f"{len(plan.tasks)} to do, {plan.done} already there, bundle {engine.loaded.name}")
    for line in plan.passed_over:
        print(line)
    if not plan.tasks and not plan.done:
        raise ValueError(f"there is no picture in {', '.join(map(str, args.paths))}")
    failed: list[str] = []
    for source, target in plan.tasks:
        started = time.perf_counter()
        bar = Bar()
        try:
            output = engine.run(source, settings, watchers=(bar,), mask=args.mask)
            target.parent.mkdir(parents=True, exist_ok=True)
            write.save(output.data, target)
        except (ValueError, RuntimeError, OSError) as error:
            failed.append(f"{source}: {getattr(error, 'strerror', None) or error}")
            continue
        finally:
            bar.close()
        print(f"{source} -> {target}, seed {output.seed}, {time.perf_counter() - started:.1f} s", flush=True)
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0: all is well, 1: something failed, 2: it was asked for wrongly, 3: this machine cannot do it,
    130: interrupted.
    """
    words = parser()
    if preset := words.parse_args(argv).__dict__.get("preset"):
        words = parser(PRESETS[preset])
    args = words.parse_args(argv)
    try:
        configuration = Configuration.read()
        logs.configure(configuration.log_format, logging.WARNING)
        if args.command == "upscale":
            return upscale(args)
        if args.command == "serve":
            from seesr.serving.app import serve

            logs.configure(configuration.log_format)
            fleet = None
            if configuration.redis:
                from seesr.fleet.gateway import parts as fleet
            return serve(configuration, args.host, args.port, args.bundle, args.device, fleet)
        if args.command in ("worker", "fleet"):
            if not configuration.redis:
                raise ValueError("SEESR_REDIS names no queue: redis://host:6379/0")
            if args.command == "fleet":
                from seesr.fleet.control import command

                return command(configuration, args.order, args.worker)
            from seesr.fleet.worker import run

            run()  # becomes Celery and does not return
        from seesr.cli import doctor

        if args.command == "info":
            print(json.dumps(doctor.info(configuration, args.bundle, args.device), indent=1))
            return 0
        return doctor.check(configuration, args.bundle, args.device)
    except (ValueError, WeightsError) as error:
        print(error, file=sys.stderr)
        return 2
    except CannotServe as error:
        print(error, file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("stopped; what is finished stays, and is skipped the next time", file=sys.stderr)
        return 130
