"""The server's version string, secret and signing keys."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from seesr.networks import weights
from seesr.version import __version__

SECRET_BYTES = 32


def version_of(bundle: Path) -> str:
    """64 hexadecimal digits for the bundle's manifest and this program's version: the same makes the same images.

    Raises:
        WeightsError: there is no bundle.
    """
    try:
        manifest = (bundle / weights.MANIFEST).read_bytes()
    except OSError as error:
        raise weights.WeightsError(f"no weights at {bundle}: {error.strerror}") from None
    return hashlib.sha256(manifest + __version__.encode()).hexdigest()


def read_secret(folder: Path) -> bytes:
    """The server's own secret, made at its first start; keys are derived from it.

    Raises:
        ValueError: the file was cut or replaced by something shorter, which could be guessed.
    """
    path = folder / "secret"
    if not path.exists():
        part = folder / f".{secrets.token_hex(8)}"
        part.touch(mode=0o600)
        part.write_bytes(secrets.token_bytes(SECRET_BYTES))
        part.replace(path)  # a server that is killed here leaves no secret, not half of one
    secret = path.read_bytes()
    if len(secret) < SECRET_BYTES:
        raise ValueError(
            f"{path} has {len(secret)} bytes and needs {SECRET_BYTES}; restore it, or remove it to make a new one, "
            "which ends all links and changes the secrets of webhooks"
        )
    return secret


def derived(secret: bytes, purpose: str) -> bytes:
    """The key of one purpose, 32 bytes: HKDF-Expand of RFC 5869 with SHA-256. No key reveals another one."""
    return hmac.new(secret, purpose.encode() + b"\x01", hashlib.sha256).digest()


def make_private(folder: Path) -> None:
    """Lets only this user read the folder, what an earlier version wrote into it, and all that this process writes."""
    os.umask(0o077)
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *folder.iterdir()):
        status = path.stat()
        if status.st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(status.st_mode) & 0o700)
