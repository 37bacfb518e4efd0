"""All that the fleet uses of the inner parts of kombu's Redis transport and of Celery's worker.

`tests/fleet/test_transport.py` fails when a new version of kombu or Celery changes one of them. The names of the keys
are options of the transport, which `broker.py` sets.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from queue import Empty
from typing import Any

from kombu.transport import redis
from redis.exceptions import ReadOnlyError

SEPARATOR = "\x06\x16"  # between a queue's name and a priority
UNACKED = "unacked"  # hash of taken messages by delivery tag
UNACKED_INDEX = "unacked_index"  # their delivery tags, by the time at which each was taken or renewed
log = logging.getLogger(__name__)


class Channel(redis.Channel):
    def _brpop_read(self, **options: Any) -> Any:
        """Drops a malformed message. It is already removed from its list, and kombu would end the worker."""
        try:
            return super()._brpop_read(**options)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("malformed queue message dropped: %s: %s", type(error).__name__, error)
            raise Empty from None


class Transport(redis.Transport):
    """Connects again after a ReadOnlyError; kombu would end the worker."""

    Channel = Channel
    connection_errors = (*redis.Transport.connection_errors, ReadOnlyError)


def list_of(queue: str, priority: int) -> str:
    """The Redis list in which messages of a queue and a priority wait."""
    return f"{queue}{SEPARATOR}{priority}" if priority else queue


def broker_jobs(client: Any, queues: Iterable[str], priorities: Iterable[int]) -> set[str]:
    """Ids of the jobs that the broker has: in a list, or taken and not acknowledged."""
    with client.pipeline(transaction=False) as pipe:
        for queue in queues:
            for priority in priorities:
                pipe.lrange(list_of(queue, priority), 0, -1)
        pipe.hvals(UNACKED)
        messages = [message for batch in pipe.execute() for message in batch]
    return {id for message in messages if (id := job_of(message))}


def job_of(message: str) -> str | None:
    """The job of a message in a list or in UNACKED; None for a malformed message."""
    try:
        body = json.loads(message)
        return (body[0] if isinstance(body, list) else body)["headers"]["id"]  # taken ones are [message, ...]
    except (ValueError, KeyError, TypeError, IndexError):
        return None


def taken_tags() -> list[str]:
    """Delivery tags of the messages that this worker has taken and not acknowledged."""
    from celery.worker import state

    return [request.message.delivery_tag for request in {*state.reserved_requests, *state.active_requests}]
