"""deploy/monitoring: rules, dashboards and documentation name what is exported; each alert fires when it should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from echo_server import PNG, QUICK, serving
from monitoring import FOLDER, documented_metrics, exported, series, used
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_metrics
from serving import ANN, BOB, sharp
from starlette.testclient import TestClient

from lab.report import ROOT
from seesr.serving import gpu, health, job_counts
from seesr.serving.job import DONE, FAILED, Job
from seesr.serving.job_counts import JobCounts, families

SCRAPE = {"Authorization": "Bearer scrape-me"}
OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
RULES = ("server.rules.yaml", "fleet.rules.yaml")
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None and "CI" not in os.environ, reason="promtool: apt-get install prometheus"
)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def upscale(client: TestClient, token: str) -> str:
    """The id of a job that succeeded."""
    answer = client.post("/upscale", params=QUICK, content=sharp(), headers={**PNG, **bearer(token)})
    assert answer.status_code == 200, answer.text
    return answer.headers["x-job-id"]


def scrape(client: TestClient, headers: dict[str, str], accept: str = "") -> str:
    return client.get("/metrics", headers={**headers, "Accept": accept}).text


def values(text: str) -> dict[tuple[str, ...], float]:
    """(name, values of its labels) -> value."""
    return {(s.name, *s.labels.values()): s.value for family in plain_metrics(text) for s in family.samples}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server with two keys of which each has made an image."""
    keys = f"ann:{ANN},bob:{BOB}"
    with serving(tmp_path_factory.mktemp("server"), api_keys=keys, metrics_token="scrape-me") as client:
        upscale(client, ANN)
        upscale(client, BOB)
        end = time.monotonic() + 10
        while values(scrape(client, SCRAPE)).get(("seesr_jobs_total", DONE)) != 2:  # counted just after the answer
            assert time.monotonic() < end
        yield client


def test_the_documentation_has_every_metric_of_a_server(client: TestClient) -> None:
    assert exported(scrape(client, SCRAPE)) == {
        name for name, where in documented_metrics().items() if "server" in where
    }


@pytest.mark.parametrize("name", ["server.rules.yaml", "server.dashboard.json"])
def test_rules_and_dashboard_ask_for_what_a_server_exports(client: TestClient, name: str) -> None:
    text = scrape(client, SCRAPE)
    assert used(name) <= series(exported(text), text)


@needs_promtool
@pytest.mark.parametrize("command", [["check", "rules", *RULES], ["test", "rules", "alerts.test.yaml"],
                                     ["check", "config", "--syntax-only", "prometheus.yaml"]])  # fmt: skip
def test_prometheus_takes_the_rules_and_every_alert_fires_when_it_should(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_metric_names_pass_promtool_lint(client: TestClient) -> None:
    text = scrape(client, SCRAPE)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test_that_fires_and_a_line_in_the_runbook() -> None:
    names = {
        rule["alert"] for file in RULES for rule in yaml.safe_load((FOLDER / file).read_text())["groups"][0]["rules"]
    }
    tests = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names
    runbook = (ROOT / "docs/operations.md").read_text()
    assert set(re.findall(r"^\| `(Seesr\w+)` \|", runbook, re.M)) == names


@pytest.mark.parametrize("name", ["server", "fleet"])
def test_dashboard_panels_are_valid(name: str) -> None:
    panels = json.loads((FOLDER / f"{name}.dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) >= 15
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"] and all("seesr_" in target["expr"] for target in panel["targets"])


def test_jobs_are_counted_by_key_and_duration(client: TestClient) -> None:
    samples = values(scrape(client, SCRAPE))
    for name in ("ann", "bob"):
        assert samples["seesr_key_jobs_total", name, DONE] == 1
        assert samples["seesr_key_megapixels_total", name] == pytest.approx(1e-6)  # the engine says 1x1
    for histogram in ("seesr_queue_seconds", "seesr_job_seconds"):
        assert samples[f"{histogram}_count",] == samples[f"{histogram}_bucket", "+Inf"] == 2
        assert 0 <= samples[f"{histogram}_sum",] < 20
    assert samples["seesr_stage_seconds_count", "denoise"] == 2
    assert samples["seesr_http_received_bytes_total",] >= 2 * len(sharp()) <= samples["seesr_http_sent_bytes_total",]
    assert samples["seesr_http_responses_total", "200"] == 2  # neither /ready nor /metrics
    assert samples["seesr_journal_seconds_count",] > 2


def test_a_key_sees_its_own_counts_and_no_job_of_another(client: TestClient) -> None:
    text = scrape(client, bearer(ANN), OPENMETRICS["Accept"])
    assert "ann" in text and "bob" not in text and "job_id" not in text


def test_exemplars_name_jobs_in_openmetrics_alone(client: TestClient) -> None:
    id = upscale(client, ANN)
    answer = client.get("/metrics", headers={**SCRAPE, **OPENMETRICS})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    samples = [sample for family in openmetrics(answer.text) for sample in family.samples]
    exemplars = {sample.name: sample.exemplar for sample in samples if sample.exemplar}
    assert set(exemplars) == {"seesr_queue_seconds_bucket", "seesr_job_seconds_bucket", "seesr_stage_seconds_bucket"}
    assert id in {exemplar.labels["job_id"] for exemplar in exemplars.values()}
    plain = client.get("/metrics", headers={**SCRAPE, "Accept": "*/*"})
    assert plain.headers["content-type"].startswith("text/plain") and "job_id" not in plain.text


def ended_job(owner: str, status: str = DONE, seconds: float = 1.0) -> Job:
    metrics = {"seconds": {"denoise": seconds}, "tiles": 2, "steps": 3, "output_size": "1000x2000"}
    metrics |= {"out_of_memory_retries": 1, "float32_retries": 0}
    times = {"created": 100.0, "started": 100.0 + seconds, "completed": 100.0 + 2 * seconds}
    return Job(owner, {}, status=status, metrics=metrics if status == DONE else {}, **times)  # type: ignore[arg-type]


def test_counts_add_up() -> None:
    counts = JobCounts()
    for seconds in (0.05, 0.06, 7200):
        counts.add(ended_job("ann", seconds=seconds))
    counts.add(ended_job("ann", FAILED))
    samples = {(s.name, *s.labels.values()): s.value for f in families(*counts.snapshot(), None) for s in f.samples}
    assert samples["seesr_jobs_total", DONE] == 3 and samples["seesr_key_jobs_total", "ann", FAILED] == 1
    assert samples["seesr_key_megapixels_total", "ann"] == 6 and samples["seesr_retries_total",] == 3
    assert samples["seesr_tiles_total",] == 18
    buckets = [samples["seesr_queue_seconds_bucket", bound] for bound in ("0.05", "0.1", "1800.0", "+Inf")]
    assert buckets == [1, 2, 2, 3] and samples["seesr_job_seconds_sum",] == pytest.approx(2 * 7200.11)


def test_names_of_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_counts, "MAX_KEYS", 2)
    counts = JobCounts()
    for owner in ("a", "b", "c", "d", "a"):
        counts.add(ended_job(owner))
    samples = {name: value for name, value in counts.snapshot()[0].items() if name[0] == "key_jobs"}
    assert samples == {("key_jobs", "a", DONE): 2, ("key_jobs", "b", DONE): 1, ("key_jobs", "(other)", DONE): 2}


class Nvml:
    """Stands in for NVML: one GPU, with or without utilization."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, utilization: int | None) -> None:
        import pynvml

        class Found:
            used, total, gpu = 3, 8, utilization

        def rates(handle: object) -> Any:
            if utilization is None:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return Found

        self.opened: list[object] = []
        monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
        for name in ("nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"):
            monkeypatch.setattr(pynvml, name, self.opened.append)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: Found)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", rates)


@pytest.mark.parametrize(
    ("visible", "index", "opened"),
    [(None, 1, [1]), ("2,3", 1, [3]), ("GPU-a", 0, ["GPU-a"]), ("2", 1, []), ("", 0, []), ("-1", 0, [])],
)
def test_the_gpu_is_the_one_that_cuda_sees(
    visible: str | None, index: int, opened: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    nvml = Nvml(monkeypatch, 40)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.gpu_usage(index) == ({"used": 3, "total": 8, "utilization": 0.4} if opened else None)
    assert nvml.opened == opened


def test_gpu_metrics_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with serving(tmp_path) as client:
        assert 'worker="local"' not in scrape(client, {})
        (engine,) = client.app.state.service.jobs.engines.loaded.values()  # type: ignore[attr-defined]
        monkeypatch.setattr(engine, "about", lambda: {"device_index": 0})
        Nvml(monkeypatch, 40)
        samples = values(scrape(client, {}))
        assert samples["seesr_gpu_memory_bytes", "used", "local"] == 3
        assert samples["seesr_gpu_utilization_ratio", "local"] == 0.4
        Nvml(monkeypatch, None)
        samples = values(scrape(client, {}))
        assert samples["seesr_gpu_memory_bytes", "total", "local"] == 8
        assert ("seesr_gpu_utilization_ratio", "local") not in samples
        monkeypatch.setattr(health, "gpu_usage", lambda index: None)
        assert ("seesr_gpu_memory_bytes", "used", "local") not in values(scrape(client, {}))
