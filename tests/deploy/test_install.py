"""scripts/install below a folder in place of /, and the commands of docs/operations.md on what it installed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from serving import sharp

from lab.report import ROOT

SOME_SECONDS = {"num_inference_steps": 4, "scale_factor": 8, "wait": 0}
WORKER = ROOT / "deploy/fleet/seesr-worker@.service"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The accounts of a bare system."""
    (tmp_path / "etc").mkdir()
    for name in ("passwd", "group", "shadow", "gshadow"):
        (tmp_path / "etc" / name).touch()
    return tmp_path


def install(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "scripts/install", *arguments, "--root", root]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_dry_run_shows_every_command_and_changes_nothing(root: Path) -> None:
    before = files(root)
    done = install(root, "--service", "--dry-run")
    assert done.returncode == 0 and files(root) == before
    commands = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert {"useradd", "mkdir", "python3", "install", "ln", "systemctl"} <= set(commands)
    assert "SEESR_API_KEYS" not in done.stdout
    done = install(root, "--uninstall", "--dry-run")
    assert done.returncode == 0 and files(root) == before


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--service", "--force"]], ids=str)
def test_other_arguments_show_the_usage(root: Path, arguments: list[str]) -> None:
    done = install(root, *arguments)
    assert done.returncode == 2 and done.stderr.count("sudo ./scripts/install") == 2


class Service:
    """The installed unit, started as systemd would start it, but as this user and on a free port."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        unit = (self.root / "etc/systemd/system/seesr.service").read_text()
        lines = [line for kind in re.findall(r"^Environment=(.*)$", unit, re.M) for line in kind.split()]
        lines += (self.root / "etc/seesr.env").read_text().split()
        values = dict(line.split("=", 1) for line in lines)
        self.token = values["SEESR_API_KEYS"].partition(":")[2]
        environment = {name: value.replace("/opt/", f"{self.root}/opt/").replace("/var/", f"{self.root}/var/")
                       for name, value in values.items()}  # fmt: skip
        environment |= {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": os.environ["PATH"]}  # libraries
        command = re.search(r"^ExecStart=(.*)$", unit, re.M)[1].replace("/opt/", f"{self.root}/opt/").split()  # type: ignore[index]
        command[command.index("--port") + 1] = "0"
        self.process = subprocess.Popen(command, cwd=self.root / "opt/seesr", env=environment, text=True,
                                        stdout=subprocess.PIPE, stderr=(self.root / "log").open("a"))  # fmt: skip
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line.startswith("seesr at "), (self.root / "log").read_text()
        self.url = f"http://127.0.0.1:{line.split()[-1].rstrip('/').rpartition(':')[2]}"
        end = time.monotonic() + 120
        while requests.get(f"{self.url}/ready", timeout=10).status_code != 200:
            assert time.monotonic() < end and self.process.poll() is None, (self.root / "log").read_text()
            time.sleep(0.1)

    def stop(self) -> None:
        assert self.process and self.process.stdout
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0
        self.process.stdout.close()

    def ask(self, method: str, path: str, **options: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "image/png"}
        answer = requests.request(method, self.url + path, headers=headers, timeout=60, **options)
        assert answer.ok, answer.text
        return answer.json()

    def until_done(self, id: str) -> dict[str, Any]:
        end = time.monotonic() + 120
        while (job := self.ask("GET", f"/jobs/{id}"))["status"] not in ("succeeded", "failed", "canceled"):
            assert time.monotonic() < end, job
            time.sleep(0.1)
        return job

    def run(self, heading: str, number: int) -> None:
        """Runs a block of docs/operations.md below `root`, without sudo."""
        section = (ROOT / "docs/operations.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
        for line in re.findall(r"^```\n(.*?)^```", section, re.S | re.M)[number].splitlines():
            parts = shlex.split(line, posix=False)
            assert parts.pop(0) == "sudo"
            if parts[0] == "systemctl":
                getattr(self, parts[1])()
                continue
            command = re.sub(r"(?<![\w.])(/(?:opt|etc|var)/)", rf"{self.root}\1", " ".join(parts))
            command = command.replace("chown -R seesr:", f"chown -R {os.getuid()}")  # no such user on this machine
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            assert done.returncode == 0 and not done.stderr, (command, done.stderr)


@pytest.mark.long
@pytest.mark.skipif(
    shutil.which("sqlite3") is None and "CI" not in os.environ, reason="sqlite3: apt-get install sqlite3"
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_install_back_up_restore_upgrade_and_uninstall(root: Path) -> None:
    done = install(root, "--service", PIP_NO_DEPS="1")  # pip leaves out the libraries, which take 7 GB
    assert done.returncode == 0, done.stderr
    assert re.search(r"^seesr:x:\d+:\d+::/var/lib/seesr:/usr/sbin/nologin$", (root / "etc/passwd").read_text(), re.M)
    keys = root / "etc/seesr.env"
    assert keys.stat().st_mode & 0o777 == 0o600 and re.fullmatch(r"SEESR_API_KEYS=me:[0-9a-f]{32}\n", keys.read_text())
    key = keys.read_text()
    assert (root / "etc/systemd/system/multi-user.target.wants/seesr.service").is_symlink()
    assert (root / "etc/systemd/system/seesr-worker@.service").read_text() == WORKER.read_text()
    (root / "var/lib/seesr").mkdir(parents=True)  # systemd's StateDirectory
    (root / "var/backups").mkdir()

    service = Service(root)
    service.start()
    try:
        first = service.ask("POST", "/upscale", params={"num_inference_steps": 1, "wait": 0, "seed": 1}, data=sharp())[
            "id"
        ]
        result = requests.get(service.until_done(first)["result"], timeout=60).content
        waiting = [service.ask("POST", "/upscale", params=SOME_SECONDS, data=sharp())["id"] for _ in range(3)]
        service.run("Back up and restore", 0)
        keys.unlink()
        lost = service.ask("POST", "/upscale", params=SOME_SECONDS, data=sharp())["id"]
        link = service.ask("GET", f"/jobs/{first}")["result"].removeprefix(service.url)
        service.run("Back up and restore", 1)
        assert keys.read_text() == key
        assert [service.until_done(id)["status"] for id in waiting] == ["succeeded"] * 3
        assert requests.get(service.url + link, timeout=60).content == result  # signed before, by the same secret
        headers = {"Authorization": f"Bearer {service.token}"}
        assert requests.get(f"{service.url}/jobs/{lost}", headers=headers, timeout=60).status_code == 404

        for _ in range(2):
            time.sleep(1.1)  # releases are named by the second
            done = install(root, "--service", PIP_NO_DEPS="1")
            assert done.returncode == 0, done.stderr
        assert len(list((root / "opt/seesr/releases").iterdir())) == 2 and keys.read_text() == key
        service.stop()
        service.start()
        assert service.until_done(first)["status"] == "succeeded"
    finally:
        service.stop()

    assert install(root, "--uninstall").returncode == 0
    assert not list((root / "opt/seesr").iterdir()) and not list((root / "etc/systemd/system").rglob("seesr*"))
    assert keys.exists() and (root / "var/lib/seesr/jobs.sqlite").exists()
