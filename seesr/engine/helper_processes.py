"""Helper processes of this machine that share the tiles of one image, on its cores or on its other GPUs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import torch

from seesr.config import Configuration
from seesr.engine.tile_worker import FAULT, RESULT
from seesr.networks.weights import CannotServe
from seesr.runtime.tile_batches import TileBatches

log = logging.getLogger(__name__)


def helper_devices(workers: int, device: torch.device, threads: int, cores: int, gpus: int) -> list[str]:
    """The devices of the helpers.

    Args:
        workers: processes that share an image, the one that has it included.
        device: of that one.
        threads: of each process on a CPU.
        cores: that this process may use.
        gpus: of this machine.

    Raises:
        CannotServe: there are not enough cores or GPUs; one line.
    """
    if device.type != "cuda":
        if workers * threads > cores:
            raise CannotServe(
                f"{workers} tile workers with {threads} threads each need {workers * threads} cores; this process has "
                f"{cores}: set OMP_NUM_THREADS={max(1, cores // workers)}, or use fewer tile workers"
            )
        return ["cpu"] * (workers - 1)
    if workers > gpus:
        raise CannotServe(
            f"{workers} tile workers need {workers} GPUs; this machine has {gpus}: set SEESR_TILE_WORKERS={gpus}"
        )
    index_of_parent = device.index or 0  # without an index it is the first
    return [f"cuda:{index}" for index in range(gpus) if index != index_of_parent][: workers - 1]


class HelperProcess:
    """One helper process. It is started again when it has ended.

    Args:
        arguments: of seesr.engine.tile_worker, after the file descriptor.
    """

    def __init__(self, *arguments: str) -> None:
        self.arguments, self.busy = arguments, threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Starts the process; it loads the bundle while this one continues."""
        self.connection, other = multiprocessing.Pipe()
        self.image, self.ready = "", False
        _, _, threads, *_ = self.arguments
        with other:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "seesr.engine.tile_worker", str(other.fileno()), *self.arguments],
                pass_fds=[other.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": threads},
                stdin=subprocess.DEVNULL,
            )

    def receive(self) -> bytes:
        """The prediction of a reply, or READY, which comes once, when the bundle is loaded.

        Raises:
            EOFError, OSError: the process has ended.
            RuntimeError: the reason that it gives.
        """
        reply = self.connection.recv_bytes()
        if reply.startswith(FAULT):
            raise RuntimeError(reply.removeprefix(FAULT).decode())
        self.ready = True
        return reply.removeprefix(RESULT)

    def wait(self) -> None:
        """Until the process has loaded the bundle.

        Raises:
            EOFError, OSError, RuntimeError: as `receive`.
        """
        with self.busy:
            if not self.ready:
                self.receive()

    def work(self, batches: TileBatches) -> None:
        """Takes batches until the step ends, or the process fails: its batch then goes to others."""
        with self.busy:  # a step that was cancelled may still run here
            number = None
            try:
                if self.process is None:
                    self.start()
                if not self.ready:
                    self.receive()
                if self.image != batches.image:
                    self.connection.send_bytes(b"+" + batches.image.encode())
                    self.connection.send_bytes(batches.context)
                    self.image = batches.image
                while (number := batches.take_or_wait()) is not None:
                    self.connection.send_bytes(batches.image.encode())
                    self.connection.send_bytes(batches.task(number))
                    batches.put(number, self.receive(), from_helper=True)
            except (EOFError, OSError, RuntimeError) as error:
                reason = " ".join(str(error).split()) or "it has ended"
                log.warning("tile worker %s failed and is restarted: %s", self.pid, reason)
                if number is not None:
                    batches.give_back(number)
                self._end()

    @property
    def pid(self) -> int | None:
        """Process id; None: it does not run."""
        return None if self.process is None else self.process.pid

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.connection.close()
            self.process = None

    def close(self) -> None:
        """Ends the process, also in the middle of a batch."""
        if self.process is not None:
            self.process.kill()
        with self.busy:
            self._end()


class HelperProcesses:
    """The helper processes of an engine; a seesr.runtime.tile_batches.TilePool.

    Args:
        devices: one for each helper, see `helper_devices`.
        threads: of each on a CPU; a CPU's results depend on it.
        configuration: of the engine: the helpers compute as it does.
    """

    def __init__(self, bundle: Path, devices: list[str], threads: int, configuration: Configuration) -> None:
        graphs = "1" if configuration.cuda_graphs else "0"
        options = str(threads), configuration.attention, graphs, configuration.precision
        self.helpers = [HelperProcess(str(bundle), device, *options) for device in devices]

    def wait(self) -> None:
        """Until all have loaded the bundle.

        Raises:
            CannotServe: one cannot; one line.
        """
        for helper in self.helpers:
            try:
                helper.wait()
            except (EOFError, OSError, RuntimeError) as error:
                self.close()
                reason = " ".join(str(error).split()) or "it has ended"
                raise CannotServe(f"a tile worker cannot start ({reason}): see its log or use fewer") from None

    def begin(self, batches: TileBatches) -> None:
        """Lets the helpers take batches until these are closed."""
        for helper in self.helpers:
            threading.Thread(target=helper.work, args=(batches,), daemon=True).start()

    def close(self) -> None:
        """Ends all processes."""
        for helper in self.helpers:
            helper.close()
