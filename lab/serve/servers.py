"""Starts and ends a `seesr serve` with the echo engine on this machine."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

from lab.report import ROOT


class EchoServer:
    """`with EchoServer(folder) as server:`; its log goes to folder/log, its data to folder/data.

    Args:
        files: that it may open at the same time; None: as many as this process.
        module: that starts it, with its arguments.
    """

    def __init__(
        self,
        folder: Path,
        files: int | None = None,
        module: tuple[str, ...] = ("lab.serve.echo",),
        **environment: str,
    ) -> None:
        self.folder, self.files, self.module = folder, files, module
        folder.mkdir(parents=True, exist_ok=True)
        self.data = Path(environment.get("SEESR_DATA", folder / "data"))
        defaults = {
            "SEESR_DATA": str(self.data),
            "SEESR_WEIGHTS": str(ROOT / "weights/pocket"),
            "SEESR_RATE": "1000000",
        }
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT), **defaults, **environment}
        self.client = httpx.Client(timeout=30)

    def start(self, seconds: float = 30) -> str:
        """Its address; the server is ready.

        Raises:
            RuntimeError: it does not start; with the end of its log.
        """

        def limit() -> None:
            if self.files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self.files, self.files))

        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.module, "--port", "0"],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                preexec_fn=limit,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.process.stdout.close()
        if not line.startswith("seesr at "):
            self.process.wait()
            raise RuntimeError((self.folder / "log").read_text()[-1000:])
        self.url = line.split()[-1].rstrip("/")
        end = time.monotonic() + seconds
        while self.client.get(f"{self.url}/ready").status_code != 200:
            if time.monotonic() > end:
                raise RuntimeError(self.client.get(f"{self.url}/ready").text)
            time.sleep(0.02)
        return self.url

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return self.client.request(method, self.url + path, **more)

    def end(self, signal_number: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Sends a signal and waits for the end; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def __enter__(self) -> EchoServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self.client.close()
