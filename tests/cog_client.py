"""Helpers for tests: requests to Cog's server."""

from __future__ import annotations

import base64
import io
import threading
import time

import requests
from PIL import Image

from scripts.cog_server import CogServer


def data_uri(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64," + base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def ask(server: CogServer, body: object) -> requests.Response:
    """Cog answers a moment before its slot is free again, so a 409 right after an answer is asked again."""
    options = {"data": body} if isinstance(body, str) else {"json": body}
    for _ in range(100):
        answer = requests.post(
            f"{server.url}/predictions", **options, headers={"Content-Type": "application/json"}, timeout=300
        )
        if answer.status_code != 409:
            break
        time.sleep(0.02)
    return answer


def ask_in_background(server: CogServer, **changes: object) -> tuple[threading.Thread, list[dict]]:
    """A prediction named "long" on its way, and the list that will hold its answer."""
    answers: list[dict] = []

    def send() -> None:
        url = f"{server.url}/predictions/long"
        answers.append(requests.put(url, json={"input": changes}, timeout=300).json())

    thread = threading.Thread(target=send)
    thread.start()
    return thread, answers


def predict(server: CogServer, **changes: object) -> dict:
    return ask(server, {"input": changes}).json()


def image_of(answer: dict) -> Image.Image:
    assert answer["status"] == "succeeded", answer
    return Image.open(io.BytesIO(base64.b64decode(answer["output"].partition(",")[2])))


def wait_for(server: CogServer, status: str, seconds: float = 30) -> None:
    """Waits until the health check says `status`; a slot is freed a moment after its answer."""
    deadline = time.monotonic() + seconds
    while (result := server.health()["status"]) != status:
        assert time.monotonic() < deadline, f"{result} instead of {status}"
        time.sleep(0.01)
