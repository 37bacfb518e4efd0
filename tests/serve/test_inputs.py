"""Files by other programs through the server and the command line: size, depth, color and alpha of the results.

With `fidelity` 1 and a scale of 1 the result has the pixels of the input, so that an independent reader's values can be
compared with it. tests/unit/test_inputs.py compares every file without a prediction.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from inputs import EXPECTED, FOLDER, check_pixels, is_deep, is_grey
from PIL import Image
from starlette.testclient import TestClient

from seesr import Engine, cli
from seesr.config import Configuration
from seesr.images.image_data import ImageData
from seesr.networks import weights
from seesr.serving import app

SAME = {"fidelity": "1", "scale_factor": "1", "latent_tiled_size": "16", "num_inference_steps": "1", "seed": "1"}
OVER_HTTP = [  # one of every format, depth, kind of color tag and container transform
    "avifenc-clap-irot-1-imir-0.avif", "avifenc-p3.avif", "avifenc-rgba-8.avif", "chrm-p3-8.png", "cicp-pq-16.png",
    "cjxl-orientation-6.jxl", "cjxl-rgba-16.jxl", "exif-xres-text.jpg", "exiftool-xmp-orientation-6.jpg",
    "gama-1.000-16.png", "heifenc-rgb-10.heic", "imagecodecs-12bit.jpg", "libheif-p3.heic", "magick-bilevel-1.png",
    "magick-lab-8.tif", "tifffile-cmyk-alpha.tif", "tifffile-float.tif", "tifffile-thumbnail-first.tif",
    "vips-greya-16-lzw.tif", "vips-palette-4.png", "vips-rgba-lossless.webp",
]  # fmt: skip


@pytest.fixture(scope="module")
def client(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The server in this process, on the bundled pocket weights."""
    configuration, base = Configuration(data=tmp_path_factory.mktemp("data")), "http://127.0.0.1:5000"
    built = app.build(
        configuration, base, weights.POCKET, lambda send: app.local(configuration, lambda: engine, weights.POCKET, send)
    )
    with TestClient(built, base_url=base) as client:
        yield client


def check_result(name: str, data: bytes) -> None:
    """Asserts that a result in PNG, read by OpenCV and Pillow, shows what the file `name` shows."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert b"digitalsourcetype/algorithmicallyEnhanced" in data, name
    with Image.open(io.BytesIO(data)) as image:
        icc, one_channel = image.info.get("icc_profile"), data[25] in (0, 4)
    if one_channel:
        pixels = np.dstack([pixels] * 3) if pixels.ndim == 2 else pixels  # pyright: ignore[reportCallIssue]
    rgb = np.ascontiguousarray(pixels[..., 2::-1])
    check_pixels(name, ImageData(rgb, pixels[..., 3] if pixels.shape[2] == 4 else None, icc))
    assert one_channel == is_grey(name), name
    assert (pixels.dtype == np.uint16) == is_deep(name), name


@pytest.mark.parametrize("name", OVER_HTTP)
def test_the_server_shows_what_an_independent_reader_shows(client: TestClient, name: str) -> None:
    answer = client.post("/upscale", params=SAME, content=(FOLDER / name).read_bytes())
    assert answer.status_code == 200, answer.text
    check_result(name, answer.content)


def test_the_command_line_shows_what_an_independent_reader_shows(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All files of the folder in one run; those that are refused fail alone, with what they are."""
    monkeypatch.setattr(Engine, "load", lambda bundle, device, **more: engine)
    flags = [part for name, value in SAME.items() for part in ("--" + name.replace("_", "-"), value)]
    assert cli.main(["upscale", str(FOLDER), "--out", str(tmp_path), *flags, "--bundle", str(weights.POCKET)]) == 1
    refused = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{FOLDER}/")]
    assert [Path(line.partition(": ")[0]).name for line in refused] == ["vips-lab-16.tif", "vips-lab.tif"]
    result = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in EXPECTED:
        (data,) = (result[target] for target in (f"{Path(name).stem}-x1.png", f"{name}-x1.png") if target in result)
        check_result(name, data)
