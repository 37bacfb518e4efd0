"""Runs Cog's HTTP server on predict.py as a child process, for the demo, the tests and the benchmarks."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

import requests

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class CogServer:
    """`with CogServer() as server:`; the worker's log goes to `log`, or to this process's standard error."""

    def __init__(self, log: Path | None = None, **environment: str) -> None:
        self.log, self.port = log, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        python = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "PATH": f"{python}:{os.environ['PATH']}",  # coglet starts its worker as a bare `python`
            "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
            "PORT": str(self.port),
            "LOG_FORMAT": "console",
            "COG_LOG_LEVEL": "warn",
            **environment,
        }

    def __enter__(self) -> CogServer:
        output = self.log.open("w") if self.log else None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cog.server.http", "--host", "127.0.0.1"],
            cwd=ROOT,
            env=self.environment,
            stdout=output or sys.stderr,
            stderr=output or sys.stderr,
            start_new_session=True,
        )
        if output:
            output.close()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def health(self) -> dict:
        return requests.get(f"{self.url}/health-check", timeout=10).json()

    def wait_until_ready(self, seconds: float = 300) -> dict:
        """Waits for READY.

        Raises:
            RuntimeError: setup failed, the server ended, or the time is over; with the server's output.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with code {self.process.returncode}")
            try:
                health = self.health()
            except requests.ConnectionError:
                health = {"status": "STARTING"}
            if health["status"] == "READY":
                return health
            if health["status"] == "SETUP_FAILED":
                raise RuntimeError(f"setup failed: {health.get('setup')}")
            time.sleep(0.1)
        raise RuntimeError(f"not ready after {seconds:.0f} s")
