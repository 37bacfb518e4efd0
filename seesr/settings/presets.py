"""Presets: named sets of settings, offered by the command line and the page."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {  # figures: results/presets.json
    "fast": {"num_inference_steps": 1},
    "balanced": {},  # the bundle's own defaults
    "careful": {"fidelity": 0.2},  # invents less, in the same time
}
