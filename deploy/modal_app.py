"""Modal: `modal deploy deploy/modal_app.py`. Weights: `modal volume put seesr-weights weights/full /full`.

`Seesr.upscale` takes bytes and settings and returns bytes. For long jobs use `.spawn()` and poll. The web endpoint
stores the result and returns {"file_key", "public_url"}; the secret `seesr-store` has SEESR_STORE and its credentials.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import modal

ROOT = Path(__file__).resolve().parent.parent
IDLE = 60  # seconds that a container waits for the next image; at low rates it decides the bill
app = modal.App("seesr")
weights = modal.Volume.from_name("seesr-weights", create_if_missing=True)
image = (
    modal.Image.debian_slim(python_version="3.12")
    .pip_install_from_requirements(str(ROOT / "requirements.txt"))
    .pip_install("fastapi", "obstore")
    .env({"SEESR_WEIGHTS": "/weights/full"})
    .add_local_python_source("seesr")
)


@app.cls(
    image=image, gpu=["L4", "A10G"], volumes={"/weights": weights.with_mount_options(read_only=True)},
    secrets=[modal.Secret.from_name("seesr-store")], scaledown_window=IDLE, max_containers=4, timeout=900,
)  # fmt: skip
class Seesr:
    @modal.enter()
    def load(self) -> None:
        """Once a container: refused at start where no store is configured."""
        from seesr import Engine
        from seesr.object_store import Store

        self.store = Store.configured()
        self.engine = Engine.load()

    @modal.method()
    def upscale(self, data: bytes, settings: dict[str, Any]) -> bytes:
        from seesr.settings.parsing import settings_of

        return self.engine.run(data, settings_of(settings)).data

    @modal.fastapi_endpoint(method="POST", requires_proxy_auth=True)
    def web(self, body: dict[str, Any]) -> dict[str, str]:
        """{"image": base64, ...settings} -> {"file_key", "public_url"}."""
        from fastapi import HTTPException

        from seesr.settings.parsing import MASK, from_data_uri, mask_of, settings_of

        try:
            settings = settings_of(body, MASK | {"image"})
            output = self.engine.run(from_data_uri(str(body.get("image", ""))), settings, mask=mask_of(body))
            return self.store.put(output.data, settings.suffix)
        except (ValueError, RuntimeError) as error:
            raise HTTPException(422, str(error)) from error
