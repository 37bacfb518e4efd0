"""The secret of a server, the keys that are derived from it, versions, and who may read the files."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import pytest

from seesr.networks import weights
from seesr.serving import identity
from seesr.serving.identity import SECRET_BYTES, derived, make_private, read_secret, version_of
from seesr.serving.models import Model, Models
from seesr.version import __version__


def test_a_version_names_the_bundle_and_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / weights.MANIFEST).write_bytes(b"{}")
    first = version_of(tmp_path)
    assert first == hashlib.sha256(b"{}" + __version__.encode()).hexdigest()
    monkeypatch.setattr(identity, "__version__", "99")
    assert version_of(tmp_path) != first
    with pytest.raises(weights.WeightsError, match="no weights at .*absent: No such file or directory"):
        version_of(tmp_path / "absent")


def test_a_secret_is_made_once_for_this_user_alone(tmp_path: Path) -> None:
    secret = read_secret(tmp_path)
    assert len(secret) == SECRET_BYTES == hashlib.sha256().digest_size and read_secret(tmp_path) == secret
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secret"], "nothing of its writing is left"
    (tmp_path / "other").mkdir()
    assert read_secret(tmp_path / "other") != secret


def test_keys_of_purposes_are_those_of_hkdf() -> None:
    """RFC 5869, test case 3: expansion without info. One block of SHA-256 is T(1) = HMAC(PRK, info | 0x01)."""
    pseudorandom = bytes.fromhex("19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04")
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
    assert derived(pseudorandom, "").hex() == expected
    assert len({derived(pseudorandom, purpose) for purpose in ("", "links", "webhooks:ann")}) == 3


def test_files_of_other_users_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, before = tmp_path / "a" / "data", os.umask(0o022)
    try:
        folder.mkdir(parents=True)
        (folder / "file").touch(0o644)
        (folder / "program").touch(0o755)
        make_private(folder)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
        assert modes == {"data": 0o700, "file": 0o600, "program": 0o700} and os.umask(0o077) == 0o077
        (folder / "file").chmod(0o644)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        make_private(folder)
        assert stat.S_IMODE((folder / "file").stat().st_mode) == 0o644
        make_private(tmp_path / "b" / "new")
        assert (tmp_path / "b" / "new").is_dir()
    finally:
        os.umask(before)


def test_models_are_found_by_name_and_version(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / weights.MANIFEST).write_text('{"name": "small"}')
    models = Models(weights.POCKET, f" acme/small={tmp_path}/small ,,")
    small, default = models.titled["acme/small"], models.default
    assert models.named("acme", "small") is small and models.named("anyone", "seesr") is default
    assert models.named("acme", "other") is models.named("small", "acme") is None
    assert models.by_version == {default.version: default, small.version: small}
    assert models.examples == "you/seesr, acme/small" and (default.example, small.example) == (
        "you/seesr",
        "acme/small",
    )
    assert (default.title_for("ann"), small.title_for("ann")) == ("ann/seesr", "acme/small")
    assert small == Model.read(tmp_path / "small", "acme/small") and small.created > 1e9
