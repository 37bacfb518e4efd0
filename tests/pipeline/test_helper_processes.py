"""Two processes of one machine compute the tiles of one image."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import skimage.data
import torch

from seesr import Engine, Settings
from seesr.config import Configuration
from seesr.engine import helper_processes
from seesr.engine.helper_processes import HelperProcess, HelperProcesses, helper_devices
from seesr.networks import weights
from seesr.networks.weights import CannotServe
from seesr.runtime.progress import Position

QUICK = Settings(num_inference_steps=2, seed=1, latent_tiled_size=16, latent_tiled_overlap=0)  # 36 tiles in a step
SOURCE = skimage.data.chelsea()[60:156, 100:196]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> Iterator[Engine]:
    with Engine.load(weights.POCKET, "cpu", workers=2) as engine:
        yield engine


def pid_of(engine: Engine) -> int:
    assert engine.helpers is not None
    pid = engine.helpers.helpers[0].pid
    assert pid is not None
    return pid


def test_a_helper_that_ends_at_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper_processes.sys, "executable", "false")
    helper = HelperProcess("bundle", "cpu", "1")
    with pytest.raises((EOFError, OSError)):
        helper.wait()
    assert helper.pid is not None
    helper.close()
    assert helper.pid is None and helper.connection.closed
    helper.close()


@pytest.mark.long
def test_two_processes_give_the_bytes_of_one(pair: Engine, engine: Engine) -> None:
    shared = pair.run(SOURCE, QUICK)
    assert 0 < shared.metrics["tiles_shared"] < 72
    assert shared.data == engine.run(SOURCE, QUICK).data


@pytest.mark.long
def test_a_helper_that_is_killed_in_the_middle_of_a_step(pair: Engine, engine: Engine) -> None:
    killed = pid_of(pair)

    def kill(position: Position) -> None:
        if position.stage == "denoise" and position.done == 8:
            os.kill(killed, signal.SIGKILL)

    first, second, third = (QUICK.replace(seed=seed) for seed in (2, 3, 4))  # equal ones would be cached
    shared = pair.run(SOURCE, first, watchers=(kill,))
    assert shared.data == engine.run(SOURCE, first).data
    assert pair.helpers is not None
    pair.run(SOURCE, second)  # starts it again
    pair.helpers.wait()
    assert pid_of(pair) != killed
    again = pair.run(SOURCE, third)
    assert again.metrics["tiles_shared"] > 0
    assert again.data == engine.run(SOURCE, third).data


@pytest.mark.long
def test_helpers_end_with_their_engine_and_start_with_it() -> None:
    with Engine.load(weights.POCKET, "cpu", workers=2) as engine:
        first = pid_of(engine)
        engine.unload()
        with pytest.raises(ProcessLookupError):
            os.kill(first, 0)
        engine.reload()
        assert engine.run(SOURCE, QUICK).metrics["tiles_shared"] > 0


@pytest.mark.long
def test_a_helper_ends_when_its_connection_is_closed() -> None:
    helpers = HelperProcesses(weights.POCKET, ["cpu"], 1, Configuration())
    (helper,) = helpers.helpers
    helper.wait()
    assert helper.process is not None
    helper.connection.close()
    assert helper.process.wait(30) == 0
    helpers.close()


@pytest.mark.long
def test_a_helper_that_cannot_load_the_bundle(tmp_path: Path) -> None:
    with pytest.raises(CannotServe, match=f"a tile worker cannot start .*{tmp_path}"):
        HelperProcesses(tmp_path, ["cpu"], 1, Configuration()).wait()


def test_the_devices_of_helpers() -> None:
    assert helper_devices(1, CPU, 8, 8, 0) == []
    assert helper_devices(3, CPU, 2, 6, 0) == ["cpu", "cpu"]
    assert helper_devices(3, torch.device("cuda", 1), 8, 8, 4) == ["cuda:0", "cuda:2"]
    assert helper_devices(2, torch.device("cuda"), 8, 8, 2) == ["cuda:1"]


def test_too_few_cores_or_gpus_are_refused() -> None:
    with pytest.raises(CannotServe, match="need 8 cores; this process has 4: set OMP_NUM_THREADS=2"):
        helper_devices(2, CPU, 4, 4, 0)
    with pytest.raises(CannotServe, match="need 4 GPUs; this machine has 2: set SEESR_TILE_WORKERS=2"):
        helper_devices(4, torch.device("cuda", 0), 8, 8, 2)
    with pytest.raises(ValueError, match="workers is 0: it must be at least 1"):
        Engine.load(weights.POCKET, "cpu", workers=0)
