"""Container files, systemd units, the endpoint script, costs, and the preflight check."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from huggingface_hub import HfApi
from serving import sharp

from lab.report import ROOT
from scripts import cost, endpoint
from seesr.cli import commands
from seesr.config import Configuration, variable
from seesr.engine import preflight
from seesr.engine.preflight import CannotServe, Machine
from seesr.networks import weights

VARIABLES = {variable(name) for name in Configuration.model_fields}


def serves(command: list[str]) -> None:
    """The command line understands this command."""
    assert command[0].endswith("seesr")
    assert commands.parser().parse_args(command[1:]).command == command[1]


def test_the_dockerfile_says_what_the_project_has() -> None:
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    command = json.loads(next(rest for name, rest in steps if name == "CMD"))
    serves(command)
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources)
    values = dict(part.split("=", 1) for name, rest in steps if name == "ENV" for part in rest.split())
    assert {name for name in values if name.startswith("SEESR_")} <= VARIABLES
    port = command[command.index("--port") + 1]
    assert ["EXPOSE", port] in steps and any(name == "HEALTHCHECK" and f":{port}/ready" in rest for name, rest in steps)
    assert ["USER", "seesr"] in steps
    cuda = next(rest for name, rest in steps if name == "FROM")
    assert yaml.safe_load((ROOT / "cog.yaml").read_text())["build"]["cuda"] in cuda
    extras = re.search(r'"\.\[(\w+)\]"', (ROOT / "deploy/Dockerfile").read_text())
    assert extras and f"\n{extras[1]} = [" in (ROOT / "pyproject.toml").read_text()


def test_the_compose_file_fits_the_dockerfile() -> None:
    service = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]["seesr"]
    assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).resolve().exists()
    assert set(service["environment"]) <= VARIABLES and service["ports"] == ["5000:5000"]
    assert service["read_only"] and service["tmpfs"] == ["/tmp"]
    mounts = dict(volume.split(":")[:2] for volume in service["volumes"])
    assert mounts["data"] == "/data" and mounts["../weights/full"] == "/weights"


UNITS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "deploy").rglob("*.service"))


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_units_use_existing_commands_and_variables(unit: str) -> None:
    text = (ROOT / unit).read_text()
    serves(re.search(r"^ExecStart=(.*)$", text, re.M)[1].split())  # type: ignore[index]
    names = re.findall(r"(SEESR_\w+)=", text)
    assert set(names) <= VARIABLES and "RestartPreventExitStatus=2" in text


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None and "CI" not in os.environ,
    reason="systemd-analyze: apt-get install systemd",
)
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_analyze_accepts_the_units(unit: str) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(ROOT / unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "is not executable" not in line and "seesr" in line]
    assert not complaints, complaints


class Platform(ThreadingHTTPServer):
    """Stands in for the endpoints' API; keeps what it was asked."""

    COMPUTES = (("cpu", "intel-xeon", "x2", None, 0.07, "available"), ("gpu", "nvidia-t4", "x1", 14, 0.5, "available"),
                ("gpu", "nvidia-small", "x1", 6, 0.3, "available"), ("gpu", "nvidia-l4", "x1", 24, 0.8, "available"),
                ("gpu", "nvidia-h200", "x1", 141, 5.0, "not_available"))  # fmt: skip

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        super().__init__(("127.0.0.1", 0), Answer)

    def computes(self) -> list[dict[str, Any]]:
        return [
            {"id": kind, "accelerator": accelerator, "instanceType": kind, "instanceSize": size, "architecture": kind,
             "numAccelerators": 1, "memoryGb": 16, "gpuMemoryGb": memory, "pricePerHour": price, "status": status,
             "quota": {"maxAccelerators": 4, "usedAccelerators": 0}}
            for accelerator, kind, size, memory, price, status in self.COMPUTES
        ]  # fmt: skip


class Answer(BaseHTTPRequestHandler):
    server: Platform

    def answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.requests.append((self.command, self.path, body))
        results: Any = {}
        if "/provider/" in self.path:
            results = {
                "vendors": [{"name": "aws", "regions": [{"name": "us-east-1", "computes": self.server.computes()}]}]
            }
        elif self.command in ("POST", "PUT"):
            state = {"state": "pending", "createdAt": "2026-01-01T00:00:00Z", "updatedAt": "2026-01-01T00:00:00Z"}
            model = {"repository": "you/seesr", "framework": "custom", "revision": "0" * 40, "task": "custom"}
            results = {
                "name": "seesr",
                "model": model,
                "status": state,
                "type": "authenticated",
                "healthRoute": "/health",
            }
        data = json.dumps(results).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    with Platform() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v2"
        monkeypatch.setattr(huggingface_hub.constants, "INFERENCE_ENDPOINTS_ENDPOINT", url)
        monkeypatch.setattr(endpoint, "HfApi", lambda: HfApi(token="hf_" + "x" * 30))
        yield server
        server.shutdown()


CREATE = ["create", "--name", "seesr", "--namespace", "you", "--repository", "you/seesr", "--revision", "a" * 40]


def test_the_endpoint_that_is_created(platform: Platform, capsys: pytest.CaptureFixture[str]) -> None:
    assert endpoint.main(CREATE) == 0
    captured = capsys.readouterr()
    assert "at most 584 US$ a month" in captured.err
    method, path, body = platform.requests[-1]
    assert (method, path) == ("POST", "/v2/endpoint/you")
    assert body["compute"]["scaling"] == {"minReplica": 0, "maxReplica": 1, "scaleToZeroTimeout": 15}
    assert body["compute"]["instanceType"] == "nvidia-l4" and body["model"]["revision"] == "a" * 40
    assert body["type"] == "authenticated" and body["provider"] == {"vendor": "aws", "region": "us-east-1"}


def test_a_dry_run_sends_nothing_and_needs_no_token(
    platform: Platform, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "HfApi", lambda: HfApi(token=False))
    assert endpoint.main([*CREATE, "--dry-run"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["min_replica"] == 0 and expected["revision"] == "a" * 40 and expected["verb"] == "create"
    without_namespace = [word for word in CREATE if word not in ("--namespace", "you")]
    assert endpoint.main([*without_namespace, "--dry-run"]) == 0
    assert endpoint.main(["delete", "--name", "seesr", "--dry-run"]) == 0
    assert platform.requests == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["--instance-type", "intel-xeon", "--instance-size", "x2"],
            "is a CPU; the smallest that fits is nvidia-t4 x1",
        ),
        (["--instance-type", "nvidia-small"], "has 6 GB; 8 are needed; the smallest that fits is nvidia-t4 x1"),
        (["--instance-type", "nvidia-h200"], "not available"),
        (["--instance-type", "nvidia-x"], "there is no instance nvidia-x x1"),
        (["--revision", "main"], "40 digits of a commit"),
    ],
)
def test_endpoint_refuses_unsuitable_hardware(
    platform: Platform, changes: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert endpoint.main([*CREATE, *changes]) == 2
    assert message in capsys.readouterr().err
    assert all(method == "GET" for method, _, _ in platform.requests)


def test_an_endpoint_is_changed_paused_and_deleted(platform: Platform) -> None:
    assert endpoint.main(["update", *CREATE[1:], "--idle", "30"]) == 0
    assert endpoint.main(["pause", "--name", "seesr", "--namespace", "you"]) == 0
    assert endpoint.main(["delete", "--name", "seesr", "--namespace", "you"]) == 0
    changes = [(method, path) for method, path, _ in platform.requests if method != "GET"]
    base = "/v2/endpoint/you/seesr"
    assert changes == [("PUT", base), ("POST", f"{base}/pause"), ("DELETE", base)]


def test_a_missing_token_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(endpoint, "HfApi", lambda: HfApi(token=False))
    monkeypatch.setattr(huggingface_hub.constants, "INFERENCE_ENDPOINTS_ENDPOINT", "http://127.0.0.1:9/v2")
    assert endpoint.main(CREATE) == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1 and "Traceback" not in output


@pytest.mark.slow
def test_the_dockerfiles_install_steps_work(tmp_path: Path) -> None:
    """In a fresh environment, without Docker: what it copies, what it installs, what it starts."""
    lines = (ROOT / "deploy/Dockerfile").read_text().splitlines()
    app, venv = tmp_path / "app", tmp_path / "venv"
    app.mkdir()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, app / source)
        elif line.startswith("RUN"):
            for step in line.removeprefix("RUN ").split(" && "):
                if step.startswith(("python3 -m venv", "/venv/bin/pip")):
                    command = step.replace("/venv", str(venv)).replace('"', "").split()
                    subprocess.run(command, cwd=app, check=True, capture_output=True)
    environment = {
        "PATH": f"{venv}/bin",
        "SEESR_WEIGHTS": str(weights.POCKET),
        "SEESR_DEVICE": "cpu",
        "HOME": str(tmp_path),
    }
    done = subprocess.run([venv / "bin/seesr", "info"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["bundle"]["name"] == "pocket", done.stderr
    help_of = subprocess.run([venv / "bin/seesr", "serve", "--help"], env=environment, capture_output=True, text=True)
    page = next(venv.rglob("seesr/serving/page/index.html"))
    assert help_of.returncode == 0 and page.stat().st_size > 500


def simulated(offer: cost.Offer, seconds: float, per_hour: float, images: int = 60_000) -> float:
    """US$ per image, arrival by arrival."""
    chance, now, end, billed = random.Random(1), 0.0, float("-inf"), 0.0
    for _ in range(images):
        now += chance.expovariate(per_hour / 3600)
        if now > end + offer.idle:  # it was given back: a cold start
            billed += (offer.idle if end > float("-inf") else 0) + offer.cold + seconds
            end = now + offer.cold + seconds
        else:
            begin = max(now, end)
            billed += begin - end + seconds
            end = begin + seconds
    return offer.rate * (billed + offer.idle) / images


@pytest.mark.parametrize("per_hour", [1, 30, 300])
@pytest.mark.parametrize("offer", [cost.Offer(0.001, 60, 20), cost.Offer(0.0005, 5, 40), cost.Offer(0.0005, 900, 120)])
def test_the_formula_agrees_with_a_simulation(offer: cost.Offer, per_hour: float) -> None:
    assert cost.on_demand(offer, 2.0, per_hour) == pytest.approx(simulated(offer, 2.0, per_hour), rel=0.03)


def test_limits_of_the_formula() -> None:
    offer = cost.Offer(0.001, 60, 20)
    assert cost.on_demand(offer, 2.0, 0.001) == pytest.approx(0.001 * (2 + 60 + 20), rel=0.01)
    assert cost.on_demand(offer, 2.0, 1799) == pytest.approx(0.001 * 3600 / 1799, rel=0.02)
    assert cost.on_demand(offer, 2.0, 1801) is None and cost.always_on(0.001, 2.0, 1801) is None
    even = cost.break_even(offer, 2.0, 0.0008)
    assert even and cost.always_on(0.0008, 2.0, even) == pytest.approx(cost.on_demand(offer, 2.0, even), rel=0.01)
    assert cost.break_even(offer, 2.0, offer.rate) is None


def test_costs_come_from_files_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"size": 512, "steps": 2, "particles": 1, "weights": "full", "device": "NVIDIA L40S", "seconds_total": 0.5,
           "setup_seconds": {"load": 10}}  # fmt: skip
    (tmp_path / "l40s.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--size", "512", "--per-hour", "1", "10", "--results", str(tmp_path)]
    assert cost.main(arguments) == 0
    first = capsys.readouterr().out
    assert "Replicate L40S" in first and "T4" not in first and "(old price)" in first
    prices = tmp_path / "prices.toml"
    prices.write_text((ROOT / "scripts/prices.toml").read_text().replace("usd = 1.95", "usd = 3.90"))
    assert cost.main([*arguments, "--prices", str(prices)]) == 0
    second = capsys.readouterr().out
    changed = [a for a, b in zip(first.splitlines(), second.splitlines(), strict=True) if a != b]
    assert len(changed) == 1 and "Modal" in changed[0]
    assert cost.main([*arguments, "--device", "T4"]) == 2
    assert "T4 has not been measured at 512 px" in capsys.readouterr().err
    assert cost.main(["--size", "2048", "--per-hour", "1", "--goals", "--results", str(tmp_path)]) == 0
    assert "T4 (goal)" in capsys.readouterr().out


FULL = 4_500_000_000


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (Machine("cpu", None, None, 64 * 10**9, False), "no GPU is visible; set SEESR_DEVICE=cpu to run on the CPU"),
        (Machine("cpu", None, None, 8 * 10**9, True), "11.0 GB of memory are needed on the CPU"),
        (Machine("K80", (3, 7), 11 * 10**9, 64 * 10**9, False), "K80 has compute capability 3.7; 7.0 is needed"),
        (Machine("T4", (7, 5), 4 * 10**9, 64 * 10**9, False), "T4 has 4.0 GB free; 5.5 are needed"),
    ],
)
def test_preflight_refuses_unsuitable_hardware(seen: Machine, message: str) -> None:
    with pytest.raises(CannotServe, match=message):
        preflight.check(seen, "full", FULL)
    if seen.capability is None:
        preflight.check(seen, "pocket", 17_000_000)


def test_preflight_accepts_suitable_hardware(caplog: pytest.LogCaptureFixture) -> None:
    preflight.check(Machine("T4", (7, 5), 15 * 10**9, 16 * 10**9, False), "full", FULL)
    assert not caplog.records
    preflight.check(Machine("cpu", None, None, 64 * 10**9, True), "full", FULL)
    assert "on the CPU an image takes minutes" in caplog.text


def test_the_command_line_says_so_with_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(weights.POCKET, tmp_path / "b")
    manifest = tmp_path / "b/bundle.json"
    manifest.write_text(manifest.read_text().replace('"kind": "pocket"', '"kind": "full"'))
    monkeypatch.setattr(preflight, "look", lambda device: Machine("cpu", None, None, 64 * 10**9, False))
    (tmp_path / "a.png").write_bytes(sharp())
    command = ["upscale", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--bundle", str(tmp_path / "b")]
    assert commands.main(command) == 3
    assert capsys.readouterr().err.startswith("no GPU is visible")
