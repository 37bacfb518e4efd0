"""./scripts/weights: what it prints of a plan, the space that it needs, and when a bundle is complete."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from seesr.checkpoints import __main__ as command
from seesr.checkpoints import sources
from seesr.checkpoints.plan import Row
from seesr.networks import weights
from seesr.networks.weights import WeightsError, gigabytes

Capture = pytest.CaptureFixture[str]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def row(part: str, path: str, size: int, **changes: Any) -> Row:
    where = (part, "huggingface", f"owner/{part}", COMMIT)
    result = Row(*where, path, size, size, None, "MIT", f"{part}/{path}", f"http://hub/{path}", None, True)
    return result._replace(**changes)


def test_bytes_in_gigabytes() -> None:
    assert gigabytes(10**18) == 1e9


def test_each_part_is_announced_with_its_size_source_and_licence(capsys: Capture) -> None:
    rows = [row(part.name, "model.bin", 10**17) for part in sources.PARTS[3:]]
    rows += [
        row("sd-turbo", "unet/model.bin", 10**18),
        row("sd-turbo", "config.json", 10**18, bytes_to_fetch=10**17, published=False),
        row("tokenizer", "vocab.json", 10**18, published=False, source="folder", revision="", bytes_to_fetch=0),
        row("seesr", "unet.safetensors", 10**18, spans=((0, 10**17),), bytes_to_fetch=10**17),
    ]
    command.announce(rows)
    lines = capsys.readouterr().out.splitlines()
    licence = {part.name: part.licence for part in sources.PARTS}
    assert lines[:3] == [
        f"sd-turbo: owner/sd-turbo@{COMMIT[:12]}: 2 files, 2000000000.00 GB, 1100000000.00 GB to fetch; "
        f"licence: {licence['sd-turbo']}; no published checksum, the first download is trusted: config.json",
        f"tokenizer: owner/tokenizer: 1 files, 1000000000.00 GB, 0.00 GB to fetch; licence: {licence['tokenizer']}",
        f"seesr: owner/seesr@{COMMIT[:12]}: 1 files, 1000000000.00 GB, 100000000.00 GB to fetch (900000000.00 GB of "
        f"tensors that are not used are left out); licence: {licence['seesr']}",
    ]
    assert [line.partition(":")[0] for line in lines] == [part.name for part in sources.PARTS]


def test_the_bundle_has_half_of_the_bytes_of_float32_and_all_of_float16() -> None:
    rows = [row("sd-turbo", "model.fp16.bin", 100), row("ram", "model.pth", 90, bytes_to_fetch=30)]
    assert command.needed(rows) == (130, 145)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are free in each folder, by its name."""
    result: dict[str, int] = {}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=result[path.name]))
    return result


def test_one_disk_needs_space_for_downloads_and_bundle(tmp_path: Path, free: dict[str, int], capsys: Capture) -> None:
    downloads, rows = tmp_path / "cache/downloads", [row("sd-turbo", "model.fp16.bin", 10**9)]
    free["downloads"] = 2 * 10**9
    command.check_space(rows, downloads, tmp_path / "weights/full")
    assert capsys.readouterr().out == f"{downloads}: 2.00 GB needed, 2.00 GB free\n"
    free["downloads"] -= 10**7
    with pytest.raises(
        WeightsError, match=r"downloads has 1\.99 GB free; 2\.00 GB are needed: free some, or set SEESR"
    ):
        command.check_space(rows, downloads, tmp_path / "weights/full")


def test_two_disks_need_space_for_one_each(tmp_path: Path, free: dict[str, int], capsys: Capture) -> None:
    rows = [row("ram", "model.pth", 4 * 10**9)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        if Path(other).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is on the same disk")
        target = Path(other) / "weights/full"
        free.update(downloads=4 * 10**9, weights=2 * 10**9)
        command.check_space(rows, tmp_path / "downloads", target)
        lines = [f"{tmp_path / 'downloads'}: 4.00 GB needed, 4.00 GB free"]
        lines += [f"{target.parent}: 2.00 GB needed, 2.00 GB free"]
        assert capsys.readouterr().out.splitlines() == lines
        free["weights"] = 0
        with pytest.raises(WeightsError, match=r"weights has 0\.00 GB free; 2\.00 GB are needed"):
            command.check_space(rows, tmp_path / "downloads", target)


def test_a_bundle_that_is_missing_or_damaged_is_converted_again(
    tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    assert command.is_complete(weights.POCKET)
    count = len(json.loads((weights.POCKET / weights.MANIFEST).read_text())["files"])
    assert f"{weights.POCKET} is complete: {count} files verified." in capsys.readouterr().out
    assert not command.is_complete(tmp_path)
    (tmp_path / weights.MANIFEST).write_text("{}")
    with caplog.at_level(logging.WARNING):
        assert not command.is_complete(tmp_path)
    assert "; it is converted again" in caplog.text


def test_downloads_go_to_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SEESR_CACHE", raising=False)
    assert command.cache() == tmp_path / ".cache/seesr"
    monkeypatch.setenv("SEESR_CACHE", "~/elsewhere")
    assert command.cache() == tmp_path / "elsewhere"


def test_the_tensors_of_a_bundle_are_listed(capsys: Capture) -> None:
    command.main(["--list", str(weights.POCKET)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 100 and all(".safetensors " in line for line in lines)
