"""The noise schedule of a bundle, with trailing timesteps as in SeeSR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from seesr.networks.weights import WeightsError


class NoiseSchedule:
    """How much noise there is at each timestep; equal to diffusers' DDPMScheduler with `timestep_spacing="trailing"`.

    Attributes:
        alphas_cumprod: [number of timesteps] float32: the share of the image's variance at every one.

    Raises:
        WeightsError: the config asks for another kind of schedule, or of networks.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        if (kind := config.get("prediction_type", "epsilon")) != "epsilon":
            raise WeightsError(f"networks that predict {kind} are not supported, only epsilon")
        kind, zero = config.get("beta_schedule", "linear"), config.get("rescale_betas_zero_snr", False)
        if kind not in ("linear", "scaled_linear") or zero or config.get("trained_betas") is not None:
            raise WeightsError(f"the noise schedule {kind} is not supported, only linear and scaled_linear")
        self.count: int = config.get("num_train_timesteps", 1000)
        power = 2 if kind == "scaled_linear" else 1
        first, last = (config.get(name, value) for name, value in (("beta_start", 1e-4), ("beta_end", 0.02)))
        betas = torch.linspace(first ** (1 / power), last ** (1 / power), self.count, dtype=torch.float32) ** power
        self.alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)

    def timesteps(self, steps: int) -> list[int]:
        """The timesteps of so many steps, descending from the last one."""
        return (np.round(np.arange(self.count, 0, -self.count / steps)).astype(np.int64) - 1).tolist()
