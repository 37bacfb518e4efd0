"""The check of a machine before a bundle is loaded; tests/deploy/test_containers_units_costs.py has its messages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from seesr.engine import preflight
from seesr.engine.preflight import HOST, WORK, Machine
from seesr.networks import hardware, weights
from seesr.networks.weights import CannotServe

SIZE = 4 * 10**9  # bytes of a bundle's files, in half precision


@pytest.mark.parametrize(
    ("device", "precision", "factor"),
    [
        ("cpu", "auto", 2), ("cpu", "float32", 2), ("cpu", "bfloat16", 1),
        ("cuda", "auto", 1), ("cuda", "float32", 2), ("cuda", "bfloat16", 1),
    ],
)  # fmt: skip
def test_the_size_in_memory_is_that_of_the_precision(device: str, precision: str, factor: int) -> None:
    assert preflight.loaded_size(SIZE, device, precision) == SIZE * factor


@pytest.mark.parametrize(
    ("exact", "precision"),
    [
        (Machine("cpu", None, None, 2 * SIZE + HOST, True), "auto"),
        (Machine("cpu", None, None, SIZE + HOST, True), "bfloat16"),
        (Machine("T4", (7, 0), SIZE + WORK, 0, False), "auto"),
        (Machine("T4", (8, 0), 2 * SIZE + WORK, 0, False), "float32"),
    ],
)
def test_a_machine_with_exactly_enough_memory_is_enough(exact: Machine, precision: str) -> None:
    preflight.check(exact, "full", SIZE, precision)
    less = exact._replace(host=exact.host - 1, free=None if exact.free is None else exact.free - 1)
    with pytest.raises(CannotServe, match=r"GB"):
        preflight.check(less, "full", SIZE, precision)


def test_the_oldest_gpu_is_that_of_the_readme() -> None:
    readme = (weights.ROOT.parent / "README.md").read_text()
    version = re.findall(r"compute capability (\d+)\.(\d+) or newer", readme)[0]
    major, minor = map(int, version)
    preflight.check(Machine("GPU", (major, minor), 10**12, 0, False), "full", SIZE)
    with pytest.raises(CannotServe, match=rf"GPU has compute capability {major - 1}\.9; {major}\.{minor} is needed"):
        preflight.check(Machine("GPU", (major - 1, 9), 10**12, 0, False), "full", SIZE)


def test_the_pocket_bundle_runs_on_a_cpu_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    preflight.check(Machine("cpu", None, None, 10**10, False), "pocket", 10**7)
    assert not caplog.records


@pytest.mark.parametrize(("device", "chosen"), [("cpu", True), (None, False)])
def test_this_machine(device: str | None, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable", lambda name: torch.device("cpu"))
    total = int(re.findall(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    seen = preflight.look(device)
    assert seen._replace(host=0) == Machine("cpu", None, None, 0, chosen)
    assert seen.host == pytest.approx(total, rel=0.05)


@pytest.mark.parametrize(("device", "chosen"), [("cuda:0", True), (None, False)])
def test_a_machine_with_a_gpu(device: str | None, chosen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "usable", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(hardware, "name", lambda target: "T4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda target: (5, 9))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda target: (7, 5))
    assert preflight.look(device)._replace(host=0) == Machine("T4", (7, 5), 5, 0, chosen)


@pytest.mark.parametrize("text", [None, "no JSON", "{}", "[]"])
def test_a_bundle_without_a_manifest_is_left_to_the_loader(
    text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check", lambda *arguments: pytest.fail("checked"))
    if text is not None:
        (tmp_path / weights.MANIFEST).write_text(text)
    preflight.require(tmp_path, "cpu")


def test_the_files_of_a_bundle_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/a.safetensors").write_bytes(bytes(10))
    (tmp_path / "b.safetensors").write_bytes(bytes(5))
    (tmp_path / weights.MANIFEST).write_text(json.dumps({"kind": "full"}))
    checked = []
    monkeypatch.setattr(preflight, "look", lambda device: device)
    monkeypatch.setattr(preflight, "check", lambda *arguments: checked.append(arguments))
    preflight.require(tmp_path, "cpu", "bfloat16")
    assert checked == [("cpu", "full", 15, "bfloat16")]
