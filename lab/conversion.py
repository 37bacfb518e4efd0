"""Measures time and peak memory of a full-size conversion: python -m lab.conversion [--work DIR]

The stand-ins have the public files' names, shapes and dtypes; their values are all zero but the thresholds. RAM's file
also holds as many unused bytes as the published one. Needs 20 GB of disk. Writes results/conversion.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lab import report
from seesr.checkpoints import single_file
from seesr.networks.text_encoder import TextEncoder

GOLDEN = report.ROOT / "tests/data/golden"
RAM_BYTES = 5_625_634_401  # of ram_swin_large_14m.pth


def zeros(shapes: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(tuple(shape), dtype=dtype) for key, shape in shapes.items()}


def shapes_of(case: str, network: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "weights.json").read_text())[network]["shapes"]


def write_part(folder: Path, config: dict[str, Any], name: str, state: dict[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / name)


def stand_ins(folder: Path) -> None:
    """Writes downloads of the real sizes, as ./scripts/weights leaves them."""
    configs = json.loads((GOLDEN / "full/case.json").read_text())["configs"]
    unet = shapes_of("full", "unet")
    stock = {key: shape for key, shape in unet.items() if "image_attentions" not in key}
    half, name = "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"
    config = {key: value for key, value in configs["unet"].items() if key != "use_image_cross_attention"}
    write_part(folder / "sd-turbo/unet", config, half, zeros(stock, torch.float16))
    image = {key: shape for key, shape in unet.items() if "image_attentions" in key}
    write_part(folder / "seesr/unet", configs["unet"], "image_attentions.safetensors", zeros(image, torch.float32))
    control = zeros(shapes_of("full", "controlnet"), torch.float32)
    write_part(folder / "seesr/controlnet", configs["controlnet"], name, control)
    vae = {**configs["vae"], "_class_name": "AutoencoderKL"}
    write_part(folder / "sd-turbo/vae", vae, half, zeros(shapes_of("full", "vae"), torch.float16))
    text_config = single_file.CONFIGS["text_encoder"]
    with torch.device("meta"):
        text = {f"text_model.{key}": value.shape for key, value in TextEncoder(**text_config).state_dict().items()}
    write_part(folder / "sd-turbo/text_encoder", text_config, "model.fp16.safetensors", zeros(text, torch.float16))
    (folder / "sd-turbo/scheduler").mkdir()
    config = json.dumps(single_file.CONFIGS["scheduler"])
    (folder / "sd-turbo/scheduler/scheduler_config.json").write_text(config)
    shutil.copytree(GOLDEN / "tiny_bundle/tokenizer", folder / "tokenizer")
    base = zeros(shapes_of("ram_full", "base"), torch.float32)
    unused = RAM_BYTES // 4 - sum(value.numel() for value in base.values())
    base["text_decoder.unused"] = torch.zeros(max(1, unused))
    for part in ("ram", "dape", "tags"):
        (folder / part).mkdir()
    torch.save({"model": base}, folder / "ram/ram_swin_large_14m.pth")
    torch.save(zeros(shapes_of("ram_full", "dape"), torch.float32), folder / "dape/DAPE.pth")
    count = base["label_embed"].shape[0]
    (folder / "tags/ram_tag_list.txt").write_text("\n".join(f"tag {n}" for n in range(count)))
    (folder / "tags/ram_tag_list_threshold.txt").write_text("\n".join(["0.7"] * count))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for the stand-ins, kept (default: a temporary one)")
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    try:
        if not (work / "downloads/tags/ram_tag_list_threshold.txt").exists():
            stand_ins(work / "downloads")
        code = "import sys; from pathlib import Path; from seesr.checkpoints import convert; "
        code += "convert.convert(Path(sys.argv[1]), Path(sys.argv[2]), 'none')"
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, work / "downloads", work / "full"], check=True, cwd=report.ROOT)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        row = {
            "seconds": round(seconds, 1),
            "peak_gb": round(peak / 1e9, 2),
            "downloads_gb": round(size(work / "downloads") / 1e9, 2),
            "bundle_gib": round(size(work / "full") / 2**30, 2),
            "threads": torch.get_num_threads(),
        }
        print(row)
        report.write(report.RESULTS / "conversion.json", [row])
    finally:
        if args.work is None:
            shutil.rmtree(work)


if __name__ == "__main__":
    main()
