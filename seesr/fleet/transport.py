"""kombu's Redis transport, which a message that is none of its own does not stop."""

from __future__ import annotations

import logging
from queue import Empty
from typing import Any

from kombu.transport import redis

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
    Channel = Channel
