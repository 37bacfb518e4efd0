"""What names a server and what it signs with."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

from seesr.networks import weights
from seesr.version import __version__


def version_of(bundle: Path) -> str:
    """64 hexadecimal digits for the bundle's manifest and this program's version: the same makes the same pictures.

    Raises:
        WeightsError: there is no bundle.
    """
    try:
        manifest = (bundle / weights.MANIFEST).read_bytes()
    except OSError as error:
        raise weights.WeightsError(f"no weights at {bundle}: {error.strerror}") from None
    return hashlib.sha256(manifest + __version__.encode()).hexdigest()


def read_secret(folder: Path) -> bytes:
    """The server's own secret, made at its first start."""
    path = folder / "secret"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_bytes(secrets.token_bytes(32))
    return path.read_bytes()
