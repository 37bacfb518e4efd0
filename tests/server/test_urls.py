"""An image by its URL: Cog's server fetches it, and the result is the same."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import corpus
import pytest
from cog_client import data_uri, predict

from scripts.cog_server import CogServer

QUICK = {"num_inference_steps": 1, "seed": 1, "scale_factor": 2, "latent_tiled_size": 16}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "photo.png").write_bytes(corpus.file(corpus.PHOTO))

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(tmp_path))  # type: ignore[arg-type]

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_and_a_mask_by_url(server: CogServer, address: str) -> None:
    sent = predict(server, image=data_uri(corpus.file(corpus.PHOTO)), **QUICK)
    fetched = predict(server, image=f"{address}/photo.png", **QUICK)
    assert fetched["status"] == "succeeded" and fetched["output"] == sent["output"]
    masked = predict(server, image=f"{address}/photo.png", mask=f"{address}/photo.png", **QUICK)
    assert masked["status"] == "succeeded" and masked["output"] != sent["output"]
