"""JSON log lines of a worker: job, worker and attempt."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from lab.fleet.callers import IMAGE, PNG
from lab.fleet.servers import fleet


@pytest.mark.long
def test_a_worker_logs_job_worker_and_attempt(tmp_path: Path) -> None:
    with fleet(tmp_path, ECHO_SECONDS="0.1", LOG_FORMAT="json") as running:
        address = running.addresses["gateway"]
        answer = httpx.post(f"{address}/upscale", content=IMAGE, headers=PNG, params={"num_inference_steps": 1})
        assert answer.status_code == 200
        job = answer.headers["x-job-id"]
    log = (tmp_path / "worker0.log").read_text().splitlines()  # complete: the worker has ended
    events = [json.loads(line) for line in log if line.startswith("{") and '"event"' in line]
    assert [(line["event"], line["job"], line["worker"], line["attempt"]) for line in events] == [
        ("succeeded", job, "worker0@here", 1)
    ]
