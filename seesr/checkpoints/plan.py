"""Finds every part at the first source that has all of it, and lists what has to be fetched. Downloads no weights."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from seesr.checkpoints import sources, web
from seesr.checkpoints.sources import Part, Repository
from seesr.checkpoints.web import Missing, NoRanges, Unavailable, Web
from seesr.networks.weights import WeightsError

log = logging.getLogger(__name__)
USED = "image_attentions"  # in the names of SeeSR's UNet, all that is used
LENGTH = struct.calcsize("<Q")  # bytes of a safetensors file that hold the length of its header
LARGEST_HEADER = 10**8  # bytes; the format's own limit
SHOWN = ("part", "source", "repository", "revision", "path", "bytes", "bytes_to_fetch", "sha256", "licence")


class File(NamedTuple):
    """A file of a source: its bytes, sums as far as the source says them, and where it is."""

    size: int | None
    sha256: str | None
    blob: str | None
    url: str


class Listing(NamedTuple):
    """The files of one source, by path."""

    source: str
    repository: str
    revision: str
    files: dict[str, File]


class Row(NamedTuple):
    """One file to fetch.

    Attributes:
        bytes: of the whole file.
        bytes_to_fetch: fewer when only some tensors are used, or when it is there already.
        sha256: the published sum, else the one that the repository says; None: neither.
        target: place below the folder of downloads.
        url: address, or a local path.
        blob: git's SHA-1, where there is no sha256.
        published: whether the sum is in published.json.
        spans: parts of the file to fetch, [start, end) each; empty: all of it.
        prefix: bytes that go in front of the spans.
    """

    part: str
    source: str
    repository: str
    revision: str
    path: str
    bytes: int
    bytes_to_fetch: int
    sha256: str | None
    licence: str
    target: str
    url: str
    blob: str | None
    published: bool
    spans: tuple[tuple[int, int], ...] = ()
    prefix: bytes = b""

    @property
    def length(self) -> int:
        """Bytes of the file on disk: of the original, or of the part of it that is used."""
        return len(self.prefix) + sum(end - start for start, end in self.spans) if self.spans else self.bytes

    def place(self, folder: Path) -> tuple[Path, Path]:
        """Where the file lies below the folder of downloads, when it is whole and while it is fetched."""
        target = folder / self.target
        identity = hashlib.sha256(f"{self.url} {self.sha256} {self.blob} {self.bytes}".encode()).hexdigest()
        return target, target.with_name(f"{target.name}.{identity}.part")

    def pending(self, folder: Path) -> Row:
        """The row with what is still to be fetched to `folder`."""
        have = next((path.stat().st_size for path in self.place(folder) if path.is_file()), 0)
        if self.source == "folder":
            have = self.length
        return self._replace(bytes_to_fetch=self.length - min(have, self.length))

    @property
    def shown(self) -> dict[str, Any]:
        """What --json prints."""
        return {name: getattr(self, name) for name in SHOWN}


Source = tuple[str, Callable[[], Listing]]  # its name, and how to list it


def candidates(client: Web, part: Part, chosen: dict[str, str], folder: Path | None) -> list[Source]:
    """The sources of a part in the order in which they are tried: the one that was named, or the known ones.

    Args:
        chosen: part -> URL, repository or path (--source).
        folder: a folder with all parts (--from).
    """
    if part.name in chosen:
        value = chosen[part.name]
        return [(value, lambda: named(client, part, value))]
    if folder is not None:
        return [(str(folder), lambda: local(folder, part))]
    return [(repository.page, lambda r=repository: remote(client, r, part)) for repository in part.repositories]


def find(client: Web, part: Part, candidates: list[Source], skip: Mapping[str, str]) -> tuple[str, list[Row]]:
    """The first source that holds all files of the part, and its files.

    Args:
        skip: sources that failed before, with the reason.

    Raises:
        WeightsError: none does; one line that says why for each, and what to do.
    """
    reasons = dict(skip)
    for name, listing in candidates:
        if name in reasons:
            continue
        try:
            return name, [selected(client, row) for row in rows(client, part, listing())]
        except Unavailable as error:
            reasons[name] = str(error)
            log.warning("%s: not from %s: %s", part.name, name, error)
    tried = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise WeightsError(
        f"{part.name} was found in no source ({tried}). Name another source with "
        f"--source {part.name}=FOLDER, =OWNER/REPOSITORY of the hub or =URL, or a mirror of the hub in HF_ENDPOINT"
    )


def rows(client: Web, part: Part, listing: Listing) -> list[Row]:
    """The files of the first layout that the source has completely.

    Raises:
        Unavailable: it has none, does not say how large a file is, has another file than the published one, or does
            not give the files out.
    """
    missing = ""
    for layout in part.layouts:
        matches = [(need, need.match(listing.files)) for need in layout]
        lacking = [" or ".join(need.names) for need, path in matches if path is None]
        if not lacking:
            break
        missing = missing or f"it has no {', no '.join(lacking)}"
    else:
        raise Unavailable(missing)
    result = []
    for need, path in matches:
        assert path is not None
        file, target = listing.files[path], f"{need.folder}/{Path(path).name}"
        known = sources.published().get(target, {})
        size = known.get("bytes") if file.size is None else file.size
        if size is None:
            raise Unavailable(f"{file.url}: the server does not say how many bytes it has")
        differs = file.sha256 and known and file.sha256 != known["sha256"]
        if differs or known.get("bytes", size) != size:
            raise Unavailable(f"{path} is not the published file (sha256 {known['sha256']})")
        size = int(size)
        sha256 = str(known["sha256"]) if known else file.sha256
        where = (part.name, listing.source, listing.repository, listing.revision, path)
        result.append(Row(*where, size, size, sha256, part.licence, target, file.url, file.blob, bool(known)))
    largest = max(result, key=lambda row: row.bytes)
    if listing.source != "folder":
        client.head(largest.url)  # a gated repository is listed all the same
    return result


def selected(client: Web, row: Row) -> Row:
    """The row with only the tensors that are used, where the file and the server allow that."""
    if not (row.target.startswith("seesr/unet/") and row.path.endswith(".safetensors")) or row.source == "folder":
        return row
    try:
        (length,) = struct.unpack("<Q", client.read(row.url, 0, LENGTH))
        start = LENGTH + length
        if start > min(LENGTH + LARGEST_HEADER, row.bytes):
            raise Unavailable(f"{row.path} is not a safetensors file")
        header = json.loads(client.read(row.url, LENGTH, start))
        prefix, spans = selection(header, start, row.bytes)
    except NoRanges as error:
        log.warning("%s; the whole file is fetched", error)
        return row
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unavailable(f"{row.path} is not a safetensors file ({error})") from error
    target = f"seesr/unet/{sources.SELECTED}"
    return row._replace(target=target, spans=tuple(spans), prefix=prefix, published=False)


def selection(header: dict[str, Any], start: int, size: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Header of a file of the selected tensors alone, and the parts of the original that follow it.

    Args:
        header: of the original file.
        start: where its tensors start.
        size: its bytes.
    """
    tensors = {name: about for name, about in header.items() if USED in name}
    if not tensors:
        raise ValueError(f"no tensor is named {USED}; is it a stock UNet?")
    header, spans, place = {}, list[tuple[int, int]](), 0
    for name, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = about["data_offsets"]
        if not 0 <= first <= last <= size - start:
            raise ValueError(f"{name} lies outside of the file")
        header[name] = {**about, "data_offsets": [place, place + last - first]}
        place += last - first
        begin = start + first
        if spans and spans[-1][1] == begin:
            begin, _ = spans.pop()
        spans.append((begin, start + last))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % LENGTH)  # tensors begin at a multiple of it
    return struct.pack("<Q", len(text)) + text, spans


def remote(client: Web, repository: Repository, part: Part) -> Listing:
    """Lists a public repository.

    Raises:
        Unavailable: missing, gated or unreachable.
    """
    if repository.host == "github":
        base = f"{web.github()}/{repository.name}/{repository.revision}/{repository.folder}"
        return Listing("github", repository.name, repository.revision, raw(client, base, part))
    kind = repository.host
    address = f"{web.hub()}/api/{kind}/{repository.name}"
    pinned = "" if repository.revision == "main" else f"/revision/{repository.revision}"
    info = client.json(f"{address}{pinned}?blobs=true")
    name, revision = str(info.get("id", repository.name)), str(info.get("sha") or repository.revision)
    if name.lower() != repository.name.lower():
        log.warning("%s has moved to %s", repository.name, name)
    base = f"{web.hub()}/{'spaces/' if kind == 'spaces' else ''}{name}/resolve/{revision}"
    files = {}
    for entry in info.get("siblings", []):
        path, large = entry["rfilename"], entry.get("lfs") or {}
        files[path] = File(entry.get("size"), large.get("sha256"), entry.get("blobId"), f"{base}/{path}")
    return Listing("huggingface", name, revision, files)


def raw(client: Web, base: str, part: Part) -> dict[str, File]:
    """Files below an address that cannot be listed: every name is asked for."""
    files = {}
    for need in {need for layout in part.layouts for need in layout}:
        for name in need.names:
            try:
                size = client.head(f"{base}/{name}").size
            except Missing:
                continue
            files[name] = File(size, None, None, f"{base}/{name}")
            break
    return files


def local(folder: Path, part: Part) -> Listing:
    """Lists a folder on this machine: the sub-folder that has the part's name, if there is one, else all of it.

    Raises:
        Unavailable: there is no such folder.
    """
    if folder.is_file():
        name = sources.SINGLE_FILE if part.name == "sd-turbo" else folder.name
        return Listing("folder", str(folder.parent), "", {name: _on_disk(folder)})
    if not folder.is_dir():
        raise Unavailable(f"{folder} is not a folder")
    bases = [folder / name for name in part.local if (folder / name).is_dir()] or [folder]
    paths = {path for base in bases for path in base.rglob("*")} | set(folder.iterdir())
    files = {path.relative_to(folder).as_posix(): _on_disk(path) for path in sorted(paths) if path.is_file()}
    return Listing("folder", str(folder), "", files)


def _on_disk(path: Path) -> File:
    return File(path.stat().st_size, None, None, str(path.resolve()))


def named(client: Web, part: Part, value: str) -> Listing:
    """Lists what --source PART=VALUE names: a path, the URL of a file or (ending in /) of a folder, or a repository.

    Raises:
        Unavailable: it is none of these, or cannot be listed.
    """
    if re.match(r"https?://", value):
        if value.endswith("/"):
            return Listing("url", value, "", raw(client, value.rstrip("/"), part))
        name = value.partition("?")[0].rpartition("/")[2]
        if part.name == "sd-turbo":
            name = sources.SINGLE_FILE
        return Listing("url", value, "", {name: File(client.head(value).size, None, None, value)})
    if Path(value).expanduser().exists():
        return local(Path(value).expanduser().resolve(), part)
    repository = re.fullmatch(r"(?:(models|spaces)/)?([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", value)
    if not repository:
        raise Unavailable(f"{value} is not a local file or folder, a URL or OWNER/REPOSITORY of the hub")
    kind, name, revision = repository.groups()
    return remote(client, Repository(kind or "models", name, revision=revision or "main"), part)


def parse_sources(values: Iterable[str]) -> dict[str, str]:
    """`PART=VALUE` of --source -> part -> value.

    Raises:
        WeightsError: not of that form, or no such part.
    """
    chosen, parts = {}, [part.name for part in sources.PARTS]
    for value in values:
        name, _, where = value.partition("=")
        if name not in parts or not where:
            raise WeightsError(
                f"--source {value}: write PART=FOLDER, PART=OWNER/REPOSITORY or PART=URL; "
                f"the parts are {', '.join(parts)}"
            )
        chosen[name] = where
    return chosen
