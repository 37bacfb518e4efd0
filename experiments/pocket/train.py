"""Trains weights/pocket, the small bundle in the repository, of the same network classes as the full one.

    python -m experiments.pocket.train                 all stages
    python -m experiments.pocket.train --stage tagger  one stage, from the checkpoints of those before it
    python -m experiments.pocket.train --further       the tagger and the denoiser of weights/pocket, trained further

Stages: autoencoder, tagger, words, denoiser, export; an interrupted denoiser goes on where it was. Checkpoints and
curves go to build/pocket. On a CPU, `GOMP_SPINCOUNT=20000` is half again as fast as waiting asleep.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.pocket.curve import plot
from experiments.pocket.denoiser import BATCH, denoiser, further
from experiments.pocket.sizes import CONTROLNET, LABELS, SCHEDULER, TAGGER, TEXT, UNET, VAE, WORK
from experiments.pocket.stages import autoencoder, build_tokenizer, tagger, text_encoder
from lab import report
from seesr.networks import models, weights

CURVES = report.RESULTS / "pocket-curves"
log = logging.getLogger("experiments.pocket")


def unpack(device: torch.device, steps: int) -> None:
    """weights/pocket -> the checkpoints it was made from, in its half precision: the reverse of `export`."""
    bundle, net = weights.POCKET, {}
    for prefix, folder in {"unet.": "unet", "controlnet.": "controlnet", "vae.": "vae"}.items():
        net |= {prefix + k: v.float() for k, v in load_file(bundle / folder / models.DIFFUSION_FILE).items()}
    net |= {
        "text." + k.removeprefix("text_model."): v.float()
        for k, v in load_file(bundle / "text_encoder/model.safetensors").items()
    }
    scaling = json.loads((bundle / "vae/config.json").read_text())["scaling_factor"]
    torch.save({"net": net, "scaling": scaling}, WORK / "denoiser.pt")
    tags = load_file(bundle / "tagger/model.safetensors")
    torch.save({k: v.float() if v.is_floating_point() else v for k, v in tags.items()}, WORK / "tagger.pt")
    for curve in CURVES.glob("*.jsonl"):
        (WORK / curve.name).write_bytes(curve.read_bytes())


def export(device: torch.device, steps: int) -> None:
    """Checkpoints -> weights/pocket: configs, half-precision safetensors, checksums."""
    bundle = weights.POCKET
    saved = torch.load(WORK / "denoiser.pt", map_location="cpu", weights_only=True)
    build_tokenizer()

    def part(folder: str, config: dict, state: dict[str, Tensor], file: str = models.DIFFUSION_FILE) -> None:
        (bundle / folder).mkdir(parents=True, exist_ok=True)
        (bundle / folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({k: v.half().contiguous() for k, v in state.items()}, bundle / folder / file)

    def of(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in saved["net"].items() if k.startswith(prefix)}

    part("unet", {"_class_name": "UNet2DConditionModel", **UNET}, of("unet."))
    part("controlnet", {"_class_name": "ControlNetModel", **CONTROLNET}, of("controlnet."))
    part("vae", {"_class_name": "AutoencoderTiny", **VAE, "scaling_factor": saved["scaling"]}, of("vae."))
    encoder = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in of("text.").items()}
    part("text_encoder", {"architectures": ["CLIPTextModel"], **TEXT}, encoder, "model.safetensors")
    part("tagger", TAGGER, torch.load(WORK / "tagger.pt", map_location="cpu", weights_only=True), "model.safetensors")
    (bundle / "tagger/tags.json").write_text(json.dumps(LABELS) + "\n")
    (bundle / "scheduler").mkdir(exist_ok=True)
    (bundle / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=1) + "\n")
    (bundle / "tokenizer").mkdir(exist_ok=True)
    for file in (WORK / "tokenizer").iterdir():
        (bundle / "tokenizer" / file.name).write_bytes(file.read_bytes())
    weights.write_manifest(bundle, "pocket", "pocket", "Apache-2.0")
    plot(report.RESULTS / "pocket-curve.png")
    CURVES.mkdir(exist_ok=True)
    for curve in WORK.glob("*.jsonl"):
        (CURVES / curve.name).write_bytes(curve.read_bytes())
    log.info("%s: %.1f MB", bundle, sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / 1e6)


STAGES = {
    "autoencoder": (autoencoder, 6000),
    "tagger": (tagger, 4000),
    "words": (text_encoder, 600),
    "denoiser": (denoiser, 20000),
    "export": (export, 0),
}
FURTHER = {
    "unpack": (unpack, 0),
    "tagger": (functools.partial(tagger, further=True), 1200),
    "further": (further, 10000),
    "export": (export, 0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices={**STAGES, **FURTHER}, action="append", help="run only this stage")
    parser.add_argument("--further", action="store_true", help="continue from weights/pocket instead of starting anew")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: those of the stage)")
    parser.add_argument("--batch", type=int, help="crops in a step of the denoiser")
    parser.add_argument("--seconds", type=float, help="seconds of training of the denoiser, instead of --steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    WORK.mkdir(parents=True, exist_ok=True)
    stages = FURTHER if args.further else STAGES
    for name in args.stage or stages:
        stage, steps = stages[name]
        more = {"batch": args.batch or BATCH, "seconds": args.seconds} if stage in (denoiser, further) else {}
        stage(torch.device(args.device), args.steps or steps, **more)


if __name__ == "__main__":
    main()
