"""Background threads and tasks: restarts, pauses, and what a server says of them."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from seesr.serving import supervisor
from seesr.serving.supervisor import FIRST_PAUSE, LONGEST_PAUSE, RECOVERED_AFTER, BackgroundTask, Supervisor, guarded


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: self.now))

    def fail(self, task: BackgroundTask, error: Exception | None = None) -> float:
        """The pause after a failure."""
        with guarded("x", task):
            raise error or ValueError
        return task.pause


def test_pauses_double_until_a_task_has_run_for_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, task = Clock(monkeypatch), BackgroundTask()
    assert [clock.fail(task) for _ in range(12)] == [min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(12)]
    clock.now += RECOVERED_AFTER - 0.5
    assert clock.fail(task) == LONGEST_PAUSE
    clock.now += RECOVERED_AFTER
    assert clock.fail(task) == FIRST_PAUSE and task.failures == 14
    assert 0 < FIRST_PAUSE <= 1 and FIRST_PAUSE < LONGEST_PAUSE <= RECOVERED_AFTER, "a pause is no recovery"


def test_a_task_is_down_until_it_has_run_as_long_as_it_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, tasks = Clock(monkeypatch), Supervisor()
    task, other = BackgroundTask(), BackgroundTask()
    tasks.tasks = {"first": task, "second": other}
    assert not task.down and tasks.down() is None
    pause = clock.fail(task, LookupError("x"))
    clock.now += 2 * pause - 0.01
    assert task.down and tasks.down() == (
        "background task first (LookupError) failed and will be restarted; the log has the traceback"
    )
    clock.fail(other)
    assert "task first (LookupError), second (ValueError) failed" in (tasks.down() or "")
    clock.now += 0.02
    assert not task.down and other.down


def test_the_cause_of_a_group_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, task = Clock(monkeypatch), BackgroundTask()
    clock.fail(task, ExceptionGroup("a", [ExceptionGroup("b", [KeyError("x"), ValueError()]), OSError()]))
    assert task.error == "KeyError"


def test_a_thread_runs_again_after_an_error_and_ends_when_its_work_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.001)
    tasks, runs = Supervisor(), list[int]()

    def work() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError

    thread = tasks.thread("x", work)
    thread.join(5)
    assert not thread.is_alive() and thread.daemon and len(runs) == 3 and tasks.tasks["x"].failures == 2
    again = tasks.thread("x", work)
    again.join(5)
    assert tasks.tasks["x"].failures == 2 and len(runs) == 4, "one task of a name"


def test_a_thread_is_not_started_again_at_the_end() -> None:
    tasks, runs = Supervisor(), list[int]()

    def work() -> None:
        runs.append(1)
        tasks.stop()
        raise ValueError

    thread = tasks.thread("x", work)
    thread.join(5)
    assert not thread.is_alive() and len(runs) == 1
    later = tasks.thread("y", lambda: runs.append(2))
    later.join(5)
    assert runs == [1] and isinstance(tasks.stopping, threading.Event)


def test_a_task_of_the_event_loop_runs_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE", 0.001)
    tasks, runs = Supervisor(), list[int]()

    async def work() -> None:
        runs.append(1)
        if len(runs) < 3:
            raise ValueError

    started = time.monotonic()
    asyncio.run(tasks.run("x", work))
    assert len(runs) == 3 and tasks.tasks["x"].failures == 2 and time.monotonic() - started < 5
