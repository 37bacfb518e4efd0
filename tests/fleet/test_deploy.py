"""deploy/fleet: every variable and command that it uses exists."""

from __future__ import annotations

from pathlib import Path

import yaml

from seesr.cli.commands import parser
from seesr.config import Configuration, variable

FOLDER = Path("deploy/fleet")
VARIABLES = {variable(name) for name in Configuration.model_fields}


def test_the_compose_file_uses_existing_variables_and_commands() -> None:
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    assert set(services) == {"redis", "gateway", "worker0", "flower"}
    for name in ("gateway", "worker0", "flower"):
        assert set(services[name]["environment"]) <= VARIABLES
    for name in ("gateway", "worker0"):
        command = services[name]["command"]
        assert command[0] == "seesr" and parser().parse_args(command[1:]).command == command[1]
    assert services["worker0"]["stop_grace_period"] == "35m"
    assert services["redis"]["command"][1] == "/redis.conf"


def test_redis_persists_its_data_and_evicts_nothing() -> None:
    options = dict(line.split(" ", 1) for line in (FOLDER / "redis.conf").read_text().splitlines() if line[0] != "#")
    assert options["appendonly"] == "yes" and options["maxmemory-policy"] == "noeviction"
