"""`./scripts/weights`: fetches the public weights and converts them to one bundle. Needs 15 GB of disk; asks nothing.

    ./scripts/weights                                  fetch, check, convert, remove the downloads
    ./scripts/weights --plan                           what would be fetched, from where; --json for programs
    ./scripts/weights --from DIR                       from files that are on this machine
    ./scripts/weights --source sd-turbo=OWNER/NAME     one part from elsewhere: a folder, a repository or a URL

Environment: HF_ENDPOINT (a mirror of the hub), HF_TOKEN (for gated repositories), SEESR_GITHUB (base address of raw
GitHub files), SEESR_CACHE (downloads; ~/.cache/seesr).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from pathlib import Path

from seesr.checkpoints import fetch, plan, sources
from seesr.checkpoints.plan import Row
from seesr.checkpoints.web import Web
from seesr.networks import weights
from seesr.networks.weights import WeightsError, gigabytes

LICENCES = f"SD-Turbo: {sources.STABILITY}; SeeSR, DAPE, RAM: {sources.APACHE}; CLIP's vocabulary: {sources.MIT}"
log = logging.getLogger(__name__)


def cache() -> Path:
    """The folder of downloads and of the sums of first downloads."""
    return Path(os.environ.get("SEESR_CACHE") or Path.home() / ".cache/seesr").expanduser()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", action="store_true", help="print what would be fetched; fetch nothing")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, one object for each file")
    parser.add_argument("--from", type=Path, dest="folder", metavar="DIR", help="take every part from this folder")
    names = ", ".join(part.name for part in sources.PARTS)
    parser.add_argument("--source", action="append", default=[], metavar="PART=WHERE",
                        help=f"take a part ({names}) from a folder, OWNER/REPOSITORY of the hub, or a URL")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the downloads when the bundle is complete")
    parser.add_argument("--target", type=Path, default=weights.FULL, help="the bundle to make (weights/full)")
    parser.add_argument("--list", type=Path, metavar="BUNDLE", help="print keys and shapes of a bundle, and end")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        run(options)
    except (WeightsError, OSError) as error:
        sys.exit(str(error))


def run(options: argparse.Namespace) -> None:
    """Does what the command line asks for.

    Raises:
        WeightsError: one line: what is missing or wrong, and what to do.
    """
    if options.list:
        from seesr.checkpoints import convert  # imports torch

        print("\n".join(convert.listing(options.list)))
        return
    chosen = plan.parse_sources(options.source)
    if not options.plan and is_complete(options.target):
        return
    downloads = cache() / "downloads"
    record = fetch.FirstUse(cache() / "first-use.json")
    with Web() as client:
        matches = {}
        for part in sources.PARTS:
            candidates = plan.candidates(client, part, chosen, options.folder)
            matches[part.name] = (candidates, *plan.find(client, part, candidates, {}))
        rows = [row.pending(downloads) for _, _, rows in matches.values() for row in rows]
        if options.json:
            print(json.dumps([row.shown for row in rows]))
        else:
            announce(rows)
        if options.plan:
            return
        check_space(rows, downloads, options.target)
        for part in sources.PARTS:
            candidates, source, first = matches[part.name]
            fetch.fetch(client, part, candidates, (source, first), downloads, record)
    from seesr.checkpoints import convert  # imports torch

    convert.convert(downloads, options.target, LICENCES)
    size = sum(path.stat().st_size for path in options.target.rglob("*") if path.is_file())
    print(f"{options.target} is complete: {gigabytes(size):.2f} GB, every key and shape checked")
    if not options.keep and (options.folder is None or options.folder.resolve() != downloads.resolve()):
        shutil.rmtree(downloads)  # the files that its links lead to stay


def is_complete(target: Path) -> bool:
    """Whether the bundle is there and undamaged; says so, or why it is made again."""
    if not (target / weights.MANIFEST).exists():
        return False
    try:
        bundle = weights.verify(target)
    except WeightsError as error:
        log.warning("%s; it is converted again", error)
        return False
    print(f"{target} is complete: {len(bundle.files)} files verified. Remove it to make it again.")
    return True


def announce(rows: list[Row]) -> None:
    """Prints size, source and licence of every part."""
    for part in sources.PARTS:
        part_rows = [row for row in rows if row.part == part.name]
        first, *_ = part_rows
        revision = f"@{first.revision[:12]}" if first.revision else ""
        size, fetched = sum(row.bytes for row in part_rows), sum(row.bytes_to_fetch for row in part_rows)
        saved = sum(row.bytes - row.length for row in part_rows)
        only = f" ({gigabytes(saved):.2f} GB of tensors that are not used are left out)" if saved else ""
        unknown = [row.path for row in part_rows if not row.published and row.source != "folder"]
        trust = f"; no published checksum, the first download is trusted: {', '.join(unknown)}" if unknown else ""
        print(
            f"{part.name}: {first.repository}{revision}: {len(part_rows)} files, {gigabytes(size):.2f} GB, "
            f"{gigabytes(fetched):.2f} GB to fetch{only}; licence: {part.licence}{trust}"
        )


def needed(rows: list[Row]) -> tuple[int, int]:
    """Bytes of the downloads that are missing, and of the bundle at most (half precision)."""
    converted = sum(row.length if "fp16" in row.path else row.length // 2 for row in rows)
    return sum(row.bytes_to_fetch for row in rows), converted


def check_space(rows: list[Row], downloads: Path, target: Path) -> None:
    """Prints what is needed and free.

    Raises:
        WeightsError: a disk has too little.
    """
    fetched, converted = needed(rows)
    for folder in (downloads, target.parent):
        folder.mkdir(parents=True, exist_ok=True)
    if downloads.stat().st_dev == target.parent.stat().st_dev:
        demands = [(downloads, fetched + converted)]
    else:
        demands = [(downloads, fetched), (target.parent, converted)]
    for folder, demand in demands:
        free = shutil.disk_usage(folder).free
        print(f"{folder}: {gigabytes(demand):.2f} GB needed, {gigabytes(free):.2f} GB free")
        if free < demand:
            raise WeightsError(
                f"{folder} has {gigabytes(free):.2f} GB free; {gigabytes(demand):.2f} GB are needed: free some, or set "
                "SEESR_CACHE to a folder with more"
            )


if __name__ == "__main__":
    main()
