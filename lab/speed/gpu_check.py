"""Runs every check that needs a GPU, in one process and without a network: correctness, then speed.

    python -m lab.speed.gpu_check OUT               on a GPU, in six minutes
    python -m lab.speed.gpu_check OUT --rehearse    the same parts with small sizes on a CPU

The networks have the full sizes and made-up weights, and are built once. After every part OUT/evidence.json is written
anew; it has the seconds at which each part began and ended, and the error of a part that failed or took too long.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.perf_counter()
if "--rehearse" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from lab import report, sizes  # noqa: E402
from lab.parity import cases  # noqa: E402
from lab.speed import bench, profile  # noqa: E402
from lab.speed.kernels import distance  # noqa: E402
from seesr import Progress, Settings, Upscaler  # noqa: E402
from seesr.networks import fused, hardware, models, weights  # noqa: E402
from seesr.networks.graphs import CudaRecorder, Graphs, Recorder, same_bits  # noqa: E402
from seesr.runtime.memory import Budget  # noqa: E402
from seesr.vae import autoencoder  # noqa: E402

KINDS = ("group_norm", "geglu", "layer_norm")
LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}


class Plan(NamedTuple):
    """Sizes of one run.

    Attributes:
        side, large: sides of the tiles of the denoiser, latent pixels.
        batches: tiles of a pass.
        outputs: sides of whole images, pixels; `largest` is made once, and again with `memory` bytes.
        product, copied: sides of the matrices that are multiplied and bytes that are copied, for the ceilings.
        seconds: limit of all parts together.
    """

    side: int
    large: int
    batches: tuple[int, ...]
    outputs: tuple[int, ...]
    largest: int
    memory: int
    product: int
    copied: int
    times: int
    seconds: int


FULL = Plan(64, 72, (1, 4, 5, 8), (512, 1024, 2048), 4096, 16 * 10**9, 8192, 2**32, 20, 360)
SMALL = Plan(16, 20, (1, 4), (64, 128), 128, 0, 256, 2**20, 1, 310)


class OutOfTime(Exception):
    """A part took longer than its share."""


class Check:
    """The evidence so far, and the networks.

    Args:
        out: folder of evidence.json.
    """

    def __init__(self, out: Path, rehearse: bool) -> None:
        self.out, self.plan = out, SMALL if rehearse else FULL
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.dtype = torch.float32 if rehearse else torch.float16
        self.evidence: dict[str, Any] = {"command": report.command(), "commit": bench.commit(), "parts": {}}
        self.images: dict[str, np.ndarray] = {}

    def part(self, limit: float, work: Callable[[], Any]) -> None:
        """Runs one part for at most `limit` seconds, or what is left, and keeps what it returns or how it failed."""
        name = getattr(work, "__name__", "part")
        began = time.perf_counter() - STARTED
        seconds = min(limit if self.device.type == "cuda" else 2 * limit, self.plan.seconds - began)
        self.rows: list[dict[str, Any]] = []
        row: dict[str, Any] = {"began": round(began, 1)}
        if seconds < 2:
            row["error"] = "no time was left"
        else:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                work()
            except (Exception, OutOfTime) as error:
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
                row["where"] = traceback.format_exc().splitlines()[-12:]
                print(traceback.format_exc(), flush=True)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        row |= {"ended": round(time.perf_counter() - STARTED, 1), "rows": self.rows}
        self.evidence["parts"][name] = row
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "evidence.json").write_text(json.dumps(self.evidence, indent=1) + "\n")
        print(f"== {name}: {row['began']} to {row['ended']} s {row.get('error', '')}", flush=True)
        self.tidy()

    def keep(self, **row: Any) -> None:
        """One row of the part that runs; it stays if the part fails later."""
        self.rows.append({k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()})
        print(self.rows[-1], flush=True)

    def tidy(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def milliseconds(self, work: Callable[[], object], times: int | None = None) -> float:
        """The median on the device, after two runs to warm up."""
        results = []
        for n in range(2 + (times or self.plan.times)):
            if self.device.type == "cuda":
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                work()
                last.record()
                last.synchronize()
                results.append(first.elapsed_time(last))
            else:
                started = time.perf_counter()
                work()
                results.append(1000 * (time.perf_counter() - started))
            if n < 2:
                results.clear()
        return statistics.median(results)

    def probe(self) -> None:
        """Versions, clocks, ceilings, empty launches."""
        names = ("torch", "numpy", "triton")
        self.keep(python=platform.python_version(), **{name: importlib.metadata.version(name) for name in names})
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(0)
            self.keep(
                card=properties.name, capability=[properties.major, properties.minor], memory=properties.total_memory,
                multiprocessors=properties.multi_processor_count, cuda=torch.version.cuda,
                cudnn=torch.backends.cudnn.version(),
            )  # fmt: skip
            fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
            query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
            self.keep(clocks=subprocess.run(query, capture_output=True, text=True, timeout=10).stdout)
        options = {"device": self.device, "dtype": self.dtype}
        a, b = (torch.randn(self.plan.product, self.plan.product, **options) for _ in range(2))
        self.keep(ceiling="product", tflops=2 * self.plan.product**3 / self.milliseconds(lambda: a @ b) / 1e9)
        source = torch.randint(0, 255, (self.plan.copied // 2,), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        self.keep(ceiling="copy", gb_per_second=2 * len(source) / self.milliseconds(lambda: target.copy_(source)) / 1e6)
        one = torch.ones(1, device=self.device)
        for _ in range(2):
            self.wait()
            started = time.perf_counter()
            for _ in range(1000):
                one.add_(1)
            host = time.perf_counter() - started
            self.wait()
        self.keep(launches=1000, host_us=1000 * host, all_us=1000 * (time.perf_counter() - started))

    @torch.no_grad()
    def kernels(self) -> None:
        """Every fused kernel beside what torch does, at the shapes of the networks."""
        cuda = self.device.type == "cuda"
        shapes = [(1, 320, 64), (8, 320, 64), (4, 320, 72), (8, 640, 32), (8, 1280, 16), (8, 960, 64), (1, 128, 512)]
        for count, channels, side in shapes if cuda else [(2, 64, 8)]:
            x = torch.randn(count, channels, side, side, device=self.device, dtype=self.dtype) * 2 + 1
            last = x.contiguous(memory_format=torch.channels_last)
            norm = torch.nn.GroupNorm(32, channels).to(self.device, self.dtype)
            torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
            parameters = norm.weight.double(), norm.bias.double()
            exact = F.silu(F.group_norm(x.double(), 32, *parameters, norm.eps))
            methods = {
                "torch, channels first": lambda x=x, norm=norm: F.silu(norm(x)),
                "torch, channels last": lambda x=last, norm=norm: F.silu(norm(x)),
                "fused, channels last": lambda x=last, norm=norm: fused.group_norm(
                    x, 32, norm.weight, norm.bias, norm.eps, True
                ),
            }
            moved = 2 * x.nbytes
            self.compare(f"GroupNorm and SiLU, {count} x {channels} x {side} x {side}", methods, exact, moved)
        for count, width in ((4096, 1280), (8 * 4096, 1280), (8 * 1024, 2560)) if cuda else ((32, 40),):
            x = torch.randn(count, 2 * width, device=self.device, dtype=self.dtype)
            values, gate = x.double().chunk(2, -1)
            exact = values * F.gelu(gate)
            methods = {
                "torch": lambda x=x: x.chunk(2, -1)[0] * F.gelu(x.chunk(2, -1)[1]),
                "fused": lambda x=x: fused.geglu(x),
            }
            self.compare(f"GEGLU, {count} x {width}", methods, exact, x.nbytes * 3 // 2)
        for count, width in ((4096, 320), (8 * 4096, 320), (8 * 1024, 640), (8 * 256, 1280)) if cuda else ((32, 40),):
            x = torch.randn(count, width, device=self.device, dtype=self.dtype) + 1
            weight, bias = torch.randn(2, width, device=self.device, dtype=self.dtype)
            exact = F.layer_norm(x.double(), (width,), weight.double(), bias.double())
            methods = {
                "torch": lambda x=x, w=weight, b=bias: F.layer_norm(x, (len(w),), w, b),
                "fused": lambda x=x, w=weight, b=bias: fused.layer_norm(x, w, b, 1e-5),
            }
            self.compare(f"LayerNorm, {count} x {width}", methods, exact, 2 * x.nbytes)

    def compare(self, layer: str, methods: dict[str, Callable[[], Tensor]], exact: Tensor, moved: int) -> None:
        """One row a method: milliseconds of one launch, alone and in a replayed graph; distance to float64."""
        for method, work in methods.items():
            result = work()
            again = work()
            row = {
                "layer": layer,
                "method": method,
                "distance": distance(result, exact),
                "same": same_bits(result, again),
            }
            row["ms"] = self.milliseconds(work)
            if self.device.type == "cuda":
                ten = lambda work=work: [work() for _ in range(10)][-1]  # noqa: E731
                replay, _ = CudaRecorder()(ten)
                row["ms_in_a_graph"] = self.milliseconds(replay) / 10
                row["gb_per_second"] = moved / row["ms_in_a_graph"] / 1e6
            self.keep(**row)

    def build(self) -> None:
        """The networks, and a second set of the same weights for the plain pipeline."""
        started = time.perf_counter()
        if self.device.type == "cuda":
            self.networks = sizes.build(self.device, self.dtype)
        else:
            self.networks = models.load(weights.POCKET, self.device, self.dtype)
        self.plain = bench.Plain(bench.copies(self.networks))
        self.wait()
        self.keep(seconds=time.perf_counter() - started)

    def goldens(self) -> None:
        """Distances to the recorded cases of the reference."""
        torch.backends.cudnn.allow_tf32 = False
        for folder in sorted((report.ROOT / "tests/data/golden").iterdir()):
            if not (folder / "case.json").exists() or "full" in folder.name:
                continue
            for dtype in {torch.float32, self.dtype}:
                rows = cases.run(cases.read_case(folder, None, str(self.device), dtype))
                far = max((row.get("distance") or 0 for row in rows), default=0)
                good = sum(row["good"] for row in rows)
                self.keep(case=folder.name, dtype=str(dtype), outputs=len(rows), good=good, largest_distance=far)

    def recorder(self) -> Recorder:
        return CudaRecorder() if self.device.type == "cuda" else rerun

    def arrange(self, layout: str, kinds: tuple[str, ...] = ()) -> None:
        """UNet and ControlNet in this layout, with these fused kernels; a kernel is not taken out again."""
        for network in (self.networks.unet, self.networks.controlnet):
            network.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]
            if self.device.type == "cuda":  # interpreted, a pass takes minutes
                fused.fuse(network, frozenset(kinds))

    @torch.no_grad()
    def steps(self) -> None:
        """One pass of the denoiser: layouts, kernels, tile sides, batches; eager and as a graph."""
        plan = self.plan
        few = [(plan.side, plan.batches[0]), (plan.side, plan.batches[-1]), (plan.large, plan.batches[1])]
        every = [(side, batch) for side in (plan.side, plan.large) for batch in plan.batches]
        exact: dict[tuple[int, int], Tensor] = {}
        settings = [("first", (), few), ("last", (), few), ("last", KINDS[:1], few), ("last", KINDS[:2], few)]
        for layout, kinds, shapes in [*settings, ("last", KINDS, every)]:
            self.arrange(layout, kinds)
            for side, batch in shapes:
                graphs = Graphs(self.recorder())
                step = seeded(lambda s=side, b=batch: profile.build_step(self.networks, b, s))
                row: dict[str, Any] = {"layout": layout, "fused": list(kinds), "side": side, "batch": batch}
                eager = step()
                row["distance_to_the_first"] = distance(eager, exact.setdefault((side, batch), eager))
                row["eager_ms"] = self.milliseconds(step, 5)
                replayed = seeded(lambda s=side, b=batch, g=graphs: profile.build_step(self.networks, b, s, g))
                started = time.perf_counter()
                with graphs.setup():
                    replayed()
                row |= {"record_seconds": time.perf_counter() - started, "graphs": graphs.state}
                row["same"] = same_bits(eager, replayed())
                row["graph_ms"] = self.milliseconds(replayed)
                self.keep(**row)
                graphs.turn_off("the next one comes")
                self.tidy()

    def upscaler(self) -> None:
        """Setup as the product does it, graphs of all networks among it."""
        started = time.perf_counter()
        graphs = Graphs(self.recorder())
        self.ours = Upscaler(self.networks, graphs=graphs)
        self.ours.warm_up()
        self.wait()
        self.keep(
            seconds=time.perf_counter() - started, graphs=graphs.state, recordings=len(graphs.recordings),
            pool_bytes=graphs.held, memory=hardware.about(self.device),
        )  # fmt: skip

    @contextlib.contextmanager
    def eager(self, off: bool) -> Iterator[None]:
        """Without graphs inside, if `off`."""
        graphs = self.ours.graphs
        assert graphs is not None
        recordings = graphs.recordings
        graphs.recordings = {} if off else recordings
        yield
        graphs.recordings = recordings

    def pictures(self) -> None:
        """Whole images: graphs on and off, both tile sides."""
        for output in self.plan.outputs:
            image = bench.photograph(output // 4)
            for side in (self.plan.side, self.plan.large):
                settings = Settings(num_inference_steps=2, seed=1, latent_tiled_size=side)
                results = []
                for off in (False, True):
                    with self.eager(off):
                        runs = []
                        for _ in range(4 if output < 2000 else 3):
                            started = time.perf_counter()
                            result = self.ours(image, settings)
                            runs.append((time.perf_counter() - started, result.metrics["seconds"]))
                        results.append(result.image_data.rgb)
                    seconds = [wall for wall, _ in runs[1:]]
                    self.keep(
                        output=output, side=side, graphs=not off, seconds=statistics.median(seconds),
                        least=min(seconds), first=runs[0][0], stages=runs[-1][1], tiles=result.metrics["tiles"],
                        batch=result.metrics["tile_batch"],
                    )  # fmt: skip
                off_by = int(np.abs(results[0].astype(int) - results[1]).max())
                self.keep(output=output, side=side, levels_between_graphs_and_eager=off_by)

    @torch.no_grad()
    def strips(self) -> None:
        """The decoder over a large image by row strips: torch's norms, and the fused kernel."""
        side = self.plan.outputs[-1] // self.networks.factor
        z = torch.randn(1, self.networks.unet.config["in_channels"], side, side, device=self.device)
        plain = None
        for kinds in (frozenset(), frozenset({"strips"})):
            saved = dict(hardware.FUSED)
            hardware.FUSED[torch.cuda.get_device_capability() if self.device.type == "cuda" else (0, 0)] = kinds
            hardware.strips_kernel.cache_clear()
            decode = lambda: autoencoder.decode(  # noqa: E731
                self.networks.vae, z, self.networks.factor, Budget(whole=2**34), Progress()
            )
            decoded = decode()
            plain = decoded if plain is None else plain
            self.keep(fused=sorted(kinds), ms=self.milliseconds(decode, 5), distance_to_torch=distance(decoded, plain))
            hardware.FUSED.clear()
            hardware.FUSED.update(saved)
        hardware.strips_kernel.cache_clear()

    def profiled(self) -> None:
        """Kernels of the largest of these images, with graphs."""
        image = bench.photograph(self.plan.outputs[-1] // 4)
        settings = Settings(num_inference_steps=2, seed=1, latent_tiled_size=self.plan.large)
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as profiled:
            started = time.perf_counter()
            self.ours(image, settings)
            wall = time.perf_counter() - started
        on_gpu = self.device.type == "cuda"
        rows = []
        for event in profiled.key_averages():
            if on_gpu == (event.device_type == torch.autograd.DeviceType.CUDA):
                micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                rows.append({"name": event.key[:100], "calls": event.count, "seconds": micro / 1e6})
        rows.sort(key=lambda row: -row["seconds"])
        self.keep(wall=wall, busy=sum(row["seconds"] for row in rows), calls=sum(row["calls"] for row in rows))
        for row in rows[:30]:
            self.keep(**row)

    def peers(self) -> None:
        """The plain pipeline, one image of one tile: as it is, channels last, and with compiled blocks."""
        output = self.plan.outputs[0]
        image, settings = bench.photograph(output // 4), Settings(num_inference_steps=2, seed=1)
        networks = self.plain.networks
        for name in ("plain", "channels last", "compiled blocks"):
            if name == "channels last":
                for network in (networks.unet, networks.controlnet, networks.vae):
                    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            if name == "compiled blocks":
                for network in (networks.unet, networks.controlnet):
                    compiled(network, "reduce-overhead" if self.device.type == "cuda" else "default")
            started = time.perf_counter()
            self.plain(image, settings)
            first = time.perf_counter() - started
            runs = [self.plain(image, settings) for _ in range(4)]
            self.keep(peer=name, output=output, first=first, stages=bench.medians(runs),
                      seconds=statistics.median(sum(run.values()) for run in runs))  # fmt: skip

    def largest(self) -> None:
        """The largest image, once after one to warm up."""
        image = bench.photograph(self.plan.largest // 4)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            started = time.perf_counter()
            result = self.ours(image, Settings(num_inference_steps=2, seed=1, latent_tiled_size=self.plan.side))
            seconds = time.perf_counter() - started
        self.images["largest"] = result.image_data.rgb
        self.keep(output=self.plan.largest, seconds=seconds, metrics=result.metrics)

    def ladder(self) -> None:
        """The largest image with little memory: the same pixels, by another way."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(self.plan.memory / total)
        image = bench.photograph(self.plan.largest // 4)
        started = time.perf_counter()
        result = self.ours(image, Settings(num_inference_steps=2, seed=1, latent_tiled_size=self.plan.side))
        seconds = time.perf_counter() - started
        apart = np.abs(self.images["largest"].astype(int) - result.image_data.rgb) if "largest" in self.images else None
        self.keep(output=self.plan.largest, seconds=seconds, metrics=result.metrics,
                  levels_apart=None if apart is None else int(apart.max()),
                  share_apart=None if apart is None else float((apart > 0).mean()))  # fmt: skip


def rerun(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for CUDA's recorder where there is none: replaying reads and writes the same memory."""
    result = work()

    def replay() -> None:
        result.copy_(work())

    return replay, result


def seeded(build: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return build()


def compiled(network: Any, mode: str) -> None:
    """Compiles every transformer block, each of which has one code for all."""
    for module in network.modules():
        if type(module).__name__ == "TransformerBlock":
            module.compile(mode=mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()

    def late(*unused: object) -> None:
        raise OutOfTime("the part took too long")

    signal.signal(signal.SIGALRM, late)
    check = Check(args.out, args.rehearse)
    faulthandler.dump_traceback_later(check.plan.seconds + 20, exit=True)  # a call that does not return to Python
    check.keep_import = round(time.perf_counter() - STARTED, 1)  # pyright: ignore[reportAttributeAccessIssue]
    check.evidence["import_seconds"] = check.keep_import  # pyright: ignore[reportAttributeAccessIssue]
    check.part(20, check.probe)
    check.part(25, check.kernels)
    check.part(20, check.build)
    check.part(90, check.steps)
    check.part(40, check.upscaler)
    check.part(70, check.pictures)
    check.part(20, check.strips)
    check.part(20, check.profiled)
    check.part(50, check.goldens)
    check.part(30, check.largest)
    check.part(40, check.ladder)
    check.part(60, check.peers)
    failed = [name for name, row in check.evidence["parts"].items() if "error" in row]
    print(f"failed: {', '.join(failed) or 'nothing'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
