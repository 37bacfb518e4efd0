"""`seesr serve` with an engine that sleeps and returns its input, to test the server without computing.

    python -m lab.serve.echo --port 0
    python -m lab.serve.echo mcp            seesr mcp in place of seesr serve

ECHO_SECONDS is the time of one image. ECHO_RUNS names a file to which every run appends a line when it begins: the id
of the job, and "again" if its result was stored already.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from seesr.engine.rates import MIN_IMAGES, Quote
from seesr.runtime.estimate import Forecast, Speed
from seesr.runtime.progress import Deadline, Progress, Watcher
from seesr.settings import Settings

TILES = 10


class Output(NamedTuple):
    """As seesr.engine.engine.Output, without torch."""

    data: bytes
    metrics: dict[str, Any]
    seed: int


class Echo:
    """Behaves as an Engine does.

    Args:
        seconds: for one image.
        runs: file to which every run appends a line; None: none.
    """

    def __init__(self, seconds: float = 0.0, runs: Path | None = None) -> None:
        self.seconds, self.runs, self.speed = seconds, runs, Speed()

    def run(
        self,
        data: Path,
        settings: Settings,
        deadline: Deadline | None,
        watchers: tuple[Watcher, ...],
        mask: Path | None = None,
    ) -> Output:
        content, progress = data.read_bytes(), Progress(*watchers)
        progress.forecast = Forecast(self.speed, {"denoise": 1.0})
        if self.runs is not None:
            stored = (data.parents[1] / "outputs" / f"{data.name}.{settings.suffix}").exists()
            with self.runs.open("a") as runs:
                runs.write(f"{data.name}{' again' if stored else ''}\n")
        progress.start("denoise", TILES)
        for _ in range(TILES):
            time.sleep(self.seconds / TILES)
            progress.advance()
        self.speed.learn({"denoise": 1.0}, {"denoise": self.seconds})
        metrics = {"seed": settings.seed, "seconds": {"denoise": self.seconds}, "tiles": TILES, "steps": 1}
        metrics["output_size"] = "1x1"
        return Output(content, {**metrics, "out_of_memory_retries": 0, "float32_retries": 0}, settings.seed or 0)

    def quote(self, data: Path, settings: Settings) -> Quote:
        length = data.stat().st_size
        return Quote("1x1", TILES, self.seconds, self.seconds, length, {"host": 1}, None, MIN_IMAGES)

    def unload(self) -> None:
        """Holds nothing."""

    def healthy(self) -> bool:
        return True

    def about(self) -> dict[str, Any]:
        return {"loaded": True}


def main() -> int:
    from seesr.cli import main as cli
    from seesr.serving import app

    runs = os.environ.get("ECHO_RUNS")
    echo = Echo(float(os.environ.get("ECHO_SECONDS", "0.05")), Path(runs) if runs else None)
    app.load_engine = lambda *_: echo  # type: ignore[assignment, return-value]
    return cli(sys.argv[1:] if sys.argv[1:2] == ["mcp"] else ["serve", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
