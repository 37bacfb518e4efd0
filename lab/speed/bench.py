"""Benchmark: seconds, operations and memory of every stage, one JSON line per configuration.

    python -m lab.speed.bench --device cpu --size 512 --steps 2 --json results/bench/FILE.jsonl
    python -m lab.speed.bench --bundle weights/pocket --size 512 1024 2048
    python -m lab.speed.bench --baseline --size 512        beside plain diffusers modules, interleaved
    python -m lab.speed.bench --table                      results/bench.md from the files in results/bench

Without --bundle the networks have the full sizes and made-up weights. Seconds are medians over --repeats after the
first prediction, which is reported apart. On a GPU every stage ends with a synchronisation.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # noqa: E402

from lab import report  # noqa: E402
from lab.speed.timing import least_seconds  # noqa: E402
from seesr import Progress, Settings, Upscaler  # noqa: E402
from seesr.images.image_data import ImageData  # noqa: E402
from seesr.networks import hardware, kernels, models  # noqa: E402
from seesr.networks.graphs import CudaRecorder, Graphs  # noqa: E402
from seesr.pipeline import sampling  # noqa: E402
from seesr.pipeline.pipeline import UpscaleRun  # noqa: E402
from seesr.pipeline.tagging import to_floats  # noqa: E402
from seesr.runtime import precision  # noqa: E402

IMPORTED = time.perf_counter()
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STAGES = ("tags", "text", "enlarge", "encode", "denoise", "decode", "finish", "file")


def linear_flop(x: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(np.prod(x)) * weight[0]


def attention_flop(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}
if kernels.one_dnn_multiplies(torch.float32):
    COUNTED[torch.ops.mkldnn._linear_pointwise] = linear_flop


class Counted(UpscaleRun):
    """Counts the floating-point operations of every stage: a product and a sum are two."""

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, super().timed(stage):
            yield
        self.__dict__.setdefault("tflop", {})[stage] = counter.get_total_flops() / 1e12


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the best matrix product that this device shows."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    works: list[Callable[[], object]] = [lambda: a @ b]
    if device.type == "cpu" and kernels.one_dnn_multiplies(dtype):
        works.append(lambda: kernels.matrix_product(a, b, None))
    return 2 * side**3 / min(least_seconds(work, device, times=5) for work in works) / 1e12


class Plain:
    """The same stages as the reference runs them: the tagger
    twice, keys and values of the context in every step, one image of one tile."""

    def __init__(self, networks: models.Models) -> None:
        self.networks = networks

    @torch.no_grad()
    def __call__(self, image: ImageData, settings: Settings) -> dict[str, float]:
        networks, seconds = self.networks, {}
        job = UpscaleRun(networks, settings, image, Progress())

        @contextlib.contextmanager
        def timed(stage: str) -> Iterator[None]:
            started = time.perf_counter()
            yield
            if networks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[stage] = time.perf_counter() - started

        with timed("tags"):
            pixels = to_floats(torch.tensor(image.rgb).to(networks.device))
            networks.tagger(pixels)
            _, image_tokens = networks.tagger(pixels)
        with timed("text"):
            ids = networks.tokenizer.encode_batch([settings.positive_prompt]).to(networks.device)
            text = networks.text_encoder.hidden(ids)
        with timed("enlarge"):
            conditioning = to_floats(job.enlarge()[0]).to(networks.dtype)
        scaling = networks.vae.config["scaling_factor"]
        with timed("encode"):
            z = networks.vae.encoder(2 * conditioning - 1)[:, : networks.unet.config["in_channels"]] * scaling
        steps = sampling.schedule(networks.scheduler, job.steps)
        with timed("denoise"):
            z = sampling.start_latents(z.float(), torch.randn(z.shape, device=z.device), networks.scheduler)
            for step in steps:
                x, t = z.to(networks.dtype), torch.full((1,), step.t, device=z.device)
                down, mid = networks.controlnet(x, t, (text, image_tokens), conditioning, 1.0)
                noise = networks.unet(x, t, (text, image_tokens), down, mid).float()
                x0 = sampling.predicted_x0(noise, z, step)
                z = sampling.ddpm_step(z, x0, step, torch.randn_like(z))
        with timed("decode"):
            networks.vae.decoder((z / scaling).to(networks.dtype)).float().cpu()
        return seconds


def copies(networks: models.Models) -> models.Models:
    """The same networks as modules of their own, before anything is arranged for the device. On a CPU, where only the
    autoencoder's layout is changed and memory is short, the others stand on the same parameters."""

    def copied(network: torch.nn.Module, share: bool) -> Any:
        shared = [network.config] if hasattr(network, "config") else []
        return copy.deepcopy(
            network,
            {id(shared_part): shared_part for shared_part in [*shared, *(network.parameters() if share else [])]},
        )

    share = networks.device.type == "cpu"
    names = ("unet", "controlnet", "text_encoder", "tagger")
    others = {name: copied(getattr(networks, name), share) for name in names}
    return dataclasses.replace(networks, vae=copied(networks.vae, share=False), **others)


def photograph(side: int) -> ImageData:
    import skimage.data

    result = Image.fromarray(skimage.data.astronaut()).resize((side, side), Image.Resampling.BICUBIC)
    return ImageData(np.asarray(result))


def predict(upscaler: Upscaler, image: ImageData, settings: Settings) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds per stage, the PNG file among them, and the metrics."""
    result = upscaler(image, settings)
    started = time.perf_counter()
    _ = result.data
    return {**result.metrics["seconds"], "file": time.perf_counter() - started}, result.metrics


def replayed(upscaler: Upscaler, image: ImageData, settings: Settings) -> dict[str, int]:
    """How many graphs there are, and by how many levels of 255 an image through them is off one without, at most."""
    graphs = upscaler.graphs
    assert graphs is not None
    through, recordings = upscaler(image, settings).image_data.rgb, graphs.recordings
    graphs.recordings = {}
    without = upscaler(image, settings).image_data.rgb
    graphs.recordings = recordings
    return {"graphs": len(recordings), "levels_off": int(np.abs(through.astype(int) - without).max())}


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]}


def measure(
    upscaler: Upscaler, plain: Plain | None, size: int, steps: int | None, args: argparse.Namespace
) -> dict[str, Any]:
    device, image = upscaler.networks.device, photograph(size // 4)
    settings = Settings(
        num_inference_steps=steps,
        seed=1,
        use_kds=args.particles > 1,
        num_particles=args.particles,
        latent_tiled_size=args.tile,
        latent_tiled_overlap=args.overlap,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, metrics = predict(upscaler, image, settings)
    runs, baseline = [], []
    for _ in range(args.repeats):
        if plain:
            baseline.append(plain(image, settings))
        runs.append(predict(upscaler, image, settings)[0])
    memory = hardware.peak_memory(device)
    job = Counted(upscaler.networks, settings, image, Progress())
    job.run()
    seconds, tflop = medians(runs), job.__dict__["tflop"]
    total = sum(seconds.values())
    row = {
        "size": size,
        "steps": metrics["steps"],
        "particles": args.particles,
        "tile": metrics["tile_size"],
        "overlap": args.overlap,
        "tiles": metrics["tiles"],
        "tile_batch": metrics["tile_batch"],
        "float32_retries": metrics["float32_retries"],
        "out_of_memory_retries": metrics["out_of_memory_retries"],
        "seconds": seconds,
        "seconds_total": round(total, 4),
        "seconds_per_megapixel": round(total / (size * size / 1e6), 4),
        "seconds_first": round(sum(first.values()), 4),
        "seconds_per_tile_step": round(seconds["denoise"] / (metrics["steps"] * args.particles * metrics["tiles"]), 5),
        "tflop": {name: round(value, 4) for name, value in tflop.items()},
        "peak_memory_mb": memory,
        "repeats": args.repeats,
    }
    if upscaler.graphs is not None:
        row["replayed"] = replayed(upscaler, image, settings)
    if plain:
        base = medians(baseline)
        row["baseline_seconds"] = base
        row["ratio"] = {name: round(base[name] / seconds[name], 3) for name in base if base[name] > 0.05}
        row["ratio_total"] = round(sum(base.values()) / sum(seconds[name] for name in base), 3)
    return row


def versions() -> dict[str, str]:
    names = ("torch",)
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"


def commit() -> str:
    """Of the working tree; SEESR_COMMIT where that has no git."""
    if shutil.which("git") is None or not (report.ROOT / ".git").exists():
        return os.environ.get("SEESR_COMMIT", "unknown")
    completed = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=report.ROOT, capture_output=True, text=True
    )
    return completed.stdout.strip() or "unknown"


def bench(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else precision.working_dtype(device)
    started = time.perf_counter()
    if args.bundle:
        networks = models.load(args.bundle, device, dtype)
    else:
        from lab import sizes

        networks = sizes.build(device, dtype)
    plain = Plain(copies(networks)) if args.baseline else None
    loaded = time.perf_counter()
    upscaler = Upscaler(networks, graphs=Graphs(CudaRecorder()) if args.graphs else None)
    upscaler.warm_up()
    ready = time.perf_counter()
    top = ceiling(device, dtype)
    common = {
        "command": report.command(),
        "commit": commit(),
        "device": processor() if device.type == "cpu" else hardware.name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weights": networks.bundle.name,
        "attention": upscaler.networks.attention,
        "cuda_graphs": upscaler.graphs is not None,
        "versions": versions(),
        "setup_seconds": {
            "import": round(IMPORTED - STARTED, 2),
            "load": round(loaded - started, 2),
            "warm_up": round(ready - loaded, 2),
        },
        "ceiling_tflops": round(top, 3),
    }
    for size in args.size:
        for steps in args.steps:
            row = common | measure(upscaler, plain, size, steps, args)
            work = sum(row["tflop"].values())
            row["fraction_of_ceiling"] = round(work / row["seconds_total"] / top, 3)
            print(json.dumps(row), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


COLUMNS = {
    "weights": "", "size": "", "steps": "", **dict.fromkeys(STAGES, ".3g"), "all, s": ".3g", "s/MP": ".3g",
    "first, s": ".3g", "TFLOP": ".3g", "of the ceiling": ".0%", "TFLOP/s": ".3g", "host GB": ".1f", "GPU GB": ".1f",
}  # fmt: skip


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a result file under the heads of the table."""
    memory = {f"{where} GB": megabytes / 1000 for where, megabytes in row["peak_memory_mb"].items()}
    return {
        **row,
        **row["seconds"],
        "steps": f"{row['steps']}" + (f", {row['particles']} particles" if row["particles"] > 1 else ""),
        "all, s": row["seconds_total"],
        "s/MP": row["seconds_per_megapixel"],
        "first, s": row["seconds_first"],
        "TFLOP": sum(row["tflop"].values()),
        "of the ceiling": row["fraction_of_ceiling"],
        "TFLOP/s": row["ceiling_tflops"],
        "host GB": memory["host GB"],
        "GPU GB": memory.get("device GB"),
    }


def table(folder: Path) -> str:
    """results/bench.md from the files in results/bench."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m lab.speed.bench --table` from the files in `bench`; nothing here is typed by hand.",
        "Seconds per stage are medians; `file` is the PNG. The ceiling is the device's own best matrix product in that",
        "dtype, and the fraction is all counted operations over all seconds. `made-up` weights have the public sizes,",
        "so they cost what the trained ones cost. A device that has no section here has not been measured.",
    ]
    rows = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["device"], row["dtype"]), []).append(row)
    for (device, dtype), measured in groups.items():
        lines += ["", f"## {device}, {dtype}", "", report.table(map(flat, measured), COLUMNS)]
        for row in measured:
            if "ratio" in row:
                each = ", ".join(f"{name} {value:.2f}" for name, value in row["ratio"].items())
                base = sum(row["baseline_seconds"].values())
                lines += [
                    "",
                    f"Against plain diffusers modules in the same run, {row['size']} px, {row['steps']} steps:"
                    f" **{row['ratio_total']:.2f} times as fast** ({base:.3g} s there; {each}).",
                ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="default: the full sizes with generated weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else float16")
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="side of the output, pixels")
    parser.add_argument("--steps", type=int, nargs="+", default=[None], help="default: the bundle's default")
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--tile", type=int, help="side of a tile, latent pixels; default: the bundle's default")
    parser.add_argument("--overlap", type=int, default=Settings.latent_tiled_overlap)
    parser.add_argument("--graphs", action="store_true", help="replay the networks as CUDA graphs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--baseline", action="store_true", help="also run plain diffusers modules; one tile only")
    parser.add_argument("--json", type=Path, help="append one line per configuration")
    parser.add_argument("--table", action="store_true", help="only rewrite results/bench.md")
    args = parser.parse_args()
    if args.table:
        (report.RESULTS / "bench.md").write_text(table(report.RESULTS / "bench"))
    else:
        bench(args)


if __name__ == "__main__":
    main()
