"""lab.quality.bundle_check: what it writes, and which results it rejects as implausible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lab.quality import bundle_check
from seesr import Settings

GOOD = {"tags": "a cat", "float32_retries": 0, "faithful": 30.0}


def test_bundle_check_upscales_and_reports_plausibility(tiny_bundle: Path, tmp_path: Path, photo: Image.Image) -> None:
    settings = Settings(scale_factor=1, num_inference_steps=1, seed=1)
    rows = bundle_check.restore(tiny_bundle, tmp_path, [("photo", photo)], "cpu", settings)
    assert rows[0]["size"] == "x".join(map(str, photo.size)) and "faithful" in rows[0]
    assert rows[0]["plausible"] == (not rows[0]["faults"])
    with Image.open(tmp_path / "photo-x4.png") as saved:
        assert saved.size == photo.size


def test_implausible_results_are_reported() -> None:
    bicubic = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], (64, 1, 3))
    noise = np.random.default_rng(0).integers(0, 256, bicubic.shape, dtype=np.uint8)
    sharp = bicubic // 64 * 64 + noise // 64
    assert bundle_check.faults(bicubic, sharp, GOOD) == []
    output = " ".join(
        bundle_check.faults(bicubic, np.full_like(bicubic, 128), {"tags": "", "float32_retries": 2, "faithful": 9.0})
    )
    for expected in ("no tags", "2 parts", "faithful is 9.0", "contrast is 0.00", "nothing was added"):
        assert expected in output
