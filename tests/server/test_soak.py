"""Many mixed predictions: memory, files and threads do not grow."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

import corpus
import numpy as np
import pytest
from cog_client import data_uri, predict

from scripts.cog_server import ROOT, CogServer

PAGE = os.sysconf("SC_PAGE_SIZE")
POOL = "tokio-rt-worker"  # the runtime's own threads, which come and go with what it has to do


def processes(server: CogServer) -> list[Path]:
    """The server and its worker: everything in the session it was started in."""
    results = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == server.process.pid:
            results.append(folder)
    return results


def name(thread: Path) -> str:
    try:
        return (thread / "comm").read_text().strip()
    except OSError:  # it has ended since
        return POOL


def usage(server: CogServer) -> dict[str, int]:
    every, temporary = processes(server), Path(tempfile.gettempdir())
    return {
        "memory": sum(int((p / "statm").read_text().split()[1]) * PAGE for p in every),
        "files": sum(len(list((p / "fd").iterdir())) for p in every),
        "threads": sum(name(thread) != POOL for p in every for thread in (p / "task").iterdir()),
        "outputs": sum(
            len(list(folder.iterdir())) for p in every for folder in temporary.glob(f"seesr-outputs-{p.name}")
        ),
    }


def requests(count: int) -> list[dict]:
    rng = np.random.default_rng(3)
    upload = data_uri(corpus.file(corpus.PHOTO))
    results = []
    for number in range(count):
        width, height = rng.integers(8, 48, 2)
        noise = data_uri(corpus.file(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
        kinds = (
            {"image": upload},
            {"image": noise, "scale_factor": float(rng.uniform(1, 4))},
            {"image": noise, "output_format": "webp", "color_fix": "adain"},
            {"image": data_uri(b"damaged")},
            {"image": noise, "output_format": "jpg", "cfg_scale": 1.5},
            {"image": upload, "use_kds": True, "num_particles": 2, "num_inference_steps": 2},
            {"image": "/etc/passwd"},
            {"image": upload, "latent_tiled_size": 32, "latent_tiled_overlap": 8},
        )
        results.append({"num_inference_steps": 1, **kinds[number % len(kinds)]})
    return results


def soak(count: int, log: Path, growth: float) -> None:
    """Compares the second third with the last; an image in the making may add to a single look, hence the least."""
    looks: list[dict[str, int]] = []
    with CogServer(log, SEESR_WEIGHTS=str(ROOT / "weights/pocket")) as server:
        server.wait_until_ready()
        for number, values in enumerate(requests(count)):
            answer = predict(server, **values)
            assert (answer["status"] == "failed") == (number % 8 in (3, 6)), answer
            looks.append(usage(server))
    before, after = looks[count // 3 : 2 * count // 3], looks[2 * count // 3 :]
    least = [{name: min(look[name] for look in part) for name in looks[0]} for part in (before, after)]
    logging.getLogger(__name__).info("least in the second and the last third: %s", least)
    assert least[1]["memory"] <= (1 + growth) * least[0]["memory"], least
    assert all(least[1][name] <= least[0][name] for name in ("files", "threads")), least
    assert max(look["outputs"] for look in looks) <= 1


@pytest.mark.slow
def test_nothing_grows_over_72_predictions(tmp_path: Path) -> None:
    soak(72, tmp_path / "log", growth=0.03)  # part of this is still warm-up


@pytest.mark.slow
def test_nothing_grows_over_300_predictions(tmp_path: Path) -> None:
    soak(300, tmp_path / "log", growth=0.01)
