"""Starts Cog's HTTP server on the default weights, posts a photo, and saves the result and a comparison.

python -m scripts.demo [photo.jpg]      -> out/photo-x4.png, out/photo-compare.png
"""

from __future__ import annotations

import base64
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import requests
from PIL import Image, ImageOps

from scripts.cog_server import CogServer

OUT = Path("out")
CROP = 256  # pixels of the output shown in the comparison


def sample() -> Path:
    """A quarter-size copy of scikit-image's cat, which the pocket model has never seen."""
    import skimage.data

    cat = Image.fromarray(skimage.data.chelsea())
    path = Path(tempfile.mkdtemp(prefix="seesr-demo-")) / "chelsea.png"
    cat.reduce(4).save(path)
    return path


def busiest(image: Image.Image, side: int) -> tuple[int, int, int, int]:
    """The crop with the most detail, as a Pillow box."""
    grey = np.asarray(image.convert("L"), np.float32)
    detail = np.abs(np.diff(grey, axis=0))[:, 1:] + np.abs(np.diff(grey, axis=1))[1:]
    step = max(1, side // 4)
    boxes = [
        (left, top, left + side, top + side)
        for top in range(0, max(1, grey.shape[0] - side), step)
        for left in range(0, max(1, grey.shape[1] - side), step)
    ]
    return max(boxes, key=lambda b: detail[b[1] : b[3], b[0] : b[2]].sum())


def main() -> None:
    photo = Path(sys.argv[1]) if len(sys.argv) > 1 else sample()
    mime = {".png": "image/png", ".webp": "image/webp"}.get(photo.suffix.lower(), "image/jpeg")
    data_uri = f"data:{mime};base64," + base64.b64encode(photo.read_bytes()).decode()
    with CogServer() as server:
        server.wait_until_ready()
        started = time.perf_counter()
        answer = requests.post(f"{server.url}/predictions", json={"input": {"image": data_uri}}, timeout=3600).json()
        seconds = time.perf_counter() - started
    if answer["status"] != "succeeded":
        sys.exit(f"{photo.name}: {answer['error']}")
    OUT.mkdir(exist_ok=True)
    result = OUT / f"{photo.stem}-x4.png"
    result.write_bytes(base64.b64decode(answer["output"].partition(",")[2]))
    with Image.open(result) as opened, Image.open(photo) as original:
        ours = opened.convert("RGB")
        bicubic = ImageOps.exif_transpose(original).convert("RGB").resize(ours.size, Image.Resampling.BICUBIC)
    box = busiest(ours, CROP)
    pair = Image.new("RGB", (2 * CROP + 8, CROP), "white")
    pair.paste(bicubic.crop(box), (0, 0))
    pair.paste(ours.crop(box), (CROP + 8, 0))
    pair.save(OUT / f"{photo.stem}-compare.png")
    metrics = answer["metrics"]
    print(
        f"{result}: {metrics['input_size']} -> {metrics['output_size']} in {seconds:.1f} s, seed {metrics['seed']}, "
        f"tags: {metrics['tags'] or 'none'}, bundle {metrics['bundle']}"
    )


if __name__ == "__main__":
    main()
