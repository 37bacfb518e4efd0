"""The queue of one server, step by step: what a new server takes over, what runs next, and how jobs end."""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from serving import sharp

from lab.serve.echo import Echo
from seesr.config import Configuration
from seesr.runtime.progress import Position
from seesr.serving import local
from seesr.serving.job import (
    CANCELED,
    DONE,
    FAILED,
    LATER,
    RUNNING,
    URGENT,
    WAITING,
    Job,
    Late,
    QueueFull,
    Unavailable,
)
from seesr.serving.local import FIRST_PAUSE, LocalJobs
from seesr.serving.reporter import Interrupted
from seesr.serving.sqlite_store import SqliteStore
from seesr.settings import Settings

FULL = sqlite3.OperationalError("database or disk is full")


class Engine(Echo):
    """An Echo that does what a test asks for.

    Args:
        work: called with the watchers of each run.
        well: whether the device works.
    """

    def __init__(self, work: Callable[[Any], None] | None = None, well: bool = True) -> None:
        super().__init__()
        self.work, self.well, self.masks = work, well, list[Path | None]()

    def run(self, data: Path, settings: Any, deadline: Any, watchers: Any, mask: Path | None = None) -> Any:
        self.masks.append(mask)
        if self.work is not None:
            self.work(watchers)
        return super().run(data, settings, deadline, watchers, mask)

    def healthy(self) -> bool:
        return self.well


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path)
    yield store
    store.close()


@pytest.fixture
def make(journal: SqliteStore) -> Callable[..., LocalJobs]:
    """Makes a queue with a loaded engine and no thread."""

    def made(engine: Engine | None = None, max_queue: int = 9, **values: Any) -> LocalJobs:
        jobs = LocalJobs(lambda: engine or Engine(), journal, max_queue, "v1", **values)  # type: ignore[arg-type, return-value]
        assert jobs.load_engine()
        return jobs

    return made


def submit(jobs: LocalJobs, mask: bool = False, owner: str = "ann", id: str | None = None, **values: Any) -> Job:
    job = Job.of(owner, Settings(seed=1), masked=mask, **values, **({"id": id} if id else {}))
    parts = [jobs.journal.file("parts", job.id + kind) for kind in (("", "-mask") if mask else ("",))]
    for part in parts:
        part.write_bytes(sharp())
    jobs.submit(job, parts[0], parts[1] if mask else None)
    return job


def run_next(jobs: LocalJobs) -> Job:
    """Runs the next job to its end."""
    job = jobs.take()
    assert job is not None
    try:
        jobs.make(job)
    finally:
        jobs.running = None
    return job


def recorded(jobs: LocalJobs, job: Job) -> Job:
    record = jobs.journal.job(job.id)
    assert record is not None
    return record


def files(jobs: LocalJobs, kind: str) -> list[str]:
    return sorted(path.name for path in (jobs.journal.folder / kind).iterdir())


@pytest.mark.parametrize(
    ("values", "status", "error"),
    [
        ({"attempts": 0, "status": WAITING}, WAITING, None),
        ({"attempts": 2}, WAITING, None),
        ({"attempts": 3}, FAILED, "the server died 3 times on this image"),
        ({"version": None}, WAITING, None),
        ({"version": "0123456789abcdef"}, FAILED,
         "this image waited for version 0123456789ab of the model; this server runs v1; send the image again"),
        ({"input": False}, FAILED, "the server died before the image was stored; send it again"),
        ({"result": True, "attempts": 3, "version": "other"}, DONE, None),
    ],
)  # fmt: skip
def test_what_a_server_takes_over_from_the_one_before(
    values: dict[str, Any], status: str, error: str | None, journal: SqliteStore
) -> None:
    has_input, has_result = values.pop("input", True), values.pop("result", False)
    state = {"status": RUNNING, "version": "v1", "stage": "denoise", "done": 3, "webhook": "https://a.test/", **values}
    job = Job.of("ann", Settings(seed=1), **state)
    if has_input:
        journal.file("inputs", job.id).write_bytes(sharp())
    if has_result:
        journal.file("outputs", f"{job.id}.png").write_bytes(b"result")
    journal.keep(job)
    jobs = LocalJobs(Echo, journal, 9, "v1")  # type: ignore[arg-type]
    found = jobs.find(job.id)
    assert found and (found.status, found.error) == (status, error) == (recorded(jobs, job).status, error)
    assert [each.id for each in jobs.waiting] == ([job.id] if status == WAITING else [])
    if status == WAITING:
        assert (found.stage, found.done, found.attempts) == ("", 0, job.attempts)
    else:
        assert found.output == (f"{job.id}.png" if status == DONE else None) and not files(jobs, "inputs")
        assert jobs.ended.snapshot()[0]["jobs", status] == 1


def test_a_job_is_run_and_its_record_written_before_its_inputs_are_removed(make: Callable[..., LocalJobs]) -> None:
    engine = Engine()
    jobs = make(engine)
    woken: list[str] = []
    jobs.listeners.wake = woken.append  # type: ignore[method-assign]
    job = submit(jobs, mask=True)
    states: list[Any] = []
    engine.work = lambda watchers: states.append((recorded(jobs, job), jobs.status()["running"], jobs.ahead([])))
    assert job.status == WAITING and files(jobs, "inputs") == [job.id, f"{job.id}-mask"] and not files(jobs, "parts")
    before = time.time()
    run_next(jobs)
    (during, running, _) = states[0]
    assert (during.status, during.attempts, during.revision) == (RUNNING, 1, 1) and during.started >= before
    assert running == {"id": job.id, "stage": "", "since": during.started}
    assert engine.masks == [jobs.journal.folder / "inputs" / f"{job.id}-mask"]
    done = recorded(jobs, job)
    assert (done.status, done.output, done.version) == (DONE, f"{job.id}.png", "v1")
    assert done.metrics["seed"] == 1 and done.completed and done.completed >= during.started
    assert done.revision > during.revision + 1 and set(woken) == {job.id}
    assert jobs.result(done).read_bytes() == sharp() and not files(jobs, "inputs")
    assert len(jobs.times) == 1 and 0 <= jobs.times[0] < 10 and job.id not in jobs.jobs
    assert jobs.find(job.id) == done and jobs.counts()[0]["jobs", DONE] == 1
    plain = submit(jobs)
    run_next(jobs)
    assert engine.masks[-1] is None and jobs.find(plain.id) and jobs.times.maxlen == 50


@pytest.mark.parametrize(
    ("error", "well", "message", "failure"),
    [
        (ValueError("the image is damaged"), True, "the image is damaged", None),
        (RuntimeError("CUDA error"), False, "CUDA error", "the device has failed"),
        (ValueError("too large"), False, "too large", "the device has failed"),
        (LookupError("broken"), True, "internal error; see the server's log", None),
    ],
    ids=["value", "device", "both", "other"],
)
def test_a_job_that_fails_says_why_and_a_failed_device_stops_the_server(
    error: Exception, well: bool, message: str, failure: str | None, make: Callable[..., LocalJobs]
) -> None:
    def fail(watchers: Any) -> None:
        raise error

    jobs = make(Engine(fail, well))
    job = submit(jobs)
    run_next(jobs)
    assert (recorded(jobs, job).status, recorded(jobs, job).error) == (FAILED, message)
    assert jobs.ready() == failure and not jobs.times and not files(jobs, "inputs")


def test_a_job_is_tried_three_times_when_the_server_itself_fails(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    job = submit(jobs)
    for attempt in range(1, 4):
        taken = jobs.take()
        assert taken and not jobs.waiting and jobs.running is taken
        taken.attempts, taken.status, taken.stage = attempt, RUNNING, "denoise"
        jobs.put_back(taken)
        if attempt < 3:
            assert jobs.waiting == [taken] and (taken.status, taken.stage) == (WAITING, "")
    assert not jobs.waiting and recorded(jobs, job).error == "internal error; see the server's log"
    jobs.put_back(job)
    assert not jobs.waiting, "it has ended"


def test_an_interrupted_job_is_left_to_the_next_server(
    make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = make()
    submit(jobs)
    job = jobs.take()
    assert job
    job.status, job.attempts, job.started = RUNNING, 2, 5.0
    jobs.leave(job)
    left = recorded(jobs, job)
    assert (left.status, left.attempts, left.started) == (WAITING, 1, None)

    def fail(job: Job, *events: str) -> None:
        raise FULL

    monkeypatch.setattr(jobs.journal, "keep", fail)
    with caplog.at_level(logging.WARNING):
        jobs.leave(job)
    assert f"job {job.id}: its record was not updated" in caplog.text


def test_the_thread_runs_jobs_until_the_server_stops(
    make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    priorities: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "setpriority", lambda *values: priorities.append(values))
    jobs = make()
    first, second = submit(jobs), submit(jobs)
    jobs.engines.loaded["v1"].work = lambda watchers: len(jobs.waiting) or jobs.stop()  # type: ignore[attr-defined]
    jobs.work()
    assert [recorded(jobs, job).status for job in (first, second)] == [DONE, DONE] and jobs.running is None
    assert [values[:2] for values in priorities] == [(os.PRIO_PROCESS, threading.get_native_id())]
    assert 0 < priorities[0][2] < 20, "the routes of the server come first"


@pytest.mark.parametrize("how", ["interrupted", "error"])
def test_the_thread_gives_its_job_back(
    how: str, make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "setpriority", lambda *values: None)
    jobs = make()
    job = submit(jobs)

    def fail(job: Job) -> None:
        job.attempts = 1
        raise Interrupted if how == "interrupted" else LookupError("of the server itself")

    monkeypatch.setattr(jobs, "make", fail)
    if how == "interrupted":
        jobs.work()
        assert recorded(jobs, job).attempts == 0 and not jobs.waiting
    else:
        with pytest.raises(LookupError):
            jobs.work()
        assert [each.id for each in jobs.waiting] == [job.id]
    assert jobs.running is None


def test_a_server_whose_engine_cannot_be_loaded_is_never_ready(
    journal: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> Any:
        raise OSError("no weights")

    monkeypatch.setattr(os, "setpriority", lambda *values: None)
    jobs = LocalJobs(load, journal, 9, "v1")
    assert jobs.ready() == "the weights are loading" and jobs.share == Configuration().queue_share
    jobs.work()
    assert jobs.ready() == "the engine cannot be loaded: no weights" and not jobs.loaded


def test_what_a_server_says_while_it_is_not_ready(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    assert jobs.ready() is None
    jobs.storage_error = "the disk is full"
    assert jobs.ready() == "the disk is full"
    jobs.stop()
    assert jobs.ready() == "the server is shutting down" and jobs.listeners.closing
    jobs.failure = "the device has failed"
    assert jobs.ready() == "the device has failed"
    with pytest.raises(Unavailable, match="shutting down"):
        submit(jobs)


def test_a_stopped_server_takes_no_job_that_waits(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    submit(jobs)
    jobs.stop()
    assert jobs.take() is None and len(jobs.waiting) == 1


def test_a_thread_without_work_is_woken_by_a_job_and_by_the_end(make: Callable[..., LocalJobs]) -> None:
    jobs, taken = make(), list[Job | None]()
    thread = threading.Thread(target=lambda: taken.extend((jobs.take(), jobs.take())), daemon=True)
    thread.start()
    job = submit(jobs)
    while not taken and jobs.running is None:
        time.sleep(0.001)
    jobs.close()
    thread.join(5)
    assert not thread.is_alive() and taken[0] and taken[0].id == job.id and taken[1] is None


def test_a_job_that_was_sent_twice_is_queued_once(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    submit(jobs, id="a" * 32)
    submit(jobs, id="a" * 32)
    assert len(jobs.waiting) == 1
    run_next(jobs)
    submit(jobs, id="a" * 32)
    assert not jobs.waiting, "also after its end"


def test_the_queue_has_a_limit_and_each_key_a_share(make: Callable[..., LocalJobs]) -> None:
    jobs = make(max_queue=4, share=0.5)
    jobs.times.extend([2.0, 3.0, 4.0])
    for _ in range(4):
        submit(jobs)
    with pytest.raises(QueueFull) as full:
        submit(jobs)
    assert full.value.seconds == 4 * 3.0
    submit(jobs, owner="bob", share=0.25)
    with pytest.raises(QueueFull):
        submit(jobs, owner="bob", share=0.25)
    submit(jobs, owner="bob", share=0.5)


def quoted(seconds: float | None, **values: Any) -> Job:
    quote = {"output_size": "1x1", "tiles": 1, "seconds": seconds, "seconds_at_most": seconds, "bytes": 1,
             "peak_memory_mb": {}, "price": None, "images": 9, "wait": 0.0}  # fmt: skip
    return Job("ann", {}, quote=quote, **values)


def test_the_wait_is_what_runs_before_and_the_rest_of_what_runs(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    jobs.waiting = [quoted(2.0, created=1), quoted(3.0, created=2), quoted(9.0, created=0, priority=LATER)]
    job = Job("ann", {}, created=10)
    assert jobs.wait_for(job) == 5.0 and jobs.wait_for(Job("ann", {}, created=10, priority=URGENT)) == 0.0
    jobs.running = quoted(4.0, started=time.time() - 1)
    assert jobs.wait_for(job) == pytest.approx(5 + 3, abs=0.1)
    jobs.running = quoted(4.0)
    assert jobs.wait_for(job) == pytest.approx(5 + 4, abs=0.1)
    jobs.running = quoted(4.0, started=time.time() - 100)
    assert jobs.wait_for(job) == 5.0
    jobs.running, jobs.waiting = None, [quoted(1.23456, created=1)]
    assert jobs.wait_for(job) == 1.235
    for unknown in (Job("ann", {}, created=1), quoted(None, created=1)):
        jobs.waiting = [unknown]
        jobs.times.clear()
        assert jobs.wait_for(job) == jobs.expected_seconds(1) > 1
        jobs.times.extend([2.0, 4.0, 9.0])
        assert jobs.wait_for(job) == 4.0
    assert jobs.expected_seconds(3) == 12.0 and 0 < jobs.expected_seconds(0) <= 1


def test_a_deadline_is_checked_with_the_wait_of_the_moment(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    jobs.waiting = [quoted(5.0, created=1)]
    quote = quoted(1.0).quote
    with pytest.raises(Late):
        submit(jobs, quote=quote, deadline=5.9)
    job = submit(jobs, quote=quote, deadline=6.0)
    assert job.quote and job.quote["wait"] == 5.0


def test_no_quote_without_the_engine_of_the_version(
    make: Callable[..., LocalJobs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make()
    image = tmp_path / "image"
    image.write_bytes(sharp())
    jobs.waiting = [quoted(5.0, created=1)]
    job = Job.of("ann", Settings(seed=1))
    quote = jobs.quote(job, image)
    assert quote and (quote.wait, quote.bytes) == (5.0, len(sharp()))
    assert jobs.quote(Job.of("ann", Settings(seed=1), version="other"), image) is None
    engine: Any = jobs.engines.loaded["v1"]

    def fail(*values: Any) -> None:
        raise RuntimeError("the engine is unloaded")

    monkeypatch.setattr(engine, "quote", fail)
    with pytest.raises(RuntimeError):
        jobs.quote(job, image)
    monkeypatch.setattr(engine, "quote", lambda *values: jobs.engines.loaded.clear() or fail())
    assert jobs.quote(job, image) is None, "it was unloaded at this moment"


def test_a_job_is_canceled_while_it_waits_or_runs(
    make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make()
    first, second, third = submit(jobs), submit(jobs), submit(jobs)
    running = jobs.take()
    assert running and running.id == first.id
    assert jobs.ahead([first.id, second.id, third.id, "unknown"]) == {second.id: 1, third.id: 2}
    for job in (first, second):
        jobs.cancel(job.id)
    assert running.cancel and running.status == WAITING and recorded(jobs, second).status == CANCELED
    assert [job.id for job in jobs.waiting] == [third.id]
    jobs.running = None
    assert jobs.ahead([third.id]) == {third.id: 0}
    ended = recorded(jobs, second)
    jobs.cancel(second.id)
    jobs.cancel("unknown")
    assert recorded(jobs, second) == ended

    def fail(job: Job, *events: str) -> None:
        raise FULL

    monkeypatch.setattr(jobs.journal, "keep", fail)
    with pytest.raises(Unavailable, match="cannot write to its disk"):
        jobs.cancel(third.id)
    assert len(jobs.waiting) == 1, "it still waits"


def test_a_reader_gets_the_job_as_it_is_in_memory(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    ids = [submit(jobs, batch="b" * 32).id for _ in range(3)]
    submit(jobs, owner="bob", batch="b" * 32)
    running = jobs.take()
    assert running
    running.stage = "denoise"
    found = jobs.find(ids[0])
    assert found and found.stage == "denoise" and found is not running
    assert [job.id for job in jobs.recent("ann", 2)] == ids[:0:-1] and jobs.recent("eve", 9) == []
    created = jobs.recent("ann", 9)[1].created
    assert [job.id for job in jobs.recent("ann", 9, created)] == ids[:1]
    batch = jobs.batch("ann", "b" * 32)
    assert [job.id for job in batch] == ids and batch[0] is running


def test_the_status_of_a_server(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    status = jobs.status()
    assert (status["queue_length"], status["oldest_wait_seconds"], status["running"]) == (0, 0.0, None)
    assert (
        status["engine"] == {"loaded": True} and status["loaded"] == ["v1"] and abs(status["since"] - time.time()) < 9
    )
    submit(jobs, created=time.time() - 50)
    submit(jobs)
    status = jobs.status()
    assert status["queue_length"] == 2 and status["oldest_wait_seconds"] == pytest.approx(50, abs=5)
    jobs.engines.loaded.clear()
    assert jobs.status()["engine"] is None


def test_a_full_disk_is_tried_again_with_longer_and_longer_pauses(
    make: Callable[..., LocalJobs], caplog: pytest.LogCaptureFixture
) -> None:
    jobs, pauses = make(), list[float]()

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        assert "cannot write to its disk" in (jobs.ready() or "")
        return False

    jobs.interrupted = SimpleNamespace(wait=wait)  # type: ignore[assignment]
    answers: Iterator[Any] = iter([FULL, OSError(28, "No space left on device"), *[FULL] * 8, "stored"])

    def work() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert jobs.until_stored(work) == "stored" and jobs.ready() is None
    assert pauses == [min(FIRST_PAUSE * 2**number, local.LONGEST_PAUSE) for number in range(10)]
    assert pauses[-1] == local.LONGEST_PAUSE > 1 > FIRST_PAUSE > 0 and "next try in 0.2 s" in caplog.text


@pytest.mark.parametrize("how", ["closing", "interrupted"])
def test_a_server_that_stops_does_not_wait_for_its_disk(how: str, make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    if how == "closing":
        jobs.closing = True
    else:
        jobs.interrupted.set()

    def work() -> None:
        raise FULL

    with pytest.raises(Interrupted):
        jobs.until_stored(work)


def test_a_webhook_hears_of_progress_now_and_then(
    make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, kept, woken = [1000.0], list[int](), list[str]()
    jobs = make()
    monkeypatch.setattr(local, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(jobs.listeners, "wake", woken.append)
    monkeypatch.setattr(jobs.journal, "keep_progress", lambda job: kept.append(job.done))
    wanted = Job("ann", {}, webhook="https://a.test/")
    report = jobs.reporter(wanted)
    for number, seconds in enumerate((0.0, 0.125, local.LOGS_INTERVAL - 0.125, 0.125)):
        now[0] += seconds
        report(Position(f"stage {number}", number, 9))
    assert kept == [0, 2] and wanted.revision == 4 and len(woken) == 4 and 0.1 < local.LOGS_INTERVAL <= 1
    other = Job("ann", {}, webhook="https://a.test/", events=["completed"])
    jobs.reporter(other)(Position("denoise", 0, 9))
    assert kept == [0, 2] and other.revision == 1

    def fail(job: Job) -> None:
        raise FULL

    monkeypatch.setattr(jobs.journal, "keep_progress", fail)
    now[0] += 9
    report(Position("decode", 0, 9))
    assert f"webhook about the logs of job {wanted.id} dropped" in caplog.text


def test_a_result_that_cannot_be_written_is_an_error_of_the_disk(
    make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = make()
    causes: Iterator[Exception | None] = iter([OSError(28, "No space left on device"), None])

    def save(data: bytes, path: Path) -> None:
        raise RuntimeError("cannot be written") from next(causes)

    monkeypatch.setattr(local.write, "save", save)
    with pytest.raises(OSError, match="No space left"):
        jobs.save(b"x", "x.png")
    with pytest.raises(RuntimeError, match="cannot be written"):
        jobs.save(b"x", "x.png")


@pytest.mark.parametrize(
    ("message", "others", "runs"),
    [("out of memory: a tile does not fit", True, 2), ("out of memory: a tile does not fit", False, 1),
     ("CUDA error", True, 1)],
)  # fmt: skip
def test_only_memory_that_others_hold_is_worth_a_second_run(
    message: str, others: bool, runs: int, make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(watchers: Any) -> None:
        if len(engine.masks) == 1:
            raise RuntimeError(message)

    engine = Engine(fail)
    jobs = make(engine)
    monkeypatch.setattr(jobs.engines, "unload_others", lambda version: others and version == "v1")
    job = submit(jobs)
    run_next(jobs)
    assert len(engine.masks) == runs and recorded(jobs, job).status == (DONE if runs == 2 else FAILED)


def test_an_input_that_cannot_be_removed_is_logged_and_the_job_has_ended(
    make: Callable[..., LocalJobs], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = make()
    job = submit(jobs, mask=True)
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == job.id:
            raise PermissionError(13, "Permission denied")
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    run_next(jobs)
    monkeypatch.undo()
    assert recorded(jobs, job).status == DONE and f"input of job {job.id} not removed" in caplog.text
    assert files(jobs, "inputs") == [job.id], "the mask is removed all the same"


def test_the_webhook_of_an_end_has_its_result(make: Callable[..., LocalJobs]) -> None:
    jobs = make()
    submit(jobs, webhook="https://a.test/")
    run_next(jobs)
    jobs.engines.loaded["v1"].work = lambda watchers: [][1]  # type: ignore[attr-defined]
    submit(jobs, webhook="https://b.test/")
    run_next(jobs)
    rows = jobs.journal.run("SELECT receiver, event FROM webhooks WHERE event != 'logs' ORDER BY number")
    assert rows == [("ann a.test", "start"), ("ann a.test", "output"), ("ann a.test", "completed"),
                    ("ann b.test", "start"), ("ann b.test", "completed")]  # fmt: skip
