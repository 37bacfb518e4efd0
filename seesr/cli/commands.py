"""The `seesr` command: argument parser and dispatch to the subcommands."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seesr import logs
from seesr.fleet import ORDERS
from seesr.networks.weights import CannotServe, WeightsError
from seesr.settings import Settings
from seesr.settings.presets import PRESETS
from seesr.version import __version__

COMMANDS = ("upscale", "verify", "serve", "doctor", "info", "mcp", "worker", "fleet", "keys", "completion")
SHELLS = ("bash", "zsh", "fish")
OUTPUT_FLAGS = ("-o", "--out")
ABOUT = """SeeSR super-resolution on this machine.

  seesr photo.jpg                     writes photo-x4.png beside it
  seesr holiday/ --out holiday-x4/    a folder, with its sub-folders
  cat a.jpg | seesr - > a-x4.png      standard input and output

`seesr FILE` is short for `seesr upscale FILE`; `seesr upscale --help` lists all settings."""
CODES = """exit codes: 0 all images are done; 1 an image failed; 2 usage, configuration or weights error; 3 this machine
cannot run these weights; 130 interrupted, finished outputs are kept"""
VERIFY_CODES = """exit codes: 0 everything that was checked is right; 1 something is not (another source, other bytes,
no mark, a manifest that is not valid); 2 it cannot be checked (no record, another bundle, a mask that was not
given); 3 this machine cannot run these weights"""


def parser(preset: Mapping[str, Any] | None = None) -> argparse.ArgumentParser:
    """One flag per field of Settings, with its name, range, default (that of the preset, if any) and description."""
    top = argparse.ArgumentParser(
        prog="seesr", description=ABOUT, epilog=CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"seesr {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")
    upscale = commands.add_parser("upscale", help="upscale files and folders (the default command)", epilog=CODES)
    verify = commands.add_parser(
        "verify", help="say what made a file, check it, and make it again from its source", epilog=VERIFY_CODES
    )
    verify.add_argument("file", type=Path, metavar="FILE", help="result of an earlier run")
    verify.add_argument("source", type=Path, nargs="?", metavar="SOURCE", help="run again on it and compare the bytes")
    verify.add_argument("--mask", type=Path, metavar="FILE", help="mask of the earlier run")
    verify.add_argument("--json", action="store_true", help="one JSON object on standard output")
    doctor = commands.add_parser("doctor", help="check this installation and print how to fix it")
    info = commands.add_parser("info", help="print versions, device, bundle, configuration and limits as JSON")
    info.add_argument("--json", action="store_true", help="accepted for consistency; the output is always JSON")
    serve = commands.add_parser("serve", help="run the HTTP server: Replicate's API, a plain API and a web page")
    mcp = commands.add_parser("mcp", help="run the MCP server on stdio, with the tools upscale, quote and status")
    mcp.add_argument("--http", action="store_true", help="run the HTTP server, with the MCP tools at /mcp")
    for command in (serve, mcp):
        command.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
        command.add_argument("--port", type=int, default=5000, help="0 uses a free port (default: %(default)s)")
    commands.add_parser("worker", help="run the jobs of a fleet on this GPU (SEESR_REDIS, SEESR_STORE)")
    fleet = commands.add_parser("fleet", help="manage the workers of a fleet")
    fleet.add_argument("order", choices=ORDERS, help="; ".join(f"{name}: {text}" for name, text in ORDERS.items()))
    fleet.add_argument("worker", nargs="?", help="its name, as status shows it (default: all, one after the other)")
    add_keys(commands.add_parser("keys", help="add, revoke and list the API keys of SEESR_KEYS_FILE"))
    completion = commands.add_parser("completion", help="print a shell completion script")
    completion.add_argument("shell", choices=SHELLS, help='for bash and zsh: eval "$(seesr completion bash)"')
    add_upscale(upscale, preset or {})
    for command in (upscale, verify, doctor, info, serve, mcp):
        command.add_argument("--bundle", type=Path, help="folder of weights (default: SEESR_WEIGHTS)")
        command.add_argument("--device", help="torch device (default: SEESR_DEVICE, or the GPU if there is one)")
    return top


def add_upscale(upscale: argparse.ArgumentParser, preset: Mapping[str, Any]) -> None:
    """The arguments of `seesr upscale`."""
    upscale.add_argument(
        "paths", nargs="+", metavar="PATH", help='image, folder, pattern such as "*.jpg", or - (stdin)'
    )
    upscale.add_argument(
        *OUTPUT_FLAGS, metavar="PATH",
        help="file (its suffix is the format), folder, or - (stdout); default: beside each image, as NAME-x4.png",
    )  # fmt: skip
    upscale.add_argument(
        "--recursive", action=argparse.BooleanOptionalAction, default=True, help="include sub-folders (default: on)"
    )
    upscale.add_argument("--overwrite", action="store_true", help="also replace files that seesr did not write")
    upscale.add_argument("--dry-run", action="store_true", help="print the planned outputs with estimated times")
    upscale.add_argument("--json", action="store_true", help="one JSON object per image on standard output")
    upscale.add_argument(
        "--like", type=Path, metavar="FILE", help="use the settings of an earlier output instead of flags"
    )
    upscale.add_argument("--preset", choices=PRESETS, help="a named set of settings; flags override it")
    upscale.add_argument(
        "--mask", type=Path, metavar="FILE",
        help="image of the same aspect ratio: white is enhanced, black stays the bicubic upscale, grey blends",
    )  # fmt: skip
    upscale.add_argument(
        "--tile-workers", type=int, metavar="N",
        help="processes that share the tiles of each image, with the same bytes (default: SEESR_TILE_WORKERS, or 1)",
    )  # fmt: skip
    for field in dataclasses.fields(Settings):
        about = field.metadata
        flag, description = "--" + field.name.replace("_", "-"), about["description"].replace("%", "%%")
        value = preset.get(field.name, field.default)
        default = about.get("empty", "none") if value is None else repr(value)
        if about["kind"] is bool:
            description += f" (default: {'on' if value else 'off'})"
            upscale.add_argument(flag, action=argparse.BooleanOptionalAction, default=value, help=description)
            continue
        span = f"{about['ge']} to {about['le']}, " if "ge" in about else ""
        description += f" ({span}default: {default})"
        upscale.add_argument(
            flag, type=about["kind"], choices=about.get("choices"), default=value, help=description,
            metavar=None if "choices" in about else about["kind"].__name__.upper(),
        )  # fmt: skip


def add_keys(keys: argparse.ArgumentParser) -> None:
    """The arguments of `seesr keys`."""
    orders = keys.add_subparsers(dest="order", required=True, metavar="ORDER")
    add = orders.add_parser("add", help="create a key and print its token; keys of the same name share their jobs")
    add.add_argument("name")
    add.add_argument("--rate", type=int, metavar="N", help="POST requests a minute (default: SEESR_RATE)")
    add.add_argument("--share", type=float, help="largest share of the queue (default: SEESR_QUEUE_SHARE)")
    add.add_argument("--megapixels-per-day", type=float, metavar="MP", help="quota of results (default: none)")
    add.add_argument("--priorities", metavar="LIST", help="such as normal,low (default: all)")
    add.add_argument("--expires", metavar="YYYY-MM-DD", help="date from which the key is invalid")
    revoke = orders.add_parser("revoke", help="remove a key")
    revoke.add_argument("name", help="a name, for all of its keys, or the id of one key, as list shows it")
    orders.add_parser("list", help="show all keys, without tokens")


def with_command(argv: list[str]) -> list[str]:
    """Puts `upscale` first where no command is named."""
    first, *_ = argv
    return argv if first in (*COMMANDS, "-h", "--help", "--version") else ["upscale", *argv]


def main(argv: list[str] | None = None) -> int:
    """Runs one command. The exit codes are in CODES."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names that are not UTF-8 are shown with escapes, and each line at once
            stream.reconfigure(errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    argv = sys.argv[1:] if argv is None else argv
    if "_ARGCOMPLETE" in os.environ:
        complete()
    if not argv:
        parser().print_help()
        return 2
    first, *_ = argv
    close = difflib.get_close_matches(first, COMMANDS)
    if close and first not in COMMANDS and not os.path.lexists(first):
        print(f"{first}: no such file; is it {' or '.join(close)}?", file=sys.stderr)
        return 2
    argv = with_command(argv)
    args = parser().parse_args(argv)
    if preset := getattr(args, "preset", None):
        args = parser(PRESETS[preset]).parse_args(argv)
    try:
        return run(args)
    except (ValueError, WeightsError) as error:
        print(error, file=sys.stderr)
        return 2
    except CannotServe as error:
        print(error, file=sys.stderr)
        return 3
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # prevents a second error at exit
        return 1
    except KeyboardInterrupt:
        print("interrupted; finished outputs are kept and skipped in the next run", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """Calls the command. What it needs is imported here, so that others start quickly."""
    if args.command == "completion":
        import argcomplete

        print(argcomplete.shellcode(["seesr"], shell=args.shell))  # type: ignore[attr-defined]
        return 0
    if args.command == "upscale":
        from seesr.cli.upscale import upscale

        settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
        logs.configure(os.environ.get("LOG_FORMAT", "console"), logging.WARNING)
        return upscale(args, settings)
    if args.command == "verify":
        from seesr.cli.upscale import bundle_path
        from seesr.cli.verify import verify

        logs.configure(os.environ.get("LOG_FORMAT", "console"), logging.WARNING)
        return verify(args, bundle_path(args.bundle))
    from seesr.config import Configuration

    configuration = Configuration.read()
    logs.configure(configuration.log_format, logging.WARNING)
    if args.command == "mcp" and not args.http:
        from seesr.serving.mcp_server import run_stdio

        return run_stdio(configuration, args.bundle, args.device)
    if args.command in ("serve", "mcp"):
        from seesr.serving.app import Addition, serve

        addition = Addition()
        if args.command == "mcp":
            from seesr.serving.mcp_server import http_parts

            addition = http_parts(sessions=configuration.redis is None)
        logs.configure(configuration.log_format)
        fleet = None
        if configuration.redis:
            from seesr.fleet.gateway import parts as fleet
        return serve(configuration, args.host, args.port, args.bundle, args.device, fleet, addition)
    if args.command == "keys":
        from seesr.cli import keys

        return keys.run(args, configuration)
    if args.command in ("worker", "fleet"):
        if not configuration.redis:
            raise ValueError("SEESR_REDIS is not set: set it to redis://host:6379/0")
        if args.command == "fleet":
            from seesr.fleet.control import command

            return command(configuration, args.order, args.worker)
        from seesr.fleet.worker import run as work

        work()  # becomes Celery and does not return
    from seesr.cli import doctor

    if args.command == "info":
        print(json.dumps(doctor.info(configuration, args.bundle, args.device), indent=1))
        return 0
    return doctor.check(configuration, args.bundle, args.device)


def complete() -> None:
    """Answers a shell that completes a line, and ends the process."""
    import argcomplete

    description = parser()
    program, _, rest = os.environ.get("COMP_LINE", "").partition(" ")
    word = next(iter(rest.split()), "")
    if not any(name.startswith(word) for name in COMMANDS):
        os.environ["COMP_LINE"] = f"{program} upscale {rest}"
        os.environ["COMP_POINT"] = str(int(os.environ["COMP_POINT"]) + len(" upscale"))
    argcomplete.autocomplete(description)
