"""A single worker thread for all predictions.

OpenMP, oneDNN, cuDNN, cuBLAS and the allocator keep threads, handles and memory for every thread that calls them. In
a pool, each thread would pay for them again in its first prediction.
"""

from __future__ import annotations

import contextvars
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")
POLL = 0.05  # seconds; an exception sent to a waiting thread arrives when its wait ends


class WorkerThread:
    """Runs calls one at a time on the same thread, which is replaced only after a cancellation."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.pool = ThreadPoolExecutor(1, "seesr")
        self.ident = self.pool.submit(threading.get_ident).result()

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, in the caller's context.

        An exception that is sent to the caller while it waits, such as Cog's CancelationException, is passed on to the
        work, and raised once that has ended.
        """
        future = self.pool.submit(contextvars.copy_context().run, work)
        try:
            while not future.done():
                wait([future], POLL)
        except BaseException as error:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self.ident), ctypes.py_object(type(error)))
            self.pool.shutdown()  # it may arrive after the work: this thread is not used again
            self._start()
            raise
        return future.result()
