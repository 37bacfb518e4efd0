"""Downloads the files of a plan: resumed at any byte, checked before they get their names, other sources tried."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from pathlib import Path

from tqdm import tqdm

from seesr.checkpoints import plan
from seesr.checkpoints.plan import Row, Source
from seesr.checkpoints.sources import Part
from seesr.checkpoints.web import NoRanges, Unavailable, Web
from seesr.networks import weights
from seesr.networks.weights import WeightsError

log = logging.getLogger(__name__)


class FirstUse:
    """Checksums of files without a published one: recorded at the first download and required of later ones."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.exists() else {}

    def check(self, row: Row, digest: str) -> None:
        """Raises Unavailable when the file is not that of the first download; remembers it when it is the first."""
        known = self.sums.get(row.target)
        if known is None:
            self.sums[row.target] = {"sha256": digest, "repository": row.repository, "revision": row.revision}
            part = self.path.with_name(self.path.name + ".part")
            part.write_text(json.dumps(self.sums, indent=1) + "\n")
            part.replace(self.path)
            log.info("%s: no published checksum; the first download is trusted, sha256 %s", row.target, digest)
        elif known["sha256"] != digest:
            raise Unavailable(
                f"{row.path} has changed since the first download (sha256 {digest}, first {known['sha256']}); "
                f"if the change is expected, remove {row.target} from {self.path}"
            )


def fetch(client: Web, part: Part, candidates: list[Source], first: tuple[str, list[Row]], folder: Path,
          record: FirstUse) -> list[Row]:  # fmt: skip
    """Fetches one part to `folder`; when its source fails, the next one.

    Args:
        first: the source that the plan chose, and its files.

    Returns:
        The files that were taken.

    Raises:
        WeightsError: no source gave the whole part, or the disk is full.
    """
    failed: dict[str, str] = {}
    source, rows = first
    while True:
        try:
            fetched = [fetch_file(client, row, folder, record) for row in rows]
            tidy(folder, part, fetched)
            return fetched
        except Unavailable as error:
            failed[source] = str(error)
            log.warning("%s: not from %s: %s", part.name, source, error)
        source, rows = plan.find(client, part, candidates, failed)


def fetch_file(client: Web, row: Row, folder: Path, record: FirstUse) -> Row:
    """Fetches one file (resuming what is there), checks it, and only then gives it its name.

    Raises:
        Unavailable: it cannot be fetched or is not the right one.
        WeightsError: the disk is full.
    """
    target, path = row.place(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    if row.source == "folder":
        check(row, Path(row.url), record)
        if target.resolve() != Path(row.url):  # else the folder of downloads itself was named
            target.unlink(missing_ok=True)
            target.symlink_to(row.url)
        return row
    if target.exists():
        try:
            check(row, target, record)
            return row
        except Unavailable as error:
            log.warning("%s; it is fetched again", error)
            target.unlink()
    try:
        transfer(client, row, path)
    except NoRanges as error:
        log.warning("%s; the whole file is fetched", error)
        path.unlink()
        return fetch_file(client, whole(row), folder, record)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(
                f"{row.path}: no space is left in {path.parent}: free some, or set SEESR_CACHE to a folder with "
                "more, and run the command again"
            ) from error
        raise
    try:
        check(row, path, record)
    except Unavailable:
        path.unlink()  # so that it is fetched anew
        raise
    path.replace(target)
    return row


def transfer(client: Web, row: Row, path: Path) -> None:
    """Downloads to `path`, from where it stops, with a progress bar."""
    if not (path.exists() and len(row.prefix) <= path.stat().st_size <= row.length):
        path.write_bytes(row.prefix)
    have = path.stat().st_size
    with tqdm(total=row.length, initial=have, unit="B", unit_scale=True, desc=row.path, disable=None) as bar:
        for size in client.download(row.url, path, row.spans or ((0, row.bytes),), len(row.prefix)):
            bar.update(size)


def whole(row: Row) -> Row:
    """The row without a selection of tensors."""
    target = Path(row.target).with_name(Path(row.path).name)
    return row._replace(target=target.as_posix(), spans=(), prefix=b"")


def check(row: Row, path: Path, record: FirstUse) -> None:
    """Raises Unavailable unless the file at `path` is the one of the row."""
    size, expected = path.stat().st_size, row.length
    if size != expected:
        raise Unavailable(f"{path} has {size} bytes, expected {expected}")
    digest = weights.sha256(path)
    if row.sha256 is not None and not row.spans and digest != row.sha256:
        raise Unavailable(f"{path} is damaged: sha256 is {digest}, expected {row.sha256}")
    if row.sha256 is None and row.blob is not None and not row.spans:
        data = path.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        if blob != row.blob:
            raise Unavailable(f"{path} is damaged: its git blob hash is {blob}, expected {row.blob}")
    if not row.published:
        record.check(row, digest)


def tidy(folder: Path, part: Part, rows: list[Row]) -> None:
    """Removes files of the part that another source left, so that they are not converted."""
    wanted = {folder / row.target for row in rows}
    for path in sorted((folder / part.name).rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in wanted:
            path.unlink()
