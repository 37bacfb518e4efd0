"""Where a result can be trusted: the disagreement of particles, and a bound on it calibrated on photographs.

Method: Adame, Csillag, Goedert, "Image Super-Resolution with Guarantees via Conformalized Generative Models", arXiv
2502.09664: what the particles disagree on least is trusted, up to a threshold below which the local error of held-out
photographs stayed within a bound. `python -m lab.quality.trust` measures the thresholds in confidence.json;
docs/decisions/0038 has our choices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seesr.images.color import spans
from seesr.images.image_data import Pixels
from seesr.networks.weights import Bundle
from seesr.settings import Settings
from seesr.settings.validation import FieldError
from seesr.settings.view_specs import VIEWS

TABLE = Path(__file__).with_name("confidence.json")
WINDOW = 16  # side of the square over which an error is averaged, output pixels
AVERAGED = 32  # side of the square over which disagreement and detail are averaged, output pixels
DETAIL_SIGMA = 2.0  # sigma of the Gaussian that parts fine detail from the rest, output pixels
UNCALIBRATED = ("seed", "use_kds", "num_inference_steps", "output_view", "output_format", "output_quality", "keep_exif")


class Calibration(NamedTuple):
    """What was measured for one bundle.

    Attributes:
        error: bound of the local error, levels of 255; see `local_error`.
        level: share of squares of `side` x `side` output pixels whose trusted pixels keep the bound, from 0 to 1.
        threshold: disagreement below which a pixel is trusted.
        side: of the squares, output pixels.
        steps: denoising steps of the calibration; other settings had their defaults.
        photographs, draws: that were used: images, and squares of them.
    """

    error: float
    level: float
    threshold: float
    side: int
    steps: int
    photographs: int
    draws: int

    def short(self) -> dict[str, float]:
        """What a reader of the mask must know."""
        return {"error": self.error, "level": self.level, "side": self.side}


def calibration_of(bundle: Bundle) -> Calibration | None:
    """The calibration of a bundle, or None."""
    rows: Mapping[str, Any] = json.loads(TABLE.read_text())
    row = rows.get(bundle.digest)
    return None if row is None else Calibration(**{name: row[name] for name in Calibration._fields})


def require(settings: Settings, steps: int, masked: bool, bundle: Bundle) -> Calibration | None:
    """The calibration that the view of these settings needs; None: it needs none.

    Args:
        steps: denoising steps.
        masked: whether there is a mask.

    Raises:
        FieldError: the bundle has none, or it was measured with other settings; the message names the setting.
    """
    view = settings.output_view
    if view not in VIEWS or not VIEWS[view].calibrated:
        return None
    calibration = calibration_of(bundle)
    if calibration is None:
        raise FieldError(
            f"output_view {view} needs a calibration, and bundle {bundle.name} has none: set output_view=uncertainty, "
            "or measure one with: python -m lab.quality.trust",
            "output_view",
        )
    if masked:
        raise FieldError(f"output_view {view} is calibrated without a mask: remove the mask", "mask")
    expected = {field.name: field.default for field in dataclasses.fields(Settings) if field.name not in UNCALIBRATED}
    for name, value in {**expected, "num_inference_steps": calibration.steps}.items():
        actual = steps if name == "num_inference_steps" else getattr(settings, name)
        tile = name == "latent_tiled_size" and actual in bundle.defaults.latent_tiled_size  # as a record has it
        if actual != value and not tile:
            remedy = f"leave {name} empty" if value in (None, "") else f"set {name}={value}"
            raise FieldError(f"output_view {view} is not calibrated for {name} {actual}: {remedy}", name)
    return calibration


def spread(images: Iterable[Tensor]) -> Tensor:
    """Standard deviation over particles of the mean of the colors.

    Args:
        images: of two or more particles, [3, H, W] each, in [0, 1].

    Returns:
        [H, W], in levels of 255; differences from the first image are summed, so that close values do not cancel.
    """
    first, total, squares, count = None, 0.0, 0.0, 0
    for image in images:
        grey, count = image.mean(0), count + 1
        first = grey if first is None else first
        difference = grey - first
        total, squares = total + difference, squares + difference.square()
    variance = (squares - total**2 / count) / (count - 1)  # type: ignore[operator]
    return 255 * torch.as_tensor(variance).clamp(min=0).sqrt()


def disagreement(spread: Tensor, rgb: Pixels) -> NDArray[np.float32]:
    """Spread of the particles times the fine detail of the result, both averaged over AVERAGED x AVERAGED pixels.

    The particles of a smooth area differ by as much as those of a fine texture, where they are wrong more often.

    Args:
        spread: levels of 255, at least [H, W].
        rgb: the result, [H, W, 3].

    Returns:
        [H, W], in squared levels of 255.
    """
    height, width = rgb.shape[:2]
    scale, result = 255 / np.iinfo(rgb.dtype).max, np.empty((height, width), np.float32)
    for top, bottom, first, last in spans(height, AVERAGED + round(4 * DETAIL_SIGMA) + 1):
        grey = scale * rgb[first:last].mean(2, dtype=np.float32)
        detail = np.abs(grey - cv2.GaussianBlur(grey, (0, 0), DETAIL_SIGMA))
        local_spread = spread[first:last, :width].cpu().numpy()
        whole = cv2.blur(local_spread, (AVERAGED, AVERAGED)) * cv2.blur(detail, (AVERAGED, AVERAGED))
        result[top:bottom] = whole[top - first : bottom - first]
    return result


def local_error(rgb: Pixels, truth: Pixels) -> NDArray[np.float32]:
    """Absolute error, averaged over the colors and WINDOW x WINDOW pixels, [H, W], in levels of 255.

    Args:
        rgb, truth: the result and the original, [H, W, 3] of one depth.
    """
    error = np.abs(rgb.astype(np.float32) - truth).mean(2) * (255 / np.iinfo(rgb.dtype).max)
    return cv2.blur(error, (WINDOW, WINDOW)).astype(np.float32)
