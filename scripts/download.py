"""Fetches the public weights to weights/downloads, checks them, and pins what was fetched in weights.lock.

    python scripts/download.py                  all that is missing
    python scripts/download.py --from DIR       from a folder with sd-turbo, seesr and ram in it instead of the hub

HF_ENDPOINT names a mirror. Once weights.lock exists, the commits and checksums in it are the only ones accepted.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from seesr.networks import weights
from seesr.networks.weights import WeightsError

log = logging.getLogger("download")
LOCK = weights.ROOT.parent / "weights.lock"
TRIES = 5
PAUSE = 2.0  # seconds before the second try, doubled before each further one


@dataclasses.dataclass(frozen=True)
class Source:
    """A repository on the hub. `kind` is model or space."""

    repository: str
    licence: str
    kind: str = "model"


TURBO = Source("stabilityai/sd-turbo", "Stability AI Community License (commercial use is limited; read it)")
SEESR = Source("alexnasa/SEESR", "Apache-2.0")
RAM = Source("xinyu1205/recognize_anything_model", "Apache-2.0")
RAM_CODE = Source("xinyu1205/recognize-anything", "Apache-2.0", "space")  # the tag list lies beside RAM's code

NETWORK = (
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
TEXT = ("model.fp16.safetensors", "model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A file we need: where it goes, and where it may be, best first. Any folder may stand before a pattern."""

    folder: str
    patterns: tuple[str, ...]
    sources: tuple[Source, ...]

    def found_in(self, files: Iterable[str]) -> str | None:
        for pattern in self.patterns:
            hits = [name for name in files if fnmatch.fnmatchcase("/" + name, "*/" + pattern)]
            if hits:
                return min(hits, key=lambda name: (name.count("/"), name))
        return None


def wanted() -> list[Wanted]:
    rows = []
    for part, names in (("unet", NETWORK), ("vae", NETWORK), ("text_encoder", TEXT)):
        rows.append(Wanted(f"sd-turbo/{part}", (f"{part}/config.json",), (TURBO,)))
        rows.append(Wanted(f"sd-turbo/{part}", tuple(f"{part}/{name}" for name in names), (TURBO,)))
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        rows.append(Wanted("sd-turbo/tokenizer", (f"tokenizer/{name}",), (TURBO,)))
    rows.append(Wanted("sd-turbo/scheduler", ("scheduler/scheduler_config.json",), (TURBO,)))
    for part in ("unet", "controlnet"):
        rows.append(Wanted(f"seesr/{part}", (f"{part}/config.json",), (SEESR,)))
        rows.append(Wanted(f"seesr/{part}", tuple(f"{part}/{name}" for name in NETWORK), (SEESR,)))
    rows.append(Wanted("seesr", ("DAPE.pth",), (SEESR,)))
    rows.append(Wanted("ram", ("ram_swin_large_14m.pth",), (RAM, RAM_CODE)))
    for name in ("ram_tag_list.txt", "ram_tag_list_threshold.txt"):
        rows.append(Wanted("ram", (name,), (RAM, RAM_CODE, SEESR)))
    return rows


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file, pinned. `sha256` is the hub's for large files; `blob` (git's SHA-1) is what it has for small ones."""

    target: str
    repository: str
    kind: str
    commit: str
    file: str
    size: int
    sha256: str | None
    blob: str | None
    licence: str

    def check(self, path: Path) -> None:
        """Raises WeightsError unless the file at `path` is this one."""
        if path.stat().st_size != self.size:
            raise WeightsError(f"{path} has {path.stat().st_size} bytes, expected {self.size}")
        if self.sha256 is None:
            data = path.read_bytes()
            found, expected = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), self.blob
        else:
            found, expected = weights.sha256(path), self.sha256
        if found != expected:
            raise WeightsError(f"{path} is damaged: checksum is {found}, expected {expected}")


def resolve(api: HfApi) -> list[Entry]:
    """Finds every wanted file on the hub, at the commit that is current now.

    Raises:
        WeightsError: a file is in none of its repositories; lists what they do hold.
    """
    listings: dict[Source, tuple[str, dict]] = {}

    def listing(source: Source) -> tuple[str, dict]:
        if source not in listings:
            info = retried(
                lambda: api.repo_info(source.repository, repo_type=source.kind, files_metadata=True), source.repository
            )
            listings[source] = info.sha or "main", {f.rfilename: f for f in info.siblings or []}
        return listings[source]

    entries = []
    for want in wanted():
        for source in want.sources:
            commit, files = listing(source)
            name = want.found_in(files)
            if name:
                found = files[name]
                target = f"{want.folder}/{Path(name).name}"
                sum_ = found.lfs.sha256 if found.lfs else None
                entries.append(
                    Entry(
                        target,
                        source.repository,
                        source.kind,
                        commit,
                        name,
                        found.size,
                        sum_,
                        found.blob_id,
                        source.licence,
                    )
                )
                break
        else:
            held = "; ".join(f"{s.repository} holds {', '.join(sorted(listing(s)[1])[:40])}" for s in want.sources)
            raise WeightsError(f"no file like {' or '.join(want.patterns)} was found: {held}")
    return entries


def retried(call: object, what: str) -> object:
    """Calls again, up to five times with growing pauses, when the network or the server fails for the moment."""
    for attempt in range(1, TRIES + 1):
        try:
            return call()  # type: ignore[operator]
        except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
            raise WeightsError(f"{what} is not on the hub ({type(error).__name__})") from error
        except Exception as error:  # the hub's client raises those of its HTTP library, which changes with its version
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise WeightsError(f"{what}: no space is left on the disk") from error
            if attempt == TRIES:
                raise WeightsError(f"{what} could not be fetched in {TRIES} tries ({error})") from error
            pause = PAUSE * 2 ** (attempt - 1)
            log.warning("%s: %s; trying again in %.0f s", what, type(error).__name__, pause)
            time.sleep(pause)
    raise AssertionError


def fetch(api: HfApi, entry: Entry, folder: Path) -> Path:
    """Downloads one file (resuming a part that is there), checks it, and only then gives it its name."""
    target = folder / entry.target
    if target.exists():
        entry.check(target)
        return target
    staging = folder / ".staging" / entry.repository
    path = retried(
        lambda: hf_hub_download(
            entry.repository,
            entry.file,
            repo_type=entry.kind,
            revision=entry.commit,
            local_dir=staging,
            endpoint=api.endpoint,
        ),
        f"{entry.repository}/{entry.file}",
    )
    path = Path(str(path))
    try:
        entry.check(path)
    except WeightsError:
        path.unlink()  # so that the next run fetches it anew
        raise
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)
    return target


def read_lock(lock: Path) -> list[Entry]:
    return [Entry(**row) for row in json.loads(lock.read_text())]


def write_lock(lock: Path, entries: list[Entry]) -> None:
    part = lock.with_name(lock.name + ".part")
    part.write_text(json.dumps([dataclasses.asdict(entry) for entry in entries], indent=1) + "\n")
    part.replace(lock)


def announce(entries: list[Entry]) -> None:
    """Prints size and licence of every repository before anything is fetched."""
    for repository in dict.fromkeys(entry.repository for entry in entries):
        mine = [entry for entry in entries if entry.repository == repository]
        size = sum(entry.size for entry in mine) / 1e9
        print(f"{repository}@{mine[0].commit[:12]}: {len(mine)} files, {size:.2f} GB, licence: {mine[0].licence}")


def download(folder: Path, lock: Path) -> list[Entry]:
    """Fetches everything to `folder`; writes `lock` at the first run and obeys it from then on.

    Raises:
        WeightsError: a file is missing on the hub, cannot be fetched, or is not what the checksum says.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    entries = read_lock(lock) if lock.exists() else resolve(api)
    announce(entries)
    missing = sum(entry.size for entry in entries if not (folder / entry.target).exists())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < missing * 1.05:
        raise WeightsError(f"{missing / 1e9:.2f} GB are to be fetched, but {folder} has {free / 1e9:.2f} GB free")
    pinned = []
    for entry in entries:
        path = fetch(api, entry, folder)
        pinned.append(dataclasses.replace(entry, sha256=entry.sha256 or weights.sha256(path)))
    shutil.rmtree(folder / ".staging", ignore_errors=True)
    write_lock(lock, pinned)
    return pinned


def copy_from(source: Path, folder: Path, lock: Path) -> None:
    """Takes the files from a local folder instead; they must be those of `lock` if there is one.

    Raises:
        WeightsError: a file is missing or is not the pinned one.
    """
    pins = {entry.target: entry for entry in read_lock(lock)} if lock.exists() else {}
    for want in wanted():
        base = source / want.folder.split("/")[0]
        files = [path.relative_to(base).as_posix() for path in sorted(base.rglob("*")) if path.is_file()]
        name = want.found_in(files)
        if name is None:
            raise WeightsError(f"no file like {' or '.join(want.patterns)} in {base}")
        target = folder / want.folder / Path(name).name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        shutil.copyfile(base / name, part)
        pin = pins.get(f"{want.folder}/{target.name}")
        if pin:
            pin.check(part)
        part.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=weights.ROOT / "downloads")
    parser.add_argument("--lock", type=Path, default=LOCK)
    parser.add_argument("--from", type=Path, dest="source", metavar="DIR", help="a local folder instead of the hub")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if args.source:
            copy_from(args.source, args.folder, args.lock)
        else:
            download(args.folder, args.lock)
    except WeightsError as error:
        sys.exit(str(error))
    print(f"all files are in {args.folder}; now run: python scripts/convert.py")


if __name__ == "__main__":
    main()
