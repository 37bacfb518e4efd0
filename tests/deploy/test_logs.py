"""Log volume of a long-running server: probes are not logged, and logrotate loses no line."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from echo_server import serving
from serving import ANN

from lab.report import ROOT


def levels(caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    """Path of each logged request -> level."""
    requests = [record for record in caplog.records if isinstance(record.args, dict) and "path" in record.args]
    return {record.args["path"]: record.levelno for record in requests}  # type: ignore[index, call-overload]


def test_probes_are_not_logged_at_info(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/vertex-health")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/vertex-predict")
    probes = ["/live", "/ready", "/health", "/ping", "/metrics", "/vertex-health"]
    headers = {"Authorization": f"Bearer {ANN}"}
    with caplog.at_level(logging.DEBUG), serving(tmp_path, api_keys=f"ann:{ANN}", platform="vertex") as client:
        for path in (*probes, "/status"):
            assert client.get(path, headers=headers).status_code in (200, 204), path
        assert levels(caplog) == {**dict.fromkeys(probes, logging.DEBUG), "/status": logging.INFO}
        client.app.state.service.jobs.failure = "broken on purpose"  # type: ignore[attr-defined]
        assert client.get("/ready").status_code == 503 and client.get("/metrics").status_code == 401
        assert levels(caplog) | {"/ready": logging.DEBUG, "/metrics": logging.INFO} == levels(caplog)


def test_logrotate_accepts_the_config_and_logging_continues(tmp_path: Path) -> None:
    if shutil.which("logrotate") is None and "CI" not in os.environ:
        pytest.skip("logrotate: apt-get install logrotate")
    rules, log = tmp_path / "rules", tmp_path / "seesr.log"
    rules.write_text((ROOT / "deploy/logrotate.conf").read_text().replace("/var/log/seesr.log", str(log)))
    rules.chmod(0o644)
    tmp_path.chmod(0o755)
    with log.open("a") as writer:
        print("before", file=writer, flush=True)
        command = ["logrotate", "--force", "--state", str(tmp_path / "state"), str(rules)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        print("after", file=writer, flush=True)
    assert log.read_text() == "after\n"
    assert subprocess.run(["zcat", tmp_path / "seesr.log.1.gz"], capture_output=True).stdout == b"before\n"


@pytest.mark.parametrize("file", ["deploy/compose.yaml", "deploy/fleet/compose.yaml"])
def test_docker_rotates_the_logs(file: str) -> None:
    services = yaml.safe_load((ROOT / file).read_text())["services"]
    assert all("max-size" in about["logging"]["options"] for name, about in services.items() if name != "redis")
