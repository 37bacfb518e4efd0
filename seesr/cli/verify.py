"""`seesr verify FILE [SOURCE]`: says what made a file, checks it, and with the source makes it again and compares."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from seesr.images import content_credentials
from seesr.images.read import decode, read_file
from seesr.images.record import read_record, read_source_type
from seesr.networks import weights
from seesr.settings import Settings

OK, WRONG, NOT_CHECKED = "ok", "wrong", "not checked"
CODES = {WRONG: 1, NOT_CHECKED: 2}  # the worst first


@dataclasses.dataclass
class Report:
    """What is known of a file.

    Attributes:
        about: the settings record with the digital source type and the state of Content Credentials.
        checks: by name: OK, WRONG or NOT_CHECKED, and a sentence.
    """

    about: dict[str, Any]
    checks: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict[str, tuple[str, str]])

    def add(self, name: str, state: str, sentence: str) -> None:
        self.checks[name] = state, sentence

    @property
    def passed(self) -> bool:
        """Whether every check is OK."""
        return all(state == OK for state, _ in self.checks.values())

    def show(self, as_json: bool) -> int:
        """Prints the report. Returns the exit code: that of the worst check."""
        if as_json:
            checks = {name: {"state": state, "about": sentence} for name, (state, sentence) in self.checks.items()}
            print(json.dumps({**self.about, "checks": checks}))
        else:
            for name, value in self.about.items():
                print(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
            for name, (state, sentence) in self.checks.items():
                print(f"{name}: {state}: {sentence}", file=sys.stdout if state == OK else sys.stderr)
        states = {state for state, _ in self.checks.values()}
        return next((code for state, code in CODES.items() if state in states), 0)


def verify(args: argparse.Namespace, bundle_path: Path) -> int:
    """Checks one file. Returns the exit code.

    Raises:
        ValueError: the file or the source cannot be read, or there is no record in the file; one line.
    """
    file, source = (None if path is None else read_bytes(path) for path in (args.file, args.source))
    assert file is not None
    try:
        record = read_record(args.file)
        source_type = read_source_type(args.file)
    except OSError as error:
        raise ValueError(f"{args.file}: not a PNG, WebP, JPEG or zip file") from error
    except ValueError as error:
        raise ValueError(f"{args.file}: {error}") from None
    report = Report({**record, "digital_source_type": source_type or "none"})
    settings = check_file(report, record, source_type, file)
    check_bundle(report, record, bundle_path)
    if source is not None:
        check_source(report, record, source)
    if source is not None and settings is not None and report.passed:
        run_again(report, record, settings, file, source, args.mask, bundle_path, args.device)
    return report.show(args.json)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        ValueError: it cannot be read; one line.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise ValueError(f"{path}: {(error.strerror or str(error)).lower()}") from error


def check_file(report: Report, record: dict[str, Any], source_type: str | None, file: bytes) -> Settings | None:
    """Settings, mark and Content Credentials of the file; returns the settings."""
    settings = None
    try:
        settings = Settings(**record["settings"])
    except (TypeError, ValueError) as error:
        report.add("settings", WRONG, str(error))
    else:
        report.add("settings", OK, "this version accepts them")
    marked = (OK, "the file is marked") if source_type else (WRONG, "the file carries no mark")
    report.add("mark", *marked)
    credentials = content_credentials.state(file)
    if credentials is not None:
        valid = {"Valid": OK, "Trusted": OK, "Invalid": WRONG}
        report.add("content credentials", valid.get(credentials, NOT_CHECKED), credentials)
    return settings


def check_bundle(report: Report, record: dict[str, Any], path: Path) -> None:
    """Whether the bundle at `path` is the one that made the file."""
    here = weights.read_manifest(path) if (path / weights.MANIFEST).exists() else None
    if here is not None and here.digest == record.get("bundle_sha256"):
        report.add("bundle", OK, f"{here.name} is here")
    else:
        present = f"the one here is {here.name}" if here is not None else f"there is none in {path}"
        sentence = f"{record.get('bundle')} made the file, and {present}: name the right one with --bundle"
        report.add("bundle", NOT_CHECKED, sentence)


def check_source(report: Report, record: dict[str, Any], source: bytes) -> None:
    """Whether the file was made from this source."""
    digest = hashlib.sha256(source).hexdigest()
    if "source_sha256" not in record:
        report.add("source", NOT_CHECKED, "the record names no source: the input was not a file")
    elif digest == record["source_sha256"]:
        report.add("source", OK, f"sha256 {digest}")
    else:
        report.add("source", WRONG, f"its sha256 is {digest}; the record has {record['source_sha256']}")


def run_again(
    report: Report,
    record: dict[str, Any],
    settings: Settings,
    file: bytes,
    source: bytes,
    mask: Path | None,
    bundle_path: Path,
    device: str | None,
) -> None:
    """Makes the file again and compares it.

    Raises:
        CannotServe: this machine cannot run the bundle.
    """
    if "mask_sha256" in record and mask is None:
        report.add("again", NOT_CHECKED, "the file was made with a mask: pass it with --mask FILE")
        return
    from seesr.engine.engine import Engine

    output = Engine.load(bundle_path, device).run(source, settings, mask=mask)
    result = output.image_data.record or {}
    if result.get("precision") != record.get("precision"):
        report.add("again", NOT_CHECKED, f"the file was made with SEESR_PRECISION={record.get('precision', 'auto')}")
    elif result.get("mask_sha256") != record.get("mask_sha256"):
        report.add("again", WRONG, "the file was made with another mask")
    elif contents(output.data) == contents(file):
        report.add("again", OK, "the same bytes")
    else:
        version = f"; version {record.get('version')} made it, this is {result['version']}"
        report.add("again", WRONG, difference(file, output.data) + version)


def contents(data: bytes) -> list[bytes]:
    """The files of a zip, or the file, without manifests, which are never made twice alike."""
    if not data.startswith(b"PK"):
        return [content_credentials.without(data)]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [content_credentials.without(archive.read(name)) for name in archive.namelist()]


def difference(file: bytes, again: bytes) -> str:
    """Says how two files differ that are not the same bytes."""
    try:
        first, second = (decode(data) for data in (file, again))
    except ValueError:
        return "the bytes differ"
    if first.rgb.shape != second.rgb.shape or first.rgb.dtype != second.rgb.dtype:
        return f"the bytes differ: {first.size} pixels of {first.rgb.dtype}, again {second.size} of {second.rgb.dtype}"
    maximum = int(np.abs(first.rgb.astype(np.int32) - second.rgb).max())
    return f"pixels differ by up to {maximum}" if maximum else "the pixels are the same; other parts of the file differ"
