"""`seesr keys`: adds, revokes and lists the keys of SEESR_KEYS_FILE."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path

from pydantic import ValidationError

from seesr.config import Configuration
from seesr.serving.keys import Key, digest, read_file, write_file


def run(args: argparse.Namespace, configuration: Configuration) -> int:
    """Runs one order; servers read the file again at the next request.

    Raises:
        ValueError: there is no file, or no such key; one line.
    """
    path = configuration.keys_file
    if path is None:
        raise ValueError("SEESR_KEYS_FILE names no file: set it to a path, such as /etc/seesr/keys.json")
    if args.order == "add":
        return add(args, path)
    keys = read_file(path)
    if args.order == "list":
        for key in keys:
            limits = key.model_dump(mode="json", exclude={"name", "sha256"}, exclude_defaults=True)
            state = "" if key.valid else " (expired)"
            print(key.id, key.name + state, *(f"{name}={value}" for name, value in limits.items()))
        return 0
    left = [key for key in keys if args.name not in (key.name, key.id)]
    if len(left) == len(keys):
        raise ValueError(f"there is no key {args.name!r}; seesr keys list shows all")
    write_file(path, left)
    print(f"{len(keys) - len(left)} revoked")
    return 0


def add(args: argparse.Namespace, path: Path) -> int:
    """Adds a key and prints its token, which is not stored."""
    token = secrets.token_urlsafe(32)
    inputs = {name: getattr(args, name) for name in ("rate", "share", "megapixels_per_day", "expires")}
    values = {name: value for name, value in inputs.items() if value is not None}
    if args.priorities is not None:
        values["priorities"] = args.priorities.split(",")
    try:
        key = Key(name=args.name, sha256=digest(token), **values)
    except ValidationError as error:
        fault, *_ = error.errors()
        place, *_ = fault["loc"]
        raise ValueError(f"{place} is {fault['input']!r}: {fault['msg']}") from None
    write_file(path, [*(read_file(path) if path.exists() else []), key])
    print(token)
    return 0
