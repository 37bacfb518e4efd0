"""WorkerThread: all calls on the same thread; errors and cancellation reach the caller."""

from __future__ import annotations

import contextvars
import ctypes
import threading
import time
from concurrent.futures import Future

import pytest

from seesr.engine import worker_thread
from seesr.engine.worker_thread import WorkerThread

name: contextvars.ContextVar[str] = contextvars.ContextVar("name")


class Cancelled(BaseException):
    """As Cog's CancelationException: no Exception."""


def test_all_work_is_done_by_one_thread_that_is_not_the_callers() -> None:
    thread = WorkerThread()
    results = [thread.run(threading.get_ident) for _ in range(3)]
    caller = threading.Thread(target=lambda: results.append(thread.run(threading.get_ident)))
    caller.start()
    caller.join()
    assert len(results) == 4 and set(results) == {thread.ident} != {threading.get_ident()}


def test_work_sees_the_context_of_its_caller() -> None:
    name.set("mine")
    assert WorkerThread().run(name.get) == "mine"


def test_errors_reach_the_caller_and_the_thread_goes_on() -> None:
    thread = WorkerThread()
    before = thread.ident
    for error in (ValueError, SystemExit):

        def fail(error: type[BaseException] = error) -> None:
            raise error("one line")

        with pytest.raises(error, match="one line"):
            thread.run(fail)
    assert thread.run(threading.get_ident) == before


def test_callers_at_the_same_time_share_the_thread() -> None:
    thread, together, results = WorkerThread(), threading.Barrier(2), list[int]()

    def call() -> None:
        together.wait(5)
        results.append(thread.run(lambda: time.sleep(0.05) or threading.get_ident()))

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(5)
    assert results == [thread.ident] * 2


def test_a_caller_that_waits_notices_an_exception_within_a_tenth_of_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    def wait(futures: list[Future[object]], seconds: float) -> None:
        waits.append(seconds)
        futures[0].result(5)

    monkeypatch.setattr(worker_thread, "wait", wait)
    assert WorkerThread().run(lambda: time.sleep(0.05) or 3) == 3
    assert waits and all(0 < seconds <= 0.1 for seconds in waits)


def test_cancelling_the_caller_ends_the_work() -> None:
    thread, steps, outcome = WorkerThread(), [], []
    started = threading.Event()

    def work() -> None:
        started.set()
        while True:
            steps.append(len(steps))
            time.sleep(0.001)

    def call() -> None:
        try:
            thread.run(work)
        except Cancelled as error:
            outcome.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    started.wait()
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(caller.ident), ctypes.py_object(Cancelled))
    caller.join(5)
    assert not caller.is_alive() and len(outcome) == 1
    done = len(steps)
    time.sleep(0.05)
    assert len(steps) == done
    assert thread.run(lambda: 3) == 3
