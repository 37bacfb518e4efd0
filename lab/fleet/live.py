"""Measures /live of gateways from a separate process, so that the clients' work does not delay it."""

from __future__ import annotations

import contextlib
import http.client
import multiprocessing
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

from lab.fleet.servers import Fleet

PAUSE = 0.05  # seconds between two requests


def ask(channel: Connection) -> None:
    """Asks until it gets None, on fresh connections; a list of addresses replaces those that it asks."""
    addresses: list[str] = []
    seconds: list[float] = []
    while True:
        if channel.poll(PAUSE):
            message = channel.recv()
            if message is None:
                channel.send(seconds)
                return
            addresses = message
        for address in addresses:
            url, started = urlsplit(address), time.perf_counter()
            with contextlib.suppress(OSError, http.client.HTTPException):  # it was stopped meanwhile
                connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
                connection.request("GET", "/live")
                connection.getresponse().read()
                connection.close()
                seconds.append(time.perf_counter() - started)


class LiveWatch:
    """Asks /live of every gateway of a fleet 20 times a second."""

    def __init__(self, cluster: Fleet) -> None:
        self.fleet, self.stopped, self.seconds = cluster, threading.Event(), list[float]()
        spawn = multiprocessing.get_context("spawn")
        self.channel, other = spawn.Pipe()
        self.process = spawn.Process(target=ask, args=(other,), daemon=True)
        self.process.start()
        self.thread = threading.Thread(target=self.follow)
        self.thread.start()

    def follow(self) -> None:
        """Tells the process which gateways there are."""
        known: list[str] = []
        while not self.stopped.wait(PAUSE):
            if known != (now := list(self.fleet.addresses.values())):
                self.channel.send(known := now)

    def stop(self) -> list[float]:
        """Ends it; the seconds that each answer took."""
        if not self.stopped.is_set():
            self.stopped.set()
            self.thread.join()
            self.channel.send(None)
            self.seconds = self.channel.recv()
            self.process.join()
        return self.seconds


@contextlib.contextmanager
def watched(cluster: Fleet) -> Iterator[LiveWatch]:
    """A watch that ends with the block at the latest."""
    watch = LiveWatch(cluster)
    try:
        yield watch
    finally:
        watch.stop()
