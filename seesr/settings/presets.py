"""Named sets of settings for people who do not want to choose: the command line and the page offer them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"num_inference_steps": 1},
    "balanced": {},
    "careful": {"num_inference_steps": 4, "use_kds": True, "num_particles": 4},
}
