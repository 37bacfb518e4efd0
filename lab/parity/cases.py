"""Runs our code on recorded cases of the SeeSR reference and compares every number.

    python -m lab.parity.cases tests/data/golden/* --json results/parity.json
    python -m lab.parity.cases tests/data/golden/* --device cuda --dtype float16     distances alone, no verdict

A case is a folder with case.json, inputs and outputs (safetensors); weights come from a small bundle in the reference's
key names or from a recipe (recipe.py). Folders without case.json are skipped. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab import report
from lab.parity import pipeline, reference
from lab.parity.case import Case, read_case
from seesr.checkpoints import convert
from seesr.images import color
from seesr.networks import models, tagger
from seesr.networks.schedule import NoiseSchedule
from seesr.pipeline import sampling

Produce = Callable[[str, dict[str, Any]], Any]  # (output name, its `call`) -> result


def networks_case(case: Case) -> Produce:
    """unet, controlnet, vae (the autoencoder's two halves, tiled or not, and its public methods)."""
    built: dict[str, Any] = {}
    i = case.inputs

    def get(name: str) -> Any:
        if name not in built:
            built[name] = getattr(case, name)()
        return built[name]

    def residuals(call: dict[str, Any]) -> tuple[list[Tensor], Tensor]:
        down, mid = get("controlnet")(
            i["sample"],
            call["timestep"],
            (i["encoder_hidden_states"], i["image_encoder_hidden_states"]),
            i["controlnet_cond"],
            call["conditioning_scale"],
        )
        if not call["guess_mode"]:
            return down, mid
        scales = torch.logspace(-1, 0, len(down) + 1)
        return [residual * scale for residual, scale in zip(down, scales[:-1], strict=True)], mid * scales[-1]

    def produce(name: str, call: dict[str, Any]) -> Tensor:
        network = call["network"]
        if network == "controlnet":
            down, mid = residuals(call)
            return mid if call["residual"] == "mid" else down[call["index"]]
        if network in ("unet", "merged"):
            down, mid = residuals(call["residuals"]) if call["residuals"] else (None, None)
            context = (i["encoder_hidden_states"], i["image_encoder_hidden_states"])
            unet = get("unet")
            return unet(i["sample"], call["timestep"], context, down, mid)
        vae, x = get("vae"), i[call["input"]]
        if network == "vae" and call["method"] == "encode":
            mean, log_variance = vae.quant_conv(vae.encoder(2 * x - 1)).chunk(2, dim=1)
            return torch.cat([mean, log_variance.clamp(-30, 20)], dim=1)
        if network == "vae":
            return vae.decoder(vae.post_quant_conv(x))
        if network == "encoder":
            return reference.tiled_encoder(vae.encoder, 2 * x - 1, call["tile"])
        return reference.tiled_decoder(vae.decoder, x, call["tile"])

    return produce


def merge_case(case: Case) -> Produce:
    merged = convert.merge_turbo(case.state("sd"), case.state("seesr"))
    unet = case.unet(merged)
    context = (case.inputs["encoder_hidden_states"], case.inputs["image_encoder_hidden_states"])
    return lambda name, call: unet(case.inputs["sample"], call["timestep"], context)


def tagger_case(case: Case) -> Produce:
    base, lora = case.state("base"), case.state("dape")
    for key, value in case.state("dape_unused").items():
        lora[key] = torch.zeros_like(value) if key.endswith("lora_B") else value
    built: dict[tuple[str, ...], tagger.Tagger] = {}

    def network(parts: tuple[str, ...]) -> tagger.Tagger:
        if parts not in built:
            merged = convert.merge_lora(base, lora, parts)
            tags = case.options.get("tags") or [str(n) for n in range(len(base["label_embed"]))]
            config = convert.tagger_config(base)
            config["image_size"] = case.options["image_size"]
            config["head"]["num_attention_heads"] = case.options["tagging_head"]["num_attention_heads"]
            with torch.device("meta"):
                net = tagger.Tagger(**config, tags=tags, thresholds=case.inputs["class_threshold"].tolist())
            built[parts] = case.place(models.fill(net, convert.tagger_keys(merged), case.folder))
        return built[parts]

    def produce(name: str, call: dict[str, Any]) -> Tensor:
        parts = tuple(p for p in call["lora"] if p in ("visual_encoder", "tagging_head"))
        net = network(parts)
        tokens = net.tokens(case.inputs["image"])
        if call["result"] == "tokens":
            return tokens
        logits = net.logits(tokens)
        if call["result"] == "logits":
            return logits
        on = set(net.names(logits))
        return torch.tensor([[float(tag in on) for tag in net.tags]])

    return produce


def scheduler_case(case: Case) -> Produce:
    scheduler, i = NoiseSchedule(case.options["config"]), case.inputs

    def produce(name: str, call: dict[str, Any] | None) -> Tensor:
        if call is None:
            return scheduler.alphas_cumprod
        if "add_noise_at" in call:
            a = scheduler.alphas_cumprod[call["add_noise_at"]]
            if call["add_noise_at"] == sampling.START:
                return sampling.start_latents(i["x"], i["noise"], scheduler)
            return a.sqrt() * i["x"] + (1 - a).sqrt() * i["noise"]
        step = next(s for s in sampling.schedule(scheduler, call["steps"]) if s.t == call["timestep"])
        x0 = sampling.predicted_x0(i["eps"], i["x"], step)
        return sampling.ddpm_step(i["x"], x0, step, i["noise"])

    return produce


def scheduler_tables(case: Case) -> list[tuple[str, Any, Any]]:
    """Timesteps of every step count, and the noise factors where our next timestep is the reference's."""
    scheduler, rows = NoiseSchedule(case.options["config"]), []
    for count, table in case.about["tables"].items():
        steps = sampling.schedule(scheduler, int(count))
        rows.append((f"timesteps_{count}", [s.t for s in steps], table["timesteps"]))
        if 1000 % int(count) == 0:
            one, zero = torch.ones(()), torch.zeros(())
            factors = [sampling.ddpm_step(zero, zero, s, one).item() for s in steps]
            close = np.allclose(factors, table["sqrt_variance"], rtol=1e-5, atol=0)
            rows.append((f"sqrt_variance_{count}", close, True))
    return rows


def color_case(case: Case) -> Produce:
    def produce(name: str, call: dict[str, Any]) -> Tensor:
        source, target = (
            case.inputs[f"{call['picture']}.{part}"].float().div(255).permute(2, 0, 1)[None]
            for part in ("source", "target")
        )
        strips = color.match_by_strips(
            lambda top, bottom: target[:, :, top:bottom], lambda top, bottom: source[:, :, top:bottom],
            target.shape[2], call["method"],
        )  # fmt: skip
        result = torch.cat([rows for _, rows in strips], dim=2)
        if call["form"] == "f32":
            return result
        return (result[0].clamp(0, 1) * 255).floor().byte().permute(1, 2, 0)  # the reference truncates

    return produce


def preproc_case(case: Case) -> Produce:
    def produce(name: str, call: dict[str, Any]) -> Tensor:
        image = case.inputs[call["picture"]].numpy()
        options = case.options["pictures"].get(call["picture"], {})
        if call["result"] == "model_input":
            return torch.from_numpy(np.array(reference.prepare(image, options["upscale"], options["process_size"])))
        if call["result"] == "tagger_input":
            size = case.options["tagger"]["size"][0]
            pixels = image_tensor(image)
            # `antialias` asks for the mistake that must not match: ours has no such switch, so ours is compared.
            return tagger.preprocess(pixels, size)
        raise ValueError(f"unknown result {call['result']}")

    return produce


def image_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image.astype(np.float32) / 255).permute(2, 0, 1)[None]


def preproc_tables(case: Case) -> list[tuple[str, Any, Any]]:
    rows = []
    for name, options in case.options["pictures"].items():
        image = Image.fromarray(case.inputs[name].numpy())
        prepared = reference.prepare(np.asarray(image), options["upscale"], options["process_size"])
        rows.append((f"{name}.model_size", list(prepared.size), options["model_size"]))
        ours = [side * options["upscale"] for side in image.size]
        rows.append((f"{name}.final_size", ours, options["final_size"]))
    return rows


def tiling_case(case: Case) -> Produce:
    return lambda name, call: reference.gaussian_window(call["latent_tile"], call["latent_tile"])


def tiling_tables(case: Case) -> list[tuple[str, Any, Any]]:
    rows = []
    for grid in case.about["tables"]["grids"]:
        height, width = grid["latent_height"], grid["latent_width"]
        tiles = reference.latent_tiles(height, width, grid["latent_tile"], grid["latent_overlap"])
        name = f"grid_{height}x{width}_{grid['latent_tile']}/{grid['latent_overlap']}"
        results = sorted({t.left for t in tiles}), sorted({t.top for t in tiles}), tiles[0].right - tiles[0].left
        rows.append((name, results, (grid["x_offsets"], grid["y_offsets"], grid["tile_used"])))
    return rows


def vae_tables(case: Case) -> list[tuple[str, Any, Any]]:
    rows = []
    for name, layout in case.about.get("layouts", {}).items():
        encoder = name.startswith("enc")
        size = case.inputs["image" if encoder else "z"].shape[2:]
        boxes = reference.vae_boxes(*size, layout["tile"], encoder)  # pyright: ignore[reportCallIssue]
        rows.append((f"{name} boxes", boxes, (layout["input_boxes"], layout["output_boxes"])))
    for grid in case.about.get("tables", {}).get("grids", []):
        encoder = grid["net"] == "encoder"
        boxes = reference.vae_boxes(grid["height"], grid["width"], grid["tile"], encoder)
        name = f"{grid['net']} boxes {grid['height']}x{grid['width']}"
        rows.append((name, boxes, (grid["input_boxes"], grid["output_boxes"])))
    return rows


KINDS: dict[str, Callable[[Case], Produce]] = {
    "unet": networks_case,
    "vae": networks_case,
    "unet_merge": merge_case,
    "tagger": tagger_case,
    "scheduler": scheduler_case,
    "colorfix": color_case,
    "preproc": preproc_case,
    "tiling": tiling_case,
    "pipeline": pipeline.pipeline_case,
}
TABLES = {"scheduler": scheduler_tables, "preproc": preproc_tables, "tiling": tiling_tables, "vae": vae_tables}


def expectations(case: Case, produce: Produce) -> list[tuple[str, Any, Any]]:
    """Expected values that are no tensors."""
    rows = TABLES.get(case.about["kind"], lambda case: [])(case)
    expected = case.about.get("expected", {})
    if case.about["kind"] == "tagger":
        targets = produce("targets", {"result": "tags", "lora": ["visual_encoder", "tagging_head"]})[0]
        if "n_tags" in expected:
            rows.append(("n_tags", int(targets.sum()), expected["n_tags"]))
        if "tags" in expected and "tags" in case.options:
            on = [tag for tag, value in zip(case.options["tags"], targets.tolist(), strict=True) if value]
            rows.append(("tags", ", ".join(on), expected["tags"]))
    return rows


@torch.no_grad()
def run(case: Case) -> list[dict[str, Any]]:
    """A row for every output: how far it is from the recorded one, what is allowed, and the verdict.

    Only float32 on a CPU is judged by the tolerances, which are meant for it; elsewhere a finite distance is enough.
    """
    name, rows = case.about["case"], []
    judged = case.device.type == "cpu" and case.dtype == torch.float32
    produce = KINDS[case.about["kind"]](case)
    for key, entry in case.about["outputs"].items():
        produced, expected = produce(key, entry.get("call")).cpu(), case.outputs[key]
        if "take" in entry:
            produced = produced[tuple(slice(*span) for span in entry["take"])]
        distance = float("inf")
        if tuple(produced.shape) == tuple(expected.shape):
            distance = (produced.double() - expected.double()).abs().max().item()
        within, role = distance <= entry["max_abs"], entry.get("role")  # a NaN is not within
        good = {"quirk": True, "must_differ": not within}.get(role, within) if judged else bool(np.isfinite(distance))
        row = {"case": name, "output": key, "distance": distance, "good": good, "role": role}
        rows.append(
            row | ({"allowed": entry["max_abs"]} if judged else {"largest": expected.double().abs().max().item()})
        )
    for key, produced, expected in expectations(case, produce):
        good = produced == expected
        rows.append(
            {"case": name, "output": key, "good": good, "role": None if good else f"{produced}, not {expected}"}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="+")
    parser.add_argument(
        "--tiny-bundle", type=Path, help="the small bundle in the reference's names (default: beside the case)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write every distance")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    for folder in args.cases:
        if (folder / "case.json").exists():
            try:
                rows += run(read_case(folder, args.tiny_bundle, args.device, getattr(torch, args.dtype)))
            except pipeline.Refused as error:
                refused.append(f"{folder.name}: {error}")
    columns = {"case": "", "output": "", "distance": ".2e", "allowed": ".0e", "largest": ".2e", "role": "", "good": ""}
    print(report.table(rows, columns))
    failures = sum(not row["good"] for row in rows)
    print(f"{len({row['case'] for row in rows})} cases, {len(rows)} outputs, {failures} failures")
    print("\n".join(f"refused: {line}" for line in refused), end="\n" if refused else "")
    if args.json:
        report.write(args.json, rows, device=args.device, dtype=args.dtype)
    sys.exit(1 if failures or not (rows or refused) else 0)


if __name__ == "__main__":
    main()
