"""Upscale frames that are NumPy arrays, between two steps of a pipeline: python examples/numpy_pipeline.py"""

from collections.abc import Iterator

import numpy as np

from seesr import upscale


def frames() -> Iterator[np.ndarray]:
    """Three frames of 32 x 24 pixels, floats from 0 to 1."""
    ramp = np.linspace(0, 1, 32)[None, :, None] * np.ones((24, 1, 3))
    for phase in (0.0, 0.1, 0.2):
        yield (ramp + phase) % 1


for output in upscale(frames(), scale_factor=2, seed=1):
    frame = output.array  # float32 from 0 to 1, as the input
    print(frame.shape, frame.dtype, round(float(frame.mean()), 2))
