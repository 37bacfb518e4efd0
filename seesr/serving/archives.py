"""Zip archives of images, unpacked within limits. Reads whole files: call it on a worker thread."""

from __future__ import annotations

import hashlib
import mmap
import zipfile
import zlib
from pathlib import Path

from seesr.images.limits import LARGEST_FILE
from seesr.serving.responses import RefusedFile
from seesr.serving.uploads import TOO_LARGE, Stored, clean_name

LARGEST_UNPACKED = 20 * LARGEST_FILE  # bytes of all files of an archive
MAX_FILES = 1000  # of a batch
METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # others can need gigabytes of memory for a small file
ENTRY = b"PK\1\2"  # begins every entry of a zip's directory
ARCHIVE_ERRORS = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError, ValueError)


def unpack(archive: Path, folder: Path, prefix: str) -> tuple[list[Stored], list[RefusedFile]]:
    """Unpacks every file of a zip to a generated name below `folder`; the original name is only shown.

    Returns:
        The files, and {"name", "code", "error"} of each entry that cannot be unpacked.

    Raises:
        ValueError: no zip, too many files, or more bytes than it may hold; one line. Nothing is left in the folder.
    """
    files: list[Stored] = []
    refused: list[RefusedFile] = []
    try:
        with open_archive(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
            check_count(len(entries))
            declared = sum(entry.file_size for entry in entries if entry.file_size <= LARGEST_FILE)
            if declared > LARGEST_UNPACKED:
                raise ValueError(f"the archive holds {declared} bytes; the limit is {LARGEST_UNPACKED}")
            for number, entry in enumerate(entries):
                path = folder / f"{prefix}-{number}"
                try:
                    files.append(unpack_entry(opened, entry, path))
                except BaseException as error:
                    path.unlink(missing_ok=True)
                    if not isinstance(error, ARCHIVE_ERRORS):  # the disk is full
                        raise
                    reason = (
                        str(error) if isinstance(error, EntryRefused) else f"it is damaged ({type(error).__name__})"
                    )
                    refused.append({"name": clean_name(entry.filename), "code": "invalid_input", "error": reason})
    except BaseException:
        for stored in files:
            stored.path.unlink(missing_ok=True)
        raise
    return files, refused


class EntryRefused(ValueError):
    """One entry is not unpacked."""


def open_archive(archive: Path) -> zipfile.ZipFile:
    """The archive, its directory read.

    Raises:
        ValueError: no zip, or too many entries; one line.
    """
    check_directory(archive)
    try:
        return zipfile.ZipFile(archive)
    except (*ARCHIVE_ERRORS, OSError) as error:  # OSError: a place before the file's begin
        raise ValueError(f"the archive cannot be read ({type(error).__name__})") from error


def check_count(count: int) -> None:
    if count > MAX_FILES:
        raise ValueError(f"the archive has {count} files; the limit is {MAX_FILES}")


def check_directory(archive: Path) -> None:
    """Counts the entries before zipfile reads them all into memory: a small archive can have millions."""
    if archive.stat().st_size == 0:
        raise ValueError("the archive cannot be read (it is empty)")
    with archive.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count, place = 0, data.find(ENTRY)
        while place >= 0:
            count += 1
            if count > 10 * MAX_FILES:  # folders, and bytes of files that look like entries, are none
                raise ValueError(f"the archive has more than {count - 1} entries; the limit is {MAX_FILES} files")
            place = data.find(ENTRY, place + len(ENTRY))


def unpack_entry(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> Stored:
    """One file; zipfile gives no more bytes than the entry declares, and checks their CRC.

    Raises:
        EntryRefused: encrypted, too large, or compressed in another way than stored or deflate.
        One of ARCHIVE_ERRORS: it cannot be unpacked.
    """
    if entry.compress_type not in METHODS:
        raise EntryRefused("its compression is not supported; use stored or deflate")
    if entry.flag_bits & 1:
        raise EntryRefused("it is encrypted; send it without a password")
    if entry.file_size > LARGEST_FILE:
        raise EntryRefused(TOO_LARGE)
    digest = hashlib.sha256()
    with opened.open(entry) as source, path.open("xb") as target:
        while chunk := source.read(2**20):
            target.write(chunk)
            digest.update(chunk)
    return Stored(path, clean_name(entry.filename), digest.hexdigest())
