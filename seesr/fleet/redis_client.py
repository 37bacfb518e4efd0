"""The Redis connection: short timeouts, and a fast error while Redis is unavailable."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import redis
import redis.exceptions
from prometheus_client import Histogram

from seesr.config import REDIS_URL
from seesr.serving.job import Unavailable

TIMEOUT = 2.0  # seconds for an answer; a gateway must say 503 within five
PAUSE = 1.0  # seconds after a failure in which further calls fail at once
MAX_SKEW = 10.0  # seconds between a machine's clock and that of Redis; leases and links compare the two
T = TypeVar("T")
UNAVAILABLE = (
    redis.exceptions.ConnectionError,  # also while it loads its files (LOADING)
    redis.exceptions.TimeoutError,
    redis.exceptions.ReadOnlyError,  # a primary that was demoted
    OSError,
)
log = logging.getLogger(__name__)


class RedisClient:
    """A connection pool. For PAUSE seconds after a failure all calls fail at once, so that callers do not pile up.

    Args:
        url: redis://[:password@]host:port/db, or rediss://.
        retry: wait until Redis answers again, instead of raising; workers do so, to keep their image.
    """

    def __init__(self, url: str, retry: bool = False) -> None:
        self.url, self.retry = url, retry
        options: dict[str, Any] = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
        try:
            self.client: Any = redis.Redis.from_url(url, decode_responses=True, health_check_interval=30, **options)
        except ValueError:  # the error and the URL may contain the password
            raise ValueError(f"SEESR_REDIS is not a valid URL: it must be {REDIS_URL}") from None
        self.retry_at = 0.0
        self.seconds = Histogram("seesr_redis_seconds", "Duration of one Redis call by this gateway", registry=None)

    def __call__(self, work: Callable[[Any], T]) -> T:
        """Returns work(the client).

        Raises:
            Unavailable: Redis does not answer, or is full; never with `retry`.
        """
        while True:
            try:
                return self.once(work)
            except Unavailable:
                if not self.retry:
                    raise
            time.sleep(PAUSE)

    def once(self, work: Callable[[Any], T]) -> T:
        if time.monotonic() < self.retry_at:
            raise Unavailable("the queue is unavailable: Redis does not answer")
        try:
            with self.seconds.time():
                return work(self.client)
        except redis.exceptions.OutOfMemoryError:
            raise Unavailable("the queue is unavailable: Redis has reached its memory limit (maxmemory)") from None
        except UNAVAILABLE as error:
            self.retry_at = time.monotonic() + PAUSE
            log.warning("redis: %s", " ".join(str(error).split()))
            raise Unavailable("the queue is unavailable: Redis does not answer") from None

    def check_at_start(self) -> None:
        """Rejects a machine whose clock differs from that of Redis: leases would end early, and links late.

        Raises:
            ValueError: the clocks differ, or Redis does not answer; one line.
        """
        try:
            seconds, micro = self(lambda client: client.time())
        except Unavailable as error:
            raise ValueError(f"SEESR_REDIS: {error}") from None
        ahead = time.time() - seconds - micro / 1e6
        if abs(ahead) > MAX_SKEW:
            offset = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'}"
            raise ValueError(f"the clock of this machine is {offset} that of Redis: set the time (NTP) first")
