"""The settings of Celery: each is there because its default loses or repeats jobs (docs/decisions/0011)."""

from __future__ import annotations

import ast
import inspect

import pytest
from celery import Celery

from lab.report import ROOT
from seesr.config import Configuration
from seesr.fleet import broker
from seesr.fleet.broker import LANES, LOADING, application, queue_of, queues_of
from seesr.fleet.redis_client import TIMEOUT
from seesr.fleet.transport import SEPARATOR, UNACKED, UNACKED_INDEX

VERSION, OTHER = "c" * 64, "d" * 64
NAMED = [
    name.strip() for name in (ROOT / "seesr/fleet/broker.py").read_text().split("app.conf.update(")[-1].split("\n")
]
SET = [name.partition("=")[0] for name in NAMED if "=" in name]  # what the application sets


def configured(publishes: bool, lease: int = 60, *versions: str) -> Celery:
    configuration = Configuration(redis="redis://127.0.0.1:1/0", lease=lease)
    return application(configuration, versions or [VERSION], publishes)


def test_every_setting_differs_from_its_default() -> None:
    ours, default = configured(publishes=True).conf, Celery("default").conf
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(application))) if isinstance(node, ast.Call)]
    names = [keyword.arg for call in calls if ast.unparse(call.func) == "app.conf.update" for keyword in call.keywords]
    assert len(names) > 15
    for name in names:
        assert ours[name] != default[name], f"{name} is the default: remove it"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("task_acks_late", True),  # a job whose worker dies goes to another one
        ("task_reject_on_worker_lost", True),
        ("task_acks_on_failure", True),  # a job that failed is not run again
        ("task_acks_on_timeout", True),
        ("task_ignore_result", True),  # the record of the job has the result
        ("worker_concurrency", 1),  # a GPU computes one image
        ("worker_prefetch_multiplier", 1),  # a waiting job stays where every worker can take it
        ("worker_hijack_root_logger", False),
        ("worker_redirect_stdouts", False),
        ("worker_send_task_events", True),  # Flower shows them
        ("task_send_sent_event", True),
        ("broker_connection_max_retries", None),  # a worker waits for Redis
        ("broker_connection_retry_on_startup", True),
    ],
)
def test_settings_that_keep_jobs(name: str, value: object) -> None:
    assert configured(publishes=False).conf[name] == value


def test_the_decision_names_the_time_that_a_child_may_load() -> None:
    assert f"| {LOADING} s |" in next((ROOT / "docs/decisions").glob("0011-*")).read_text()
    assert configured(publishes=False).conf.worker_proc_alive_timeout == LOADING
    assert configured(publishes=False).conf.task_time_limit == broker.LONGEST > LOADING


@pytest.mark.parametrize(("lease", "interval"), [(2, 1), (60, 5), (120, 10)])
def test_lost_jobs_are_looked_for_several_times_in_a_lease(lease: int, interval: int) -> None:
    options = configured(False, lease).conf.broker_transport_options
    assert (options["visibility_timeout"], options["unacked_restore_interval"]) == (lease, interval)
    assert options["sep"] == SEPARATOR and options["socket_keepalive"] is True
    assert (options["unacked_key"], options["unacked_index_key"]) == (UNACKED, UNACKED_INDEX)


def test_a_gateway_does_not_wait_for_a_redis_that_is_away() -> None:
    decision = next((ROOT / "docs/decisions").glob("0011-*")).read_text()
    assert "two seconds, then 503" in decision and TIMEOUT == 2
    worker, gateway = configured(publishes=False).conf, configured(publishes=True).conf
    for name in ("socket_timeout", "socket_connect_timeout"):
        assert gateway.broker_transport_options[name] == TIMEOUT and name not in worker.broker_transport_options
    assert gateway.task_publish_retry is False and worker.task_publish_retry is True


def test_the_workers_of_a_version_have_queues_of_their_own() -> None:
    names = [queue.name for queue in configured(True, 60, VERSION, OTHER).conf.task_queues]
    assert names == [*queues_of(VERSION), *queues_of(OTHER)] and len(set(names)) == 2 * LANES
    assert queue_of(VERSION, 3) == f"seesr-{VERSION[:12]}-3" and queues_of(VERSION)[3] == queue_of(VERSION, 3)
    assert configured(True, 60, VERSION, OTHER).conf.task_default_queue == queue_of(VERSION, 0)
