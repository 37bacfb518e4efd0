"""kombu's Redis transport, which neither a foreign message nor a read-only Redis ends."""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from kombu.transport import redis
from redis.exceptions import ReadOnlyError

log = logging.getLogger(__name__)


class Channel(redis.Channel):
    def _brpop_read(self, **options: Any) -> Any:
        """Such a message is taken from its list already; kombu would end the worker over it."""
        try:
            return super()._brpop_read(**options)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("a message that is none of ours was dropped: %s: %s", type(error).__name__, error)
            raise Empty from None


class Transport(redis.Transport):
    """Connects again after a ReadOnlyError; kombu would end the worker over it."""

    Channel = Channel
    connection_errors = (*redis.Transport.connection_errors, ReadOnlyError)
