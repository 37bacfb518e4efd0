"""Hugging Face Inference Endpoints: the toolkit calls EndpointHandler; the weights are in `bundle` beside this file.

JSON {"inputs": base64, "parameters": {...}} -> {"image": base64, "format", "seed", "metrics"}: lossless, with alpha and
16 bit. An image body arrives as an RGB image and is answered with an image; its parameters are those of the query.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image

from seesr import Engine
from seesr.images.formats import ZIP
from seesr.settings.parsing import MASK, from_data_uri, mask_of, settings_of


class EndpointHandler:
    """Loads once; the toolkit calls it from one thread at a time."""

    def __init__(self, path: str = "") -> None:
        self.engine = Engine.load(Path(path) / "bundle")

    def __call__(self, data: dict[str, Any]) -> Any:
        """Upscales one image.

        Raises:
            ValueError: one line; the toolkit answers 400 with it.
        """
        inputs, parameters = data.get("inputs"), data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError("parameters must be an object")
        settings, mask = settings_of(parameters, MASK), mask_of(parameters)
        if isinstance(inputs, Image.Image):
            if settings.suffix == ZIP:
                raise ValueError("output_view all makes a zip: send the image in base64")
            return Image.open(io.BytesIO(self.engine.run(inputs, settings, mask=mask).data))
        if not isinstance(inputs, str):
            raise ValueError("inputs must be the image in base64, or a data URI")
        output = self.engine.run(from_data_uri(inputs), settings, mask=mask)
        encoded = base64.b64encode(output.data).decode()
        return {"image": encoded, "format": settings.suffix, "seed": output.seed, "metrics": output.metrics}
