"""Counts the cost of an image on the full-size networks without a GPU: operations, bytes, launches, waits, memory.

    python -m lab.speed.count --size 2048 --free-gb 75 --json FILE
    python -m lab.speed.count --table          results/counts.md, with seconds computed for the cards of CARDS

The real pipeline runs on fake CUDA tensors, which have shapes but no values (counter.py). No time is measured.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lab import report, sizes
from lab.speed.counter import Counter, Stage
from seesr import Progress, Settings
from seesr.images.image_data import ImageData
from seesr.networks import models, weights
from seesr.networks.attention import set_kernel
from seesr.networks.tagger import Tagger
from seesr.pipeline.denoiser import Ahead, Denoiser
from seesr.pipeline.pipeline import UpscaleRun
from seesr.runtime.memory import Budget

CUDA = torch.device("cuda", 0)


def empty(mode: FakeTensorMode, build: Any, seed: int, device: torch.device, dtype: torch.dtype) -> Any:
    """A network whose weights are never looked at; convolutions channels last, as on most GPUs."""
    with torch.device("meta"):
        network: torch.nn.Module = build()
    state = {}
    with mode:
        for key, value in network.state_dict().items():
            layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
            state[key] = torch.empty(value.shape, device=device, dtype=dtype).to(memory_format=layout)
        return models.fill(network, state, Path("no weights"))


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


class Counted(UpscaleRun):
    """One image on its way through fake networks."""

    counter: Counter

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        self.counter.begin(stage)
        yield
        self.counter.stage.synchronisations += 1

    def metrics(self, *result: Any) -> dict[str, Any]:
        return {}


class Repeated:
    """The denoiser's passes: what the second of a shape costs is noted for all later ones, which are not run."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.times: collections.Counter[torch.Size] = collections.Counter()
        self.cost: dict[torch.Size, Stage] = {}

    def predict(self, denoiser: Denoiser, z: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        stage = self.counter.stage
        self.times[z.shape] += 1
        if self.times[z.shape] > 2:
            stage.add(self.cost[z.shape])
            return torch.empty_like(z)
        before = copy.deepcopy(stage)
        result = PREDICT(denoiser, z, t, conditioning)
        self.cost[z.shape] = stage.less(before)
        return result


PREDICT = Denoiser.predict


def count(size: int, free: int, settings: Settings) -> dict[str, Stage]:
    """The stages of an image of `size` x `size` pixels on a GPU with `free` bytes beside the weights."""
    image = ImageData(np.zeros((round(size / settings.scale_factor),) * 2 + (3,), np.uint8))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    networks = sizes.build(CUDA, torch.float16, functools.partial(empty, mode))
    parts = (networks.unet, networks.controlnet, networks.vae, networks.text_encoder, networks.tagger)
    for network in parts[:2]:
        set_kernel(network, flash)
    budget = Budget.within(free, CUDA, max(weights.DEFAULTS["full"].latent_tiled_size) ** 2)
    counter = Counter(x for part in parts for x in part.parameters())
    repeated = Repeated(counter)
    with (
        mock.patch.object(Budget, "for_device", lambda *_, **__: budget),
        mock.patch.object(Ahead, "launched", lambda *_: None),  # no event can be waited for
        mock.patch.object(Denoiser, "predict", lambda *args: repeated.predict(*args)),
        mock.patch.object(Tagger, "names", lambda self, logits: logits.cpu().tolist()[:0]),
    ):
        job = Counted(networks, settings, image, Progress())
        job.counter = counter
        with mode, counter:
            job.run()
    return {name: stage for name, stage in counter.stages.items() if stage.launches}


class Card(NamedTuple):
    """Memory in GB, TFLOP/s of matrix products in half precision, TB/s of its memory: the maker's figures."""

    name: str
    memory_gb: int
    peak: float
    bandwidth: float


CARDS = (
    Card("RTX 3060", 12, 25, 0.36),
    Card("T4", 16, 65, 0.32),
    Card("V100", 16, 125, 0.90),
    Card("RTX 4080", 16, 97, 0.72),
    Card("A10G", 24, 70, 0.60),
    Card("RTX 3090", 24, 71, 0.94),
    Card("RTX 4090", 24, 165, 1.01),
    Card("A40", 48, 150, 0.70),
    Card("L40S", 48, 362, 0.86),
    Card("A100", 80, 312, 2.04),
    Card("H100", 80, 989, 3.35),
    Card("H200", 141, 989, 4.80),
)
ON_CARDS = (512, 2048, 4096)  # sides of the images whose seconds are computed
COUNTS = [(512, 75), (1024, 75), (2048, 75), (4096, 75), (4096, 11), (8192, 75), (8192, 43)]  # side, free GB
OWN_GB = 5  # weights and the CUDA context
REACHED = {"convolution": 0.5, "product": 0.6, "attention": 0.35, "other": 1.0}  # shares of the peak
COPIED = 0.85  # share of the bandwidth
LAUNCH = 6e-6  # seconds of the host


def floor(stages: dict[str, Stage], card: Card) -> float:
    """Seconds below which no software can be on this card: the operations at its peak."""
    return sum(stage.flop() for stage in stages.values()) / (card.peak * 1e12)


def expected(stages: dict[str, Stage], card: Card) -> float:
    """Seconds of the device by a simple model: each operation takes what its products or its bytes take, whichever is
    more, at REACHED and COPIED of what the maker states; and a stage at least what its launches take the host.
    """
    total = 0.0
    for stage in stages.values():
        device = 0.0
        for work, times in stage.work.items():
            computing = work.flop / (REACHED[work.kind] * card.peak * 1e12)
            device += times * max(computing, work.moved / (COPIED * card.bandwidth * 1e12))
        total += max(device, stage.launches * LAUNCH)
    return total


def row(size: int, free_gb: float, steps: int, stages: dict[str, Stage]) -> dict[str, Any]:
    return {
        "size": size,
        "free_gb": free_gb,
        "steps": steps,
        "launches": sum(stage.launches for stage in stages.values()),
        "synchronisations": sum(stage.synchronisations for stage in stages.values()),
        "bus_bytes_per_pixel": round(sum(stage.bus_bytes for stage in stages.values()) / size**2, 2),
        "tflop": round(sum(stage.flop() for stage in stages.values()) / 1e12, 2),
        "moved_gb": round(sum(stage.moved for stage in stages.values()) / 1e9, 1),
        "peak_gb": max(stage.peak for stage in stages.values()) / 1e9,
        "stages": {name: stage.row() for name, stage in stages.items()},
    }


DECODED = {"size": "", "free_gb": "g", "conv_tflop": ",.1f", "attention_tflop": ",.1f", "moved_gb": ",.0f"}
DECODED |= {"peak_gb": ".1f", "launches": ","}
COUNTED = {"size": "", "free_gb": "g", "tflop": ",.1f", "moved_gb": ",.0f", "peak_gb": ".1f", "launches": ","}
COUNTED |= {"synchronisations": "", "bus_bytes_per_pixel": ".1f"}
TEMPLATE = """# What an image costs, counted

Made by `python -m lab.speed.count --table` on the full-size networks, in half precision, two steps, without a GPU and
without measuring any time. `free_gb` is what a card has beside the weights; `peak_gb` is what activations hold at most.

{counted}

The decoder alone:

{decoders}

## Seconds of the device, computed

Floor / expectation, from the makers' figures; **computed, not measured**. Of the peak the expectation takes {reached},
of the bandwidth {copied:.0%}, and {launch:.0f} microseconds a launch. Files and the host's other work are not in it.

{cards}
"""


def tables(rows: list[dict[str, Any]], cards: list[dict[str, Any]]) -> str:
    """Markdown: what was counted, the decoder's part, and the seconds computed for every card."""
    sides = [name for name in cards[0] if name.endswith("px")]
    return TEMPLATE.format(
        counted=report.table(rows, COUNTED),
        decoders=report.table([result | result["stages"]["decode"] for result in rows], DECODED),
        reached=", ".join(f"{share:.0%} ({kind})" for kind, share in REACHED.items() if kind != "other"),
        copied=COPIED,
        launch=LAUNCH * 1e6,
        cards=report.table(cards, {"card": "", "memory_gb": "", **dict.fromkeys(sides, "")}),
    )


def rounded(seconds: float) -> str:
    return f"{float(f'{seconds:.2g}'):g}"


def on_cards(settings: Settings) -> list[dict[str, Any]]:
    """Floor and expectation of every card for every size of ON_CARDS, by the way that its memory allows."""
    results: dict[tuple[int, int], dict[str, Stage]] = {}
    rows = []
    for card in CARDS:
        cells = {}
        for size in ON_CARDS:
            key = (size, card.memory_gb)
            if key not in results:
                results[key] = count(size, (card.memory_gb - OWN_GB) * 10**9, settings)
            cells[f"{size} px"] = f"{rounded(floor(results[key], card))} / {rounded(expected(results[key], card))}"
        rows.append({"card": card.name, "memory_gb": card.memory_gb, **cells})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[512], help="side of the output, pixels")
    parser.add_argument("--free-gb", type=float, nargs="+", default=[75], help="GPU memory beside the weights")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--json", type=Path, help="one image: its object; several: all of them, as rows")
    parser.add_argument("--table", action="store_true", help="COUNTS and CARDS: results/counts.json, counts.md")
    args = parser.parse_args()
    settings = Settings(num_inference_steps=args.steps)
    requested = COUNTS if args.table else [(size, free) for size in args.size for free in args.free_gb]
    rows = [row(size, free, args.steps, count(size, int(free * 1e9), settings)) for size, free in requested]
    if args.json and len(rows) == 1:
        args.json.write_text(json.dumps(rows[0], indent=1) + "\n")
    elif args.json:
        report.write(args.json, rows)
    print(report.table(rows, COUNTED))
    if args.table:
        cards = on_cards(settings)
        report.write(report.RESULTS / "counts.json", rows, cards=cards)
        (report.RESULTS / "counts.md").write_text(tables(rows, cards))


if __name__ == "__main__":
    main()
