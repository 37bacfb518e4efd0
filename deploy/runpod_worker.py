"""RunPod's queue: {"input": {"image": base64 or data URI, ...settings}} -> {"image", "format", "seed", "metrics"}.

Errors are returned as {"error": one line}; a raised exception would reach the client as a traceback. A result that is
too large for the platform is written to object storage (SEESR_STORE), and a link is returned.

    python deploy/runpod_worker.py --rp_serve_api --rp_api_host 127.0.0.1     runs it locally
"""

from __future__ import annotations

import base64
import logging
from typing import Any

import runpod

from seesr import Engine, logs
from seesr.config import Configuration
from seesr.object_store import Store
from seesr.runtime.progress import Position
from seesr.settings.parsing import MASK, from_data_uri, mask_of, settings_of

LARGEST_ANSWER = 10 * 2**20  # bytes that /run may answer; base64 adds a third
engine: Engine | None = None


def handler(job: dict[str, Any]) -> dict[str, Any]:
    """Upscales one image."""

    def tell(position: Position) -> None:
        runpod.serverless.progress_update(job, str(position))

    try:
        inputs = job.get("input")
        if not isinstance(inputs, dict) or not isinstance(inputs.get("image"), str):
            raise ValueError("input.image must be base64 or a data URI")
        settings = settings_of(inputs, MASK | {"image"})
        assert engine is not None
        output = engine.run(from_data_uri(inputs["image"]), settings, watchers=(tell,), mask=mask_of(inputs))
        result = {"format": settings.suffix, "seed": output.seed, "metrics": output.metrics}
        if len(output.data) * 4 / 3 < LARGEST_ANSWER:
            return {"image": base64.b64encode(output.data).decode(), **result}
        return {**Store.configured().put(output.data, settings.suffix), **result}
    except (ValueError, RuntimeError) as error:
        return {"error": str(error)}
    except Exception:
        logging.exception("job %s", job.get("id"))
        return {"error": "internal error; see the server's log"}


if __name__ == "__main__":
    logs.configure(Configuration.read().log_format)
    engine = Engine.load()
    runpod.serverless.start({"handler": handler})
