"""Measures one image on two processes, and simulates it on 8 and 64 workers.

    python -m lab.speed.shard --json results/shard.json

Each process has one thread and the pocket bundle. The bytes of every run are compared; in one run the helper is killed
in the middle of a step. `simulated` is no measurement: it computes the time of a step from the measured seconds and
bytes of a tile and an assumed network. Nothing else may run.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import multiprocessing
import os
import signal
import statistics
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import skimage.data
from numpy.typing import NDArray

from lab import report
from seesr import Engine, Settings
from seesr.networks import weights
from seesr.pipeline.result import Output
from seesr.runtime.progress import Position
from seesr.runtime.tile_batches import TileBatches
from seesr.runtime.tiling import grid

NETWORKS = {"1 Gbit/s": 125e6, "10 Gbit/s": 1.25e9, "100 Gbit/s": 12.5e9}  # bytes per second, assumed
WORKERS = (1, 2, 8, 64)
SIDES = (8192, 16384, 32768)  # of the output, pixels; the last has 1.07 gigapixels
TILE, OVERLAP, CHANNELS = 64, 6, 4
SHARED = ("encode", "denoise", "decode")
LARGER = 300  # side of an input whose autoencoder works in tiles, pixels
VAE_TILE, VAE_OVERLAP = 256, 32  # of the pocket autoencoder, latent pixels
COLUMNS = {
    "processes": "d",
    "denoise_s": ".2f",
    "speedup": ".2f",
    "tiles": "d",
    "tiles_shared": "d",
    "same_bytes": "",
    "encode_s": ".2f",
    "decode_s": ".2f",
}
SIMULATED = {
    "bundle": "", "network": "", "output": "", "workers": "d", "denoise_s": ".1f", "denoise_speedup": ".1f",
    "image_s": ".0f", "image_speedup": ".1f",
}  # fmt: skip


def photo(side: int) -> NDArray[np.uint8]:
    left = (300 - side) // 2
    return skimage.data.chelsea()[left : left + side, left : left + side]


def digest(output: Output) -> str:
    return hashlib.sha256(output.data).hexdigest()


def measured(side: int, repeats: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The least denoising seconds of one and two processes in turn, and of two of which one is killed; task sizes."""
    source, settings, sizes = photo(side), Settings(seed=1), dict[str, Any]()
    with (
        Engine.load(weights.POCKET, "cpu", workers=1) as single,
        Engine.load(weights.POCKET, "cpu", workers=2) as shared,
    ):
        assert shared.helpers is not None and shared.upscaler is not None
        engines = {1: single, 2: shared}
        for engine in engines.values():
            assert engine.upscaler is not None
            engine.upscaler.cache.limit = 0
            engine.run(photo(48), settings)
        outputs: dict[int, list[Output]] = {1: [], 2: []}
        for _ in range(repeats):
            for processes, engine in engines.items():
                outputs[processes].append(engine.run(source, settings))
        pid = shared.helpers.helpers[0].pid
        assert pid is not None

        def kill(position: Position) -> None:
            if position.stage == "denoise" and position.done == 4:
                os.kill(pid, signal.SIGKILL)

        killed = shared.run(source, settings, watchers=(kill,))
        shared.run(source, settings)  # starts it again
        shared.helpers.wait()
        pairs = [{n: engine.run(photo(LARGER), settings) for n, engine in engines.items()} for _ in range(2)]
        sizes = sizes_of(shared, source, settings)
    expected = digest(outputs[1][0])
    base = min(output.metrics["seconds"]["denoise"] for output in outputs[1])
    rows = []
    for processes, group in outputs.items():
        best = min(group, key=lambda output: output.metrics["seconds"]["denoise"])
        rows.append(row(processes, best, base, all(digest(output) == expected for output in group)))
    rows.append({"fault": "SIGKILL of one in the step", **row(2, killed, base, digest(killed) == expected)})
    same = len({digest(output) for pair in pairs for output in pair.values()}) == 1
    least = {
        processes: {name: min(pair[processes].metrics["seconds"][name] for pair in pairs) for name in SHARED}
        for processes in engines
    }
    for processes, seconds in least.items():
        output = min((pair[processes] for pair in pairs), key=lambda output: output.metrics["seconds"]["denoise"])
        stages = {f"{name}_s": seconds[name] for name in ("encode", "decode")}
        rows.append({"input": f"{LARGER}x{LARGER}", **row(processes, output, least[1]["denoise"], same), **stages})
    if not all(row["same_bytes"] for row in rows):
        raise AssertionError(f"the bytes differ: {rows}")
    each = [output.metrics["seconds"]["denoise"] / output.metrics["tiles"] for output in outputs[1]]
    seconds = outputs[1][0].metrics["seconds"]
    megapixels = outputs[1][0].image_data.rgb.size / 3e6
    rest = {name: round(seconds[name] / megapixels, 4) for name in ("enlarge", "encode", "decode", "finish", "file")}
    whole = sum(seconds.values())
    return rows, {
        **sizes,
        "sha256": expected,
        "seconds_per_tile": round(statistics.median(each), 4),
        "seconds_per_megapixel": rest,
        "share_of_time": {name: round(value / whole, 4) for name, value in seconds.items()},
    }


def row(processes: int, output: Output, base: float, same: bool) -> dict[str, Any]:
    seconds = output.metrics["seconds"]["denoise"]
    counts = {name: output.metrics[name] for name in ("tiles", "tiles_shared")}
    return {
        "processes": processes, "denoise_s": round(seconds, 3), "speedup": round(base / seconds, 3), **counts,
        "same_bytes": same,
    }  # fmt: skip


def sizes_of(engine: Engine, source: NDArray[np.uint8], settings: Settings) -> dict[str, Any]:
    """Bytes of a task, its result and an image's context, and the seconds of encoding a task."""
    sizes: dict[str, Any] = {}

    class Look:
        def begin(self, batches: TileBatches) -> None:
            started = time.perf_counter()
            task = batches.task(0)
            sizes["encode_task_s"] = round(time.perf_counter() - started, 5)
            sizes.update(task_bytes=len(task), context_bytes=len(batches.context))

    assert engine.upscaler is not None
    engine.upscaler.pools.append(Look())
    original_put = TileBatches.put

    def look(self: TileBatches, number: int, result: Any, from_helper: bool = False) -> None:
        if from_helper:
            sizes["result_bytes"] = len(result)
        original_put(self, number, result, from_helper)

    TileBatches.put = look
    try:
        engine.run(source, settings)
    finally:
        TileBatches.put = original_put
        engine.upscaler.pools.pop()
    return sizes


def pipe_rate(size: int) -> float:
    """Bytes per second of messages of this size to another thread through the pipe that helper processes use."""
    here, there = multiprocessing.Pipe()
    count = 200

    def answer(connection: Connection) -> None:
        for _ in range(count):
            connection.recv_bytes()
        connection.send_bytes(b"end")

    thread = threading.Thread(target=answer, args=(there,))
    thread.start()
    data, started = bytes(size), time.perf_counter()
    for _ in range(count):
        here.send_bytes(data)
    here.recv_bytes()
    seconds = time.perf_counter() - started
    thread.join()
    return count * size / seconds


class Part(NamedTuple):
    """A stage that is shared, as the simulation computes it.

    Attributes:
        tile, overlap: of its tiles, latent pixels.
        batch: tiles of a batch.
        batch_s: seconds of a batch on a worker.
        batch_bytes: of its task and its result.
        times: how often the stage runs.
    """

    tile: int
    overlap: int
    batch: int
    batch_s: float
    batch_bytes: int
    times: int = 1

    def batches(self, side: int) -> int:
        """Batches of square latents of `side` x `side`."""
        return -(-len(grid(side, side, self.tile, self.overlap)) // self.batch)


class Cost(NamedTuple):
    """What the simulation computes with.

    Attributes:
        parts: the shared stages by name.
        rest_s: seconds for each megapixel of output of everything else, on the worker that has the image.
        factor: pixels for each latent pixel, each way.
    """

    parts: dict[str, Part]
    rest_s: float
    factor: int


def stage_seconds(batches: int, part: Part, rate: float, workers: int) -> float:
    """Seconds of one pass of a stage, simulated. Messages pass the lead's link one after the other, in both directions.

    The lead computes, too. A helper has at most two batches: one that it computes and the next one on its way.
    """
    size = part.batch_bytes / rate
    link, end = 0.0, 0.0
    free = [(0.0, worker) for worker in range(workers)]  # when each can be sent (or take) its next batch
    ready = [0.0] * workers  # when each has computed what it has
    heapq.heapify(free)
    for _ in range(batches):
        at, worker = heapq.heappop(free)
        if worker == 0:
            ready[0] = at + part.batch_s
            heapq.heappush(free, (ready[0], 0))
        else:
            link = max(link, at) + size
            began = max(ready[worker], link)
            ready[worker] = began + part.batch_s
            heapq.heappush(free, (began, worker))  # when it begins this one, the next may be sent
        end = max(end, ready[worker])
    return end


def simulated(costs: dict[str, Cost]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for bundle, cost in costs.items():
        for network, rate in NETWORKS.items():
            for side in SIDES:
                alone: dict[str, float] = {}
                for workers in WORKERS:
                    seconds = {
                        name: part.times * stage_seconds(part.batches(side // cost.factor), part, rate, workers)
                        for name, part in cost.parts.items()
                    }
                    seconds["image"] = sum(seconds.values()) + cost.rest_s * side * side / 1e6
                    alone = alone or seconds
                    rows.append(
                        {"bundle": bundle, "network": network, "output": f"{side}x{side}", "workers": workers,
                         "denoise_s": round(seconds["denoise"], 2), "image_s": round(seconds["image"], 1),
                         "denoise_speedup": round(alone["denoise"] / seconds["denoise"], 2),
                         "image_speedup": round(alone["image"] / seconds["image"], 2)}
                    )  # fmt: skip
    return rows


def pocket_cost(figures: dict[str, Any]) -> Cost:
    """The pocket bundle on one thread of a CPU, by what was measured; its autoencoder works in tiles, too."""
    each, factor = figures["seconds_per_megapixel"], 4
    area, core = (VAE_TILE * factor) ** 2, ((VAE_TILE - VAE_OVERLAP) * factor) ** 2
    channels = figures["result_bytes"] // (4 * TILE**2)
    latents = 4 * channels * VAE_TILE**2
    result = 4 * channels * (VAE_TILE - VAE_OVERLAP) ** 2
    parts = {
        "encode": Part(VAE_TILE, VAE_OVERLAP, 1, each["encode"] * area / 1e6, 12 * area + result),
        "denoise": Part(
            TILE, OVERLAP, 1, figures["seconds_per_tile"], figures["task_bytes"] + figures["result_bytes"]
        ),
        "decode": Part(VAE_TILE, VAE_OVERLAP, 1, each["decode"] * area / 1e6, latents + 12 * core),
    }  # fmt: skip
    return Cost(parts, sum(value for name, value in each.items() if name not in parts), factor)


def full_cost(path: Path) -> Cost:
    """The full networks on an H200, by the image of 4096 x 4096 pixels that lab.speed.gpu_check measured."""
    (image,) = json.loads(path.read_text())["parts"]["largest"]["rows"]
    metrics = image["metrics"]
    seconds, batch, steps = metrics["seconds"], metrics["tile_batch"], metrics["steps"]
    rest = sum(value for name, value in seconds.items() if name not in ("denoise", "tags", "text"))
    each = seconds["denoise"] / steps / metrics["tiles"]
    size = 2 * 4 * CHANNELS * TILE**2 + 3 * (8 * TILE) ** 2
    part = Part(TILE, OVERLAP, batch, each * batch, batch * size, steps)
    return Cost({"denoise": part}, rest / (image["output"] ** 2 / 1e6), 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=236, help="side of the input, pixels")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":  # which is read before this line runs
        command = [sys.executable, "-m", "lab.speed.shard", *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    rows, figures = measured(args.side, args.repeats)
    print(report.table(rows, COLUMNS))
    costs = {
        "pocket, CPU thread": pocket_cost(figures),
        "full, H200": full_cost(report.RESULTS / "gpu-h200" / "evidence.json"),
    }
    table = simulated(costs)
    print(report.table(table, SIMULATED))
    if args.json:
        report.write(
            args.json, rows, measured={**figures, "pipe_bytes_per_s": round(pipe_rate(figures["task_bytes"]))},
            simulated_from={
                name: {**cost._asdict(), "parts": {key: part._asdict() for key, part in cost.parts.items()}}
                for name, cost in costs.items()
            }, simulated=table,
            cores=len(os.sched_getaffinity(0)),
        )  # fmt: skip


if __name__ == "__main__":
    main()
