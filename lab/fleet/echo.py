"""A fleet worker whose engine sleeps and returns its input, to load a fleet without computing.

An image whose user_prompt is "poison" kills its worker's child. ECHO_RUNS names a file to which every run appends the
id of its job and the version of its worker.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from seesr.engine.quote import make_quote
from seesr.engine.rates import Measured, Rates
from seesr.fleet import worker
from seesr.images.image_data import ImageData
from seesr.images.read import open_header, read_file
from seesr.networks.weights import Bundle
from seesr.pipeline.result import Output
from seesr.pipeline.work import Outline, plan, terms
from seesr.runtime.progress import Deadline, Progress, Watcher
from seesr.settings import Settings

SECONDS = float(os.environ.get("ECHO_SECONDS", "0.25"))
TILES = 10
OUTLINE = Outline(4, 3, 64, 1, (64,), 8, 256, 256)
app = worker.app
app.conf.imports = [*app.conf.imports, "lab.fleet.echo"]


class Echo:
    """Behaves as an Engine does."""

    def __init__(self) -> None:
        self.rates = Rates()
        self.rates.begin({"host": 1}, OUTLINE)

    def run(
        self,
        data: Path,
        settings: Settings,
        deadline: Deadline | None,
        watchers: tuple[Watcher, ...],
        mask: Path | None,
    ) -> Output:
        content, progress = data.read_bytes(), Progress(*watchers)
        seconds = SECONDS * settings.num_inference_steps
        progress.start("denoise", TILES)
        for _ in range(TILES):
            time.sleep(seconds / TILES)
            progress.advance()
        if settings.user_prompt == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        with Path(os.environ["ECHO_RUNS"]).open("a") as runs:
            runs.write(f"{data.name.removeprefix('in-')} {worker.version}\n")
        self.learn(data, settings, seconds, len(content))
        metrics: Any = {"seed": settings.seed or 0, "seconds": {"denoise": seconds}, "tiles": TILES, "steps": 1}
        metrics |= {"out_of_memory_retries": 0, "float32_retries": 0, "output_size": "1x1"}
        nothing = ImageData(np.zeros((1, 1, 3), np.uint8))
        output = Output(nothing, None, settings.replace(seed=metrics["seed"]), metrics, nothing, ([], 1))
        output.__dict__["data"] = content  # the value of the cached property
        return output

    def learn(self, data: Path, settings: Settings, seconds: float, length: int) -> None:
        """Refines the rates as an Engine does."""
        size = open_header(read_file(data)).size
        quoted = make_quote(OUTLINE, self.rates, settings, size, None).seconds
        planned = plan(OUTLINE, settings, size)
        megapixels = planned.output[0] * planned.output[1] / 1e6
        work = {"denoise": terms(OUTLINE, settings, size, planned)["denoise"]}
        self.rates.learn(
            Measured(work, {"denoise": seconds}, quoted, settings.suffix, megapixels, length, megapixels, {}, {})
        )

    def healthy(self) -> bool:
        return True

    loaded = Bundle(Path(), "echo", "pocket", "none", {})

    def unload(self) -> None:
        pass

    def reload(self) -> None:
        pass


worker.load = Echo

if __name__ == "__main__":
    worker.run("lab.fleet.echo")
