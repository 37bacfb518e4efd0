"""The Celery application over Redis; docs/decisions/0011 gives the reason for each setting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from celery import Celery
from kombu import Queue

from seesr.config import Configuration
from seesr.fleet.redis_client import TIMEOUT
from seesr.fleet.transport import SEPARATOR, UNACKED, UNACKED_INDEX
from seesr.serving.job import LATER, NORMAL, URGENT

TASK = "seesr.upscale"
LONGEST = 3600  # seconds after which a child that hangs is killed; a job's own deadline ends it politely
LOADING = 600  # seconds that a new child may take to load the weights
LANES = 16  # queues of one version; keys beyond that share lanes
PRIORITIES = [URGENT, NORMAL, LATER]


def queue_of(version: str, lane: int) -> str:
    """The queue of one lane. The workers of one bundle and program share it: another version never takes its jobs."""
    return f"seesr-{version[:12]}-{lane}"


def queues_of(version: str) -> list[str]:
    """The queues of every lane. A worker takes from them in turn, so that keys take turns within a priority."""
    return [queue_of(version, lane) for lane in range(LANES)]


def application(configuration: Configuration, versions: Iterable[str], publishes: bool) -> Celery:
    """The same settings on both sides; a gateway also has short timeouts when Redis is unavailable.

    Args:
        versions: whose queues it uses.
    """
    app = Celery("seesr", broker=configuration.redis)
    queues = [queue for version in versions for queue in queues_of(version)]
    options: dict[str, Any] = {
        "visibility_timeout": configuration.lease,
        "unacked_restore_interval": max(1, configuration.lease // 12),
        "unacked_restore_throttle": 1,
        "priority_steps": PRIORITIES,
        "queue_order_strategy": "round_robin",
        "sep": SEPARATOR,
        "unacked_key": UNACKED,
        "unacked_index_key": UNACKED_INDEX,
        "socket_keepalive": True,
    }
    if publishes:
        options |= {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
        app.conf.update(task_publish_retry=False)
    app.conf.update(
        broker_transport="seesr.fleet.transport:Transport",
        task_queues=[Queue(queue) for queue in queues],
        task_default_queue=queues[0],
        task_default_priority=NORMAL,
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_retry_on_worker_lost=True,
        task_acks_on_failure=True,
        task_acks_on_timeout=True,
        task_time_limit=LONGEST,
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_pool_start_method="spawn",
        worker_proc_alive_timeout=LOADING,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=True,
        task_send_sent_event=True,
        broker_connection_max_retries=None,
        broker_connection_retry_on_startup=True,
        broker_transport_options=options,
    )
    return app
