"""The corpus of bad and odd requests through `seesr serve`, and many jobs in a row."""

from __future__ import annotations

import io
import logging
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import corpus
import pytest
import requests
from cog_client import data_uri
from corpus import Case
from PIL import Image
from serving import QUICK, Serving

SMALL = {**QUICK, "scale_factor": 2, "latent_tiled_size": 16, "latent_tiled_overlap": 4}
OURS = {
    "must be an uploaded file": "image must be",
    "Input validation": "not allowed here",
    corpus.NOT_JSON: "not valid JSON",
}
OTHERWISE = {  # what this server says in its own way
    "broken base64": "not valid base64",
    "unknown field": "there is no input 'upscaler'",
    "scale_factor = 1e400": "scale_factor is inf; it must be a float",
}


def send(service: Serving, case: Case) -> requests.Response:
    image = data_uri(case.image) if isinstance(case.image, bytes) else case.image
    if isinstance(case.inputs, str):
        body, path = case.inputs.replace("IMAGE", str(image)), "/v1/models/you/seesr/predictions"
        return service.ask("POST", path, data=body, headers={"Content-Type": "application/json"})
    if isinstance(case.image, bytes) and all(isinstance(value, (str, float)) for value in case.inputs.values()):
        return service.ask("POST", "/upscale", files={"image": ("x", case.image)}, data={**SMALL, **case.inputs})
    values = {} if image is None else {"image": image}
    return service.ask("POST", "/upscale", json={**SMALL, **values, **case.inputs})


@pytest.fixture(scope="module")
def good(service: Serving) -> Iterator[Callable[[], bytes]]:
    """The answer to a good request, which must be the same at any time."""

    def answer() -> bytes:
        result = service.upscale(corpus.file(corpus.PHOTO), **SMALL)
        assert result.status_code == 200, result.text
        return result.content

    first = answer()
    yield lambda: first
    assert answer() == first


@pytest.mark.parametrize("case", corpus.parameters())
def test_request(service: Serving, good: Callable[[], bytes], case: Case) -> None:
    answer = send(service, case)
    message = OTHERWISE.get(case.name, OURS.get(case.message or "", case.message))
    if message is None:
        assert answer.status_code == 200, answer.text
        Image.open(io.BytesIO(answer.content)).load()
        return
    assert answer.status_code in (400, 413, 422), (answer.status_code, answer.text[:200])
    detail = answer.json()["detail"]
    assert re.search(message, detail), detail
    assert "\n" not in detail and "Traceback" not in detail and str(service.folder) not in detail
    assert service.upscale(corpus.file(corpus.PHOTO), **SMALL).content == good()


def soak(service: Serving, count: int, growth: float) -> None:
    """The median memory of the last third over that of the second."""
    looks = []
    for number in range(count):
        kind = ({}, {"output_format": "webp"}, {"color_fix": "adain"}, {"scale_factor": 3})[number % 4]
        assert service.upscale(corpus.file(corpus.PHOTO), **{**SMALL, **kind}).status_code == 200
        looks.append(int(Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]) * 4096)
    second, last = (statistics.median(looks[count * part // 3 : count * (part + 1) // 3]) for part in (1, 2))
    logging.getLogger(__name__).info("memory: %.1f MB, then %.1f MB", second / 1e6, last / 1e6)
    assert last <= (1 + growth) * second, (second, last)


def test_nothing_grows_over_60_jobs(service: Serving) -> None:
    soak(service, 60, 0.03)


@pytest.mark.slow
def test_nothing_grows_over_300_jobs(service: Serving) -> None:
    soak(service, 300, 0.01)
