"""What a running image reports to its job, and what wakes those who wait for it."""

from __future__ import annotations

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from seesr.runtime.progress import Position
from seesr.serving import reporter
from seesr.serving.job import DONE, Job
from seesr.serving.listeners import Listeners
from seesr.serving.reporter import INTERVAL, Canceled, Interrupted, Reporter, progress_line


def test_a_stage_is_reported_at_its_start_its_end_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, job, reports = [100.0], Job("ann", {}), list[tuple[str, int]]()
    monkeypatch.setattr(reporter, "time", SimpleNamespace(monotonic=lambda: now[0]))
    report = Reporter(job, lambda: reports.append((job.stage, job.done)), interval=1.0)
    for seconds, stage, done in ((0.0, "tags", 0), (0.1, "tags", 1), (0.9, "tags", 2), (0.2, "tags", 3),
                                 (0.1, "denoise", 0), (0.1, "denoise", 9), (0.1, "denoise", 10)):  # fmt: skip
        now[0] += seconds
        report(Position(stage, done, 10, done / 10, 1.0))
    assert reports == [("tags", 0), ("tags", 3), ("denoise", 0), ("denoise", 10)]
    assert (job.total, job.progress, job.seconds_left) == (10, 1.0, 1.0) and len(job.logs.splitlines()) == 4
    assert Reporter(job, lambda: None).interval == INTERVAL and 0 < INTERVAL <= 0.5, "a person sees it move"


@pytest.mark.parametrize("how", ["canceled", "interrupted"])
def test_a_run_that_is_to_end_reports_nothing_more(how: str) -> None:
    interrupted, job, reports = threading.Event(), Job("ann", {}), list[int]()
    report = Reporter(job, lambda: reports.append(1), interrupted=interrupted)
    report(Position("denoise", 0, 2))
    if how == "canceled":
        job.cancel = True
    else:
        interrupted.set()
    with pytest.raises(Canceled if how == "canceled" else Interrupted):
        report(Position("denoise", 2, 2))
    assert len(reports) == 1


@pytest.mark.parametrize(
    ("done", "total", "line"),
    [(0, 4, "  0%|          | 0/4 [denoise]\n"), (1, 4, " 25%|##        | 1/4 [denoise]\n"),
     (3, 8, " 38%|####      | 3/8 [denoise]\n"), (4, 4, "100%|##########| 4/4 [denoise]\n")],
)  # fmt: skip
def test_progress_is_written_as_tqdm_does(done: int, total: int, line: str) -> None:
    assert progress_line(Position("denoise", done, total)) == line


class Store:
    """A job that a test changes, and how often it was looked at."""

    def __init__(self) -> None:
        self.job: Job | None = Job("ann", {}, id="a")
        self.looks = 0

    def find(self, id: str) -> Job | None:
        self.looks += 1
        return self.job


def waited(
    store: Store, listeners: Listeners, seconds: float, *changes: tuple[float, object]
) -> tuple[Job | None, float]:
    """What a caller gets that waits, and after how long; each change is made after a pause."""

    async def run() -> tuple[Job | None, float]:
        started = time.monotonic()
        waiting = asyncio.ensure_future(listeners.changed("a", 0, seconds))
        for pause, change in changes:
            await asyncio.sleep(pause)
            change()  # type: ignore[operator]
        return await waiting, time.monotonic() - started

    result = asyncio.run(run())
    assert listeners.waiting == {}, "nobody waits any more"
    return result


def test_a_caller_is_woken_by_a_change_and_not_by_another_job() -> None:
    store = Store()
    listeners = Listeners(store.find)

    def change() -> None:
        assert store.job
        store.job.revision = 1
        listeners.wake("a")

    job, seconds = waited(store, listeners, 5, (0.02, lambda: listeners.wake("b")), (0.02, lambda: listeners.wake("a")),
                          (0.02, change))  # fmt: skip
    assert job is store.job and seconds < 2 and store.looks == 3, "as often as it was woken"


@pytest.mark.parametrize("how", ["gone", "ended", "newer"])
def test_a_caller_does_not_wait_for_what_is_there(how: str) -> None:
    store = Store()
    if how == "gone":
        store.job = None
    elif how == "ended":
        store.job = Job("ann", {}, status=DONE)
    else:
        store.job = Job("ann", {}, revision=1)
    job, seconds = waited(store, Listeners(store.find), 5)
    assert job is store.job and seconds < 2 and store.looks == 1


def test_a_caller_waits_for_its_time_and_looks_for_itself_in_between() -> None:
    store = Store()
    job, seconds = waited(store, Listeners(store.find), 0.2)
    assert job is store.job and 0.19 < seconds < 2 and store.looks == 2
    store = Store()
    waited(store, Listeners(store.find, longest=0.02), 0.2)
    assert 5 < store.looks < 13, "in case it was not woken"


def test_a_server_that_stops_lets_its_callers_go() -> None:
    store = Store()
    listeners = Listeners(store.find)
    job, seconds = waited(store, listeners, 5, (0.05, listeners.close))
    assert job is store.job and seconds < 2 and listeners.closing
    job, seconds = waited(store, listeners, 0.1)  # who asks again, for a job that still runs, waits again
    assert job is store.job and seconds > 0.09


def test_several_callers_wait_for_one_job() -> None:
    store = Store()
    listeners = Listeners(store.find)

    async def run() -> list[Job | None]:
        waiting = [asyncio.ensure_future(listeners.changed("a", 0, seconds)) for seconds in (0.05, 5, 5)]
        await waiting[0]
        assert len(listeners.waiting["a"]) == 2
        assert store.job
        store.job.revision = 1
        listeners.wake_all()
        return await asyncio.gather(*waiting)

    assert asyncio.run(run()) == [store.job] * 3 and listeners.waiting == {}
