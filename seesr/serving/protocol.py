"""A uvicorn protocol with limits on header time and open connections."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from seesr.serving.middleware import answer

HEADER_SECONDS = 10.0  # that the header of a request may take to arrive
MAX_CONNECTIONS = 2000
BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 5\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%s"
)
log = logging.getLogger(__name__)


def max_connections() -> int:
    """Half of the files that this process may open, at most MAX_CONNECTIONS; images and the journal need the rest."""
    return max(8, min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


class LimitedProtocol(H11Protocol):
    """One connection. uvicorn itself closes one that sends nothing after a response, and headers over 64 KiB."""

    header_timer: asyncio.TimerHandle | None = None

    @property
    def idle(self) -> bool:
        """Whether no request is being answered: none has come yet, or its header is incomplete."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: Any) -> None:
        """Makes room by closing the oldest idle connection; where none is idle, refuses the new one."""
        super().connection_made(transport)
        self.opened = self.loop.time()
        if len(self.connections) > max_connections():
            idle = [
                other
                for other in self.connections
                if isinstance(other, LimitedProtocol) and other.idle and other is not self
            ]
            if not idle:
                log.warning("connection refused: all %d are in use", len(self.connections) - 1)
                body = answer("unavailable", "all connections of the server are in use; try again later").body
                transport.write(BUSY % (len(body), body))
                transport.close()
                return
            min(idle, key=lambda connection: connection.opened).transport.abort()
        self.header_timer = self.loop.call_later(HEADER_SECONDS, self.drop)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.idle:
            self.stop_timer()
        elif self.header_timer is None and not self.transport.is_closing():  # the begin of another request's header
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.drop)

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
        super().connection_lost(exc)

    def stop_timer(self) -> None:
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def drop(self) -> None:
        self.header_timer = None
        if self.idle:
            self.transport.abort()
