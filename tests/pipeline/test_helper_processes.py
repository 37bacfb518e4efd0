"""Two processes of one machine compute the tiles of one image."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import skimage.data
import torch

from seesr import Engine, Settings
from seesr.config import Configuration
from seesr.engine import helper_processes, tile_worker
from seesr.engine.helper_processes import HelperProcess, HelperProcesses, helper_devices
from seesr.networks import weights
from seesr.networks.weights import CannotServe
from seesr.runtime.progress import Position
from seesr.runtime.tile_batches import TileBatches

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


class Process:
    """Stands for a process: keeps its end of the connection open, and runs in a thread of this process."""

    pid = 7

    def __init__(self, command: list[str], pass_fds: list[int], env: dict[str, str], stdin: int) -> None:
        (passed,) = pass_fds
        assert command[1:4] == ["-m", "seesr.engine.tile_worker", str(passed)]
        self.arguments, self.env, self.calls = [str(os.dup(passed)), *command[4:]], env, list[str]()
        self.ended = threading.Event()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        with contextlib.suppress(EOFError, ConnectionError):
            tile_worker.main(*self.arguments)
        self.ended.set()

    def kill(self) -> None:
        self.calls.append("kill")

    def wait(self) -> int:
        self.calls.append("wait")
        return 0


class Adder:
    """Stands for the tile helper: answers with the context of the image and the task."""

    def __init__(self, networks: object, graphs: object) -> None:
        self.contexts: dict[str, bytes] = {}

    def learn(self, image: str, context: bytes) -> None:
        self.contexts[image] = context

    def __call__(self, image: str, task: bytes) -> bytes:
        if task == b"too large":
            raise RuntimeError("out of\nmemory")
        return self.contexts[image] + task


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was loaded, with its options, and "warm-up"; helpers run in this process and compute nothing."""
    result: list[Any] = []

    def load(bundle: str, device: str, attention: str, graphs: bool, precision: str) -> Any:
        if bundle == "missing":
            raise ValueError("there is no bundle")
        if bundle == "gone":
            raise EOFError
        result.append((bundle, device, attention, graphs, precision))
        networks = SimpleNamespace(device=torch.device(device))
        return SimpleNamespace(networks=networks, graphs=None, warm_up=lambda: result.append("warm-up"))

    monkeypatch.setattr(helper_processes.subprocess, "Popen", Process)
    monkeypatch.setattr(tile_worker.signal, "signal", lambda number, action: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: result.append(f"{threads} threads"))
    monkeypatch.setattr("seesr.pipeline.upscaler.Upscaler.load", load)
    monkeypatch.setattr("seesr.pipeline.tile_helper.TileHelper", Adder)
    return result


def batches_of(image: str, context: bytes, *tasks: bytes) -> TileBatches:
    return TileBatches(image, context, len(tasks), tasks.__getitem__)


def work(helper: HelperProcess, batches: TileBatches) -> list[bytes]:
    """The results of all batches, which the helper computes."""
    thread, count = threading.Thread(target=helper.work, args=(batches,)), len(batches.waiting)
    thread.start()
    results = [batches.pop(number, 10) for number in range(count)]
    batches.close()
    thread.join(10)
    assert not thread.is_alive()
    return results


@pytest.mark.parametrize(("device", "graphs"), [("cpu", "1"), ("cuda", "0")])
def test_a_helper_gets_the_context_of_an_image_once(loads: list[Any], device: str, graphs: str) -> None:
    helper = HelperProcess("bundle", device, "3", "sdpa", graphs, "float32")
    process: Any = helper.process
    assert process.env["OMP_NUM_THREADS"] == "3" and process.env["PATH"] == os.environ["PATH"]
    helper.wait()
    helper.wait()
    loaded = ["3 threads", ("bundle", device, "sdpa", graphs == "1", "float32")]
    assert loads == loaded + (["warm-up"] if device == "cuda" else [])
    first = batches_of("image", b"context ", b"0", b"1", b"2")
    assert work(helper, first) == [b"context 0", b"context 1", b"context 2"]
    assert first.from_helpers == {0, 1, 2}
    assert work(helper, batches_of("image", b"unused ", b"3")) == [b"context 3"]
    assert work(helper, batches_of("another", b"other ", b"4")) == [b"other 4"]
    assert helper.pid == 7
    helper.close()
    assert process.calls == ["kill", "kill", "wait"] and helper.pid is None and process.ended.wait(10)


def test_a_batch_that_fails_goes_to_others_and_the_helper_starts_again(
    loads: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    helper = HelperProcess("bundle", "cpu", "1", "sdpa", "0", "float32")
    first, batches = helper.process, batches_of("image", b"context ", b"too large")
    helper.work(batches)
    assert batches.take() == 0 and helper.process is None and helper.connection.closed
    assert "tile worker 7 failed and is restarted: RuntimeError: out of memory" in caplog.text
    assert work(helper, batches_of("image", b"context ", b"1")) == [b"context 1"]
    assert helper.process is not first
    helper.close()


def test_a_helper_says_why_it_cannot_load(loads: list[Any]) -> None:
    helper = HelperProcess("missing", "cpu", "1", "sdpa", "0", "float32")
    with pytest.raises(RuntimeError, match=r"^ValueError: there is no bundle$"):
        helper.wait()
    helper.close()


@pytest.mark.parametrize(
    ("bundle", "reason"), [("missing", "ValueError: there is no bundle"), ("gone", "it has ended")]
)
def test_a_helper_that_ends_before_it_took_a_batch(
    loads: list[Any], bundle: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    batches = batches_of("image", b"context ", b"0")
    HelperProcess(bundle, "cpu", "1", "sdpa", "0", "float32").work(batches)
    assert f"tile worker 7 failed and is restarted: {reason}" in caplog.text
    assert [batches.take(), batches.take()] == [0, None]


def test_the_helpers_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Fake:
        def __init__(self, *arguments: str) -> None:
            self.arguments, self.calls, self.worked = arguments, list[str](), threading.Event()
            made.append(self)

        def wait(self) -> None:
            self.calls.append("wait")
            if self is made[-1] and failing:
                raise EOFError

        def work(self, batches: TileBatches) -> None:
            assert batches is step
            self.worked.set()

        def close(self) -> None:
            self.calls.append("close")

    failing, step = False, batches_of("image", b"")
    monkeypatch.setattr(helper_processes, "HelperProcess", Fake)
    helpers = HelperProcesses(Path("b"), ["cpu", "cuda:1"], 2, Configuration(cuda_graphs=False))
    HelperProcesses(Path("b"), ["cpu"], 2, Configuration())
    assert [one.arguments for one in made] == [
        ("b", "cpu", "2", "auto", "0", "auto"), ("b", "cuda:1", "2", "auto", "0", "auto"),
        ("b", "cpu", "2", "auto", "1", "auto"),
    ]  # fmt: skip
    del made[2]
    helpers.wait()
    helpers.begin(step)
    assert all(one.worked.wait(10) for one in made)
    failing = True
    with pytest.raises(CannotServe, match=r"a tile worker cannot start \(it has ended\): see its log or use fewer"):
        helpers.wait()
    assert [one.calls for one in made] == [["wait", "wait", "close"]] * 2


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
    assert helper_devices(4, torch.device("cuda", 0), 8, 8, 4) == ["cuda:1", "cuda:2", "cuda:3"]
    assert helper_devices(3, torch.device("cuda", 1), 8, 8, 4) == ["cuda:0", "cuda:2"]
    assert helper_devices(2, torch.device("cuda"), 8, 8, 2) == ["cuda:1"]


def test_too_few_cores_or_gpus_are_refused() -> None:
    with pytest.raises(CannotServe, match="need 8 cores; this process has 4: set OMP_NUM_THREADS=2"):
        helper_devices(2, CPU, 4, 4, 0)
    with pytest.raises(CannotServe, match="need 9 cores; this process has 2: set OMP_NUM_THREADS=1"):
        helper_devices(9, CPU, 1, 2, 0)
    with pytest.raises(CannotServe, match="need 4 GPUs; this machine has 2: set SEESR_TILE_WORKERS=2"):
        helper_devices(4, torch.device("cuda", 0), 8, 8, 2)
    with pytest.raises(ValueError, match="workers is 0: it must be at least 1"):
        Engine.load(weights.POCKET, "cpu", workers=0)
