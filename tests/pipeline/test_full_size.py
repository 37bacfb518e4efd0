"""The pipeline of one image with the full-size networks. test_parity.py has the recorded numbers at full size."""

from __future__ import annotations

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from lab import sizes
from seesr import Settings, Upscaler

PARAMETERS = {"unet": 1_126_760_324, "controlnet": 489_031_440, "vae": 83_653_863, "text_encoder": 340_387_840}


@pytest.mark.slow
def test_an_image_passes_through_the_full_size_networks() -> None:
    networks = sizes.build(torch.device("cpu"), torch.float32)
    for name, count in PARAMETERS.items():
        assert sum(p.numel() for p in getattr(networks, name).parameters()) == count
    image = Image.fromarray(skimage.data.chelsea()[:128, :128])
    result = Upscaler(networks)(image, Settings(num_inference_steps=1, seed=1))
    assert result.image.size == (512, 512)
    assert np.ptp(np.asarray(result.image)) > 0
    assert result.metrics["tiles"] == 1
