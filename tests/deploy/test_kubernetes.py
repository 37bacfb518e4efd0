"""The Kubernetes manifests: valid by schema, and every name in them exists in the project."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from monitoring import documented_metrics

from lab.report import ROOT
from seesr.cli import commands
from seesr.config import Configuration, variable

FOLDERS = [ROOT / "deploy/kubernetes/server", ROOT / "deploy/kubernetes/fleet"]
VARIABLES = {variable(name) for name in Configuration.model_fields}
OTHERS = {"REDIS_PASSWORD", "POD_NAME"}


def documents(folder: Path) -> list[dict[str, Any]]:
    names = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return [result for name in names for result in yaml.safe_load_all((folder / name).read_text())]


def pods(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    return [
        (d["metadata"]["name"], d["spec"]["template"]["spec"]) for d in documents(folder) if "template" in d["spec"]
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_manifest_fits_its_schema(folder: Path) -> None:
    for document in documents(folder):
        if document["kind"] != "ScaledObject":  # KEDA's own kind, which the schemas of Kubernetes do not have
            kubernetes_validate.validate(document, "1.34", strict=True)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_pods_are_locked_down_and_name_what_exists(folder: Path) -> None:
    for name, pod in pods(folder):
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"], name
        (container,) = pod["containers"]
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"], name
        assert context["capabilities"] == {"drop": ["ALL"]} and container["resources"]["limits"]["memory"], name
        values = {entry["name"] for entry in container["env"]}
        assert values <= VARIABLES | OTHERS, values - VARIABLES
        mounts = {mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}  # a StatefulSet's comes from its template
        assert mounts <= volumes, name
        if container["image"] != "seesr":
            continue
        parts = container["command"]
        assert commands.parser().parse_args(parts[1:]).command == parts[1]
        if parts[1] == "serve":
            port = int(parts[parts.index("--port") + 1])
            assert [entry["containerPort"] for entry in container["ports"]] == [port]
            assert container["livenessProbe"]["httpGet"]["path"] == "/live"
            assert container["readinessProbe"]["httpGet"]["path"] in ("/live", "/ready")


def test_grace_periods_let_a_running_image_finish() -> None:
    """As long as docker compose and systemd allow: 35 minutes for whoever computes."""
    periods = {name: pod.get("terminationGracePeriodSeconds", 30) for folder in FOLDERS for name, pod in pods(folder)}
    assert periods["seesr"] == periods["seesr-worker"] == 35 * 60


def test_the_scaling_rule_asks_for_metrics_that_the_gateway_has() -> None:
    scaled = next(d for d in documents(FOLDERS[1]) if d["kind"] == "ScaledObject")
    assert scaled["spec"]["minReplicaCount"] == 0
    documented = {name for name, where in documented_metrics().items() if "fleet" in where}
    assert set(re.findall(r"seesr_\w+", scaled["spec"]["triggers"][0]["metadata"]["query"])) <= documented


def test_redis_has_the_settings_of_the_other_deployments() -> None:
    here, there = (ROOT / path for path in ("deploy/kubernetes/fleet/redis.conf", "deploy/fleet/redis.conf"))
    assert here.read_text() == there.read_text()
