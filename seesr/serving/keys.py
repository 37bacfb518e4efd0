"""API keys: those of SEESR_API_KEYS, and those of the file SEESR_KEYS_FILE, which is reloaded when it changes."""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from seesr.config import Configuration

MIN_TOKEN = 16  # characters of a token of SEESR_API_KEYS
log = logging.getLogger(__name__)


class Key(BaseModel):
    """One token and what its owner may do. Several keys may have one name: they own the same jobs.

    Attributes:
        name: the owner of the jobs.
        sha256: of the token, hexadecimal.
        rate: POST requests a minute; None: SEESR_RATE.
        share: largest share of the queue while others wait, above 0 to 1; None: SEESR_QUEUE_SHARE.
        megapixels_per_day: of results, by the UTC day; None: no quota.
        priorities: that the key may use.
        expires: first UTC day on which the key is no longer valid; None: it does not expire.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(max_length=100, pattern=r"^[\w.@+-]+$")
    sha256: str = Field(pattern=r"^([0-9a-f]{64})?$")
    rate: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, le=1)
    megapixels_per_day: float | None = Field(default=None, gt=0)
    priorities: tuple[Literal["urgent", "normal", "low"], ...] = ("urgent", "normal", "low")
    expires: datetime.date | None = None

    @property
    def id(self) -> str:
        """The begin of the hash, to name one of several keys of an owner."""
        return self.sha256[:8]

    @property
    def valid(self) -> bool:
        return self.expires is None or today() < self.expires


KEYS = TypeAdapter(list[Key])


def today() -> datetime.date:
    """The UTC day."""
    return datetime.datetime.now(datetime.UTC).date()


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def read_tokens(text: str) -> list[Key]:
    """The keys of "name:token,name:token"; a token without a name is named by its number.

    Raises:
        ValueError: a token is shorter than 16 characters; it could be guessed.
    """
    keys = []
    for number, part in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        name, _, token = part.rpartition(":")
        if len(token) < MIN_TOKEN:
            raise ValueError(f"key {number} of SEESR_API_KEYS is shorter than {MIN_TOKEN} characters")
        keys.append(Key.model_construct(name=name or f"key{number}", sha256=digest(token)))
    return keys


def read_file(path: Path) -> list[Key]:
    """The keys of a file.

    Raises:
        ValueError: it cannot be read or is no list of keys; one line.
    """
    try:
        return KEYS.validate_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"SEESR_KEYS_FILE={path} cannot be read: {error.strerror}; run seesr keys add NAME") from None
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"SEESR_KEYS_FILE={path}: {place or 'the file'}: {fault['msg']}") from None


def write_file(path: Path, keys: Iterable[Key]) -> None:
    """Replaces the file; a new one can be read by this user alone, an old one keeps its owner and mode."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
        part.write(KEYS.dump_json(list(keys), indent=1, exclude_defaults=True) + b"\n")
    if path.exists():
        status = path.stat()
        os.chown(part.name, status.st_uid, status.st_gid)
        shutil.copymode(path, part.name)
    Path(part.name).replace(path)


class Keys:
    """All keys of a server.

    Args:
        configuration: SEESR_API_KEYS and SEESR_KEYS_FILE.

    Raises:
        ValueError: a token is too short, or the file cannot be read; one line.
    """

    def __init__(self, configuration: Configuration) -> None:
        self.tokens = read_tokens(configuration.api_keys.get_secret_value())
        self.path, self.state = configuration.keys_file, None
        self.by_digest: dict[str, Key] = {key.sha256: key for key in self.tokens}
        if self.path is not None:
            self.load(read_file(self.path))

    def __bool__(self) -> bool:
        """Whether callers need a key: with a file without keys every caller is rejected."""
        return self.path is not None or bool(self.tokens)

    def load(self, keys: list[Key]) -> None:
        self.state = self.file_state()
        self.by_digest = {key.sha256: key for key in (*self.tokens, *keys)}

    def file_state(self) -> tuple[int, int, int] | None:
        """What changes with the file; None: there is none."""
        try:
            status = (self.path or Path()).stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino

    def find(self, token: str) -> Key | None:
        """The valid key of a token. Only hashes are compared, so the time reveals nothing about the token."""
        if self.path is not None and self.file_state() != self.state:
            self.state = self.file_state()
            try:
                self.load(read_file(self.path))
                log.info("%s was reloaded: %d keys", self.path, len(self.by_digest))
            except ValueError as error:
                log.error("the keys were not reloaded: %s", error)
        key = self.by_digest.get(digest(token))
        return key if key is not None and key.valid else None
