"""Errors of background tasks, of the disk and of the journal, on the echo engine."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import sharp
from starlette.testclient import TestClient

from lab.report import ROOT
from lab.serve.echo import Echo
from seesr.config import Configuration
from seesr.networks import weights
from seesr.serving import app, local, supervisor, webhooks
from seesr.serving.job import CANCELED, DONE, FAILED, RUNNING, WAITING, Job
from seesr.serving.local import LocalJobs
from seesr.serving.sqlite_store import SqliteStore
from seesr.serving.supervisor import Supervisor
from seesr.settings import Settings

QUICK = {"num_inference_steps": 1, "seed": 1}
PNG = {"Content-Type": "image/png"}


@contextlib.contextmanager
def serving(folder: Path, engine: Echo | None = None) -> Iterator[TestClient]:
    """The whole server in this process."""
    configuration = Configuration(data=folder)
    built = app.build(
        configuration,
        "http://seesr.test",
        weights.POCKET,
        lambda send: app.local(configuration, lambda: engine or Echo(), weights.POCKET, send),  # type: ignore[arg-type, return-value]
    )
    with TestClient(built, base_url="http://127.0.0.1:5000") as client:
        until(lambda: client.get("/ready").status_code == 200)
        yield client


def until(true: Callable[[], Any], seconds: float = 10) -> Any:
    end = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return result


def begin(client: TestClient, headers: dict[str, str] | None = None, **query: Any) -> str:
    headers = {**PNG, **(headers or {})}
    answer = client.post("/upscale", params={**QUICK, "wait": 0, **query}, content=sharp(), headers=headers)
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


def status(client: TestClient, id: str) -> str:
    return client.get(f"/jobs/{id}").json()["status"]


def metric(client: TestClient, name: str) -> float:
    line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith(name))
    return float(line.rpartition(" ")[2])


BREAKS = {  # background task -> what it calls
    "jobs": (LocalJobs, "take"),
    "housekeeping": (SqliteStore, "expire"),
    "webhooks": (SqliteStore, "receivers"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_every_background_task_survives_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, function = BREAKS[name]
    real, broken = getattr(owner, function), threading.Event()

    def work(*args: Any) -> Any:
        if broken.is_set():
            raise RuntimeError("broken on purpose")
        return real(*args)

    monkeypatch.setattr(owner, function, work)
    monkeypatch.setattr(app, "EXPIRY", 0.05)
    monkeypatch.setattr(supervisor, "LONGEST_PAUSE", 0.2)
    with serving(tmp_path) as client:
        assert set(client.app.state.service.supervisor.tasks) == set(BREAKS)  # type: ignore[attr-defined]
        broken.set()
        begin(client)  # the worker looks for the next job after this one
        until(lambda: metric(client, f'seesr_background_failures_total{{task="{name}"}}') >= 2)
        answer = client.get("/ready")
        assert answer.status_code == 503 and f"background task {name} (RuntimeError) failed" in answer.json()["detail"]
        assert "Traceback" in caplog.text and "broken on purpose" in caplog.text
        broken.clear()
        until(lambda: client.get("/ready").status_code == 200)
        id = begin(client)
        until(lambda: status(client, id) == DONE)


def test_threads_and_tasks_are_started_by_the_supervisor_alone() -> None:
    allowed = {"supervisor.py": {"Thread"}, "app.py": {"ensure_future"}, "maintenance.py": {"create_task"},
               "webhooks.py": {"create_task"}, "service.py": {"ensure_future"}}  # fmt: skip
    # service.py: a wait within one request, which ends it
    for path in [*(ROOT / "seesr/serving").glob("*.py"), *(ROOT / "seesr/fleet").glob("*.py")]:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
        started = names & {"Thread", "Timer", "create_task", "ensure_future", "start_new_thread", "gather"}
        assert started <= allowed.get(path.name, set()), path


def test_a_task_that_goes_on_failing_is_started_more_and_more_rarely(caplog: pytest.LogCaptureFixture) -> None:
    task, pauses = supervisor.BackgroundTask(), []
    for _ in range(12):
        with supervisor.guarded("x", task):
            raise ValueError
        pauses.append(task.pause)
    assert pauses[:3] == [0.1, 0.2, 0.4] and pauses[-1] == supervisor.LONGEST_PAUSE
    assert task.down and task.failures == 12
    task.failed -= supervisor.RECOVERED_AFTER
    assert not task.down
    with supervisor.guarded("x", task):
        raise ValueError
    assert task.pause == 0.1


def test_a_full_disk_loses_no_result_and_says_why_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record, the result and a new job meet a full disk in turn."""
    monkeypatch.setattr(local, "LONGEST_PAUSE", 0.05)
    keep, save = SqliteStore.keep, LocalJobs.save
    full: set[str] = set()

    def full_keep(journal: SqliteStore, job: Job, *events: str) -> None:
        if ("record" in full and job.status in (DONE, RUNNING)) or ("new" in full and job.status == WAITING):
            raise sqlite3.OperationalError("database or disk is full")
        keep(journal, job, *events)

    def full_save(jobs: LocalJobs, data: bytes, name: str) -> None:
        if "result" in full:
            raise OSError(28, "No space left on device")
        save(jobs, data, name)

    monkeypatch.setattr(SqliteStore, "keep", full_keep)
    monkeypatch.setattr(LocalJobs, "save", full_save)
    with serving(tmp_path) as client:
        for what, message in (("record", "database or disk is full"), ("result", "No space left on device")):
            full.add(what)
            id = begin(client)
            answer = until(lambda: (result := client.get("/ready")).status_code == 503 and result)
            assert message in answer.json()["detail"] and "free space under SEESR_DATA" in answer.json()["detail"]
            assert status(client, id) in (WAITING, RUNNING)
            full.clear()
            until(lambda id=id: status(client, id) == DONE)
            until(lambda: client.get("/ready").status_code == 200)
        full.add("new")
        answer = client.post("/upscale", params={**QUICK, "wait": 0}, content=sharp(), headers=PNG)
        assert answer.status_code == 503 and "server cannot write to its disk" in answer.json()["detail"]
        full.clear()
        assert not list((tmp_path / "inputs").iterdir()) and not list((tmp_path / "parts").iterdir())


def test_a_job_whose_settings_cannot_be_read_fails_alone(tmp_path: Path) -> None:
    journal = SqliteStore(tmp_path)
    jobs = LocalJobs(Echo, journal, 9, "v1")  # type: ignore[arg-type]
    bad, good = Job("ann", {"scale_factor": [], "from_tomorrow": 1}), Job.of("ann", Settings(seed=1))
    for job in (bad, good):
        path = tmp_path / "parts" / job.id
        path.write_bytes(sharp())
        jobs.submit(job, path)
    supervisor = Supervisor()
    jobs.start(supervisor)
    until(lambda: [journal.job(job.id).status for job in (bad, good)] == [FAILED, DONE])  # type: ignore[union-attr]
    assert supervisor.tasks["jobs"].failures == 0
    jobs.close()
    journal.close()


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Callable[[], SqliteStore]]:
    """Opens the journal of the folder anew."""
    opened: list[SqliteStore] = []

    def fresh() -> SqliteStore:
        for store in opened:
            store.close()
        opened[:] = [SqliteStore(tmp_path)]
        return opened[0]

    yield fresh
    for store in opened:
        store.close()


def left(journal: SqliteStore, **more: Any) -> Job:
    """A job as a killed server leaves it."""
    job = Job.of("ann", Settings(seed=1), **{"status": RUNNING, "attempts": 1, "version": "v1", **more})
    journal.file("inputs", job.id).write_bytes(sharp())
    journal.keep(job)
    return job


def test_after_a_kill_between_result_and_record_the_job_has_succeeded(journal: Callable[[], SqliteStore]) -> None:
    store = journal()
    job = left(store, attempts=3)
    store.file("outputs", f"{job.id}.png").write_bytes(b"result")
    jobs = LocalJobs(Echo, (two := journal()), 9, "v1")  # type: ignore[arg-type]
    stored = jobs.find(job.id)
    assert stored is not None and stored.status == DONE and jobs.result(stored).read_bytes() == b"result"
    assert not jobs.waiting and not list((two.folder / "inputs").iterdir())


def test_a_job_of_another_version_is_not_run(journal: Callable[[], SqliteStore]) -> None:
    other, own = left(journal(), version="0" * 64), left(journal(), version="v1")
    jobs = LocalJobs(Echo, journal(), 9, "v1")  # type: ignore[arg-type]
    assert [job.id for job in jobs.waiting] == [own.id]
    stored = jobs.find(other.id)
    assert stored is not None and stored.status == FAILED
    assert (
        stored.error
        == "this image waited for version 000000000000 of the model; this server runs v1; send the image again"
    )


def test_a_job_and_its_batch_expire_after_its_end(journal: Callable[[], SqliteStore]) -> None:
    """Also one that waited for longer than that."""
    store, batch, now = journal(), "b" * 32, time.time()
    job = Job.of("ann", Settings(seed=1), batch=batch, created=now - 100, completed=now, status=DONE)
    store.keep(job)
    store.keep_note(batch, {"refused": [], "owner": "ann"})
    os.utime(store.file("notes", batch), (1, 1))
    store.expire(50)
    assert store.job(job.id) and store.note(batch)
    store.expire(-1)
    assert not store.job(job.id) and not store.note(batch)


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path)
    with pytest.raises(ValueError, match=r"is used by another server \(process \d+\); stop it, or set SEESR_DATA"):
        SqliteStore(tmp_path)
    first.close()
    SqliteStore(tmp_path).close()


def test_records_of_another_version_and_damaged_ones(
    journal: Callable[[], SqliteStore], caplog: pytest.LogCaptureFixture
) -> None:
    """Unknown fields are ignored; a record that cannot be read fails alone, with its place in the log."""
    store = journal()
    newer, damaged, good = left(store), left(store), left(store)
    record = json.loads(store.run("SELECT record FROM jobs WHERE id = ?", newer.id)[0][0])
    store.run("UPDATE jobs SET record = ? WHERE id = ?", json.dumps({**record, "from_tomorrow": 1}), newer.id)
    store.run("UPDATE jobs SET record = ? WHERE id = ?", '{"owner": "ann", "sett', damaged.id)
    with caplog.at_level(logging.ERROR):
        jobs = LocalJobs(Echo, journal(), 9, "v1")  # type: ignore[arg-type]
    assert {job.id for job in jobs.waiting} == {newer.id, good.id}
    stored = jobs.find(damaged.id)
    assert (
        stored is not None and (stored.status, stored.owner) == (FAILED, "ann") and "is damaged" in (stored.error or "")
    )
    assert "jobs.sqlite, table jobs, row 2" in caplog.text
    assert len(jobs.recent("ann", 10)) == 3


@pytest.mark.parametrize("where", [0, 4096])
def test_a_damaged_journal_is_named_and_left_alone(tmp_path: Path, where: int) -> None:
    store = SqliteStore(tmp_path)
    left(store)
    store.close()
    path = tmp_path / "jobs.sqlite"
    data = bytearray(path.read_bytes())
    data[where : where + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"jobs\.sqlite is damaged: .*restore it from a backup") as error:
        SqliteStore(tmp_path)
    assert "\n" not in str(error.value) and path.read_bytes() == data


def test_leftovers_of_a_killed_server_are_removed(journal: Callable[[], SqliteStore]) -> None:
    store = journal()
    job = left(store)
    for key, id in (("kept", job.id), ("lost", "0" * 32)):
        assert store.claim("ann", key, "digest", id) is None
    for kind in ("inputs", "outputs", "parts"):
        store.file(kind, "0" * 32).write_bytes(b"")
    two = journal()
    assert [path.name for kind in ("inputs", "outputs", "parts") for path in (two.folder / kind).iterdir()] == [job.id]
    assert two.claim("ann", "kept", "digest", "1" * 32) == ("digest", job.id)
    assert two.claim("ann", "lost", "digest", "1" * 32) is None


def test_a_stopping_server_leaves_a_long_job_to_the_next_one(
    journal: Callable[[], SqliteStore], tmp_path: Path
) -> None:
    jobs = LocalJobs(lambda: Echo(20), journal(), 9, "v1")  # type: ignore[arg-type, return-value]
    job, path = Job.of("ann", Settings(seed=1)), tmp_path / "parts/x"
    path.write_bytes(sharp())
    jobs.submit(job, path)
    jobs.start(Supervisor())
    until(lambda: jobs.running)
    started = time.monotonic()
    jobs.close(0.2)
    assert time.monotonic() - started < 5
    again = LocalJobs(Echo, journal(), 9, "v1")  # type: ignore[arg-type]
    assert [(each.id, each.status, each.attempts) for each in again.waiting] == [(job.id, WAITING, 0)]


class Receivers:
    """Takes webhooks; one host never answers in time."""

    def __init__(self) -> None:
        self.got: list[tuple[str, str]] = []
        self.refused: set[str] = set()

    async def __call__(self, job: Job, event: str) -> bool:
        if "slow" in (job.webhook or ""):
            await asyncio.sleep(60)
        if "broken" in (job.webhook or ""):
            raise LookupError("broken on purpose")
        if event in self.refused:
            self.refused.discard(event)
            return False
        self.got.append((job.id, event))
        return True


def run_webhooks(journal: SqliteStore, receivers: Receivers, done: Callable[[], Any]) -> None:
    async def work() -> None:
        task = asyncio.ensure_future(webhooks.WebhookQueue(journal, receivers).run())
        end = time.monotonic() + 5
        while not done() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled(), task

    asyncio.run(work())
    assert done()


def test_webhooks_outlive_the_server_and_keep_their_order(
    journal: Callable[[], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "PAUSE", 0.01)
    store, receivers = journal(), Receivers()
    for host in ("slow", "broken", "good"):
        job = Job.of("ann", Settings(seed=1), webhook=f"https://{host}.test/hook")
        store.keep(job, "start")
        store.keep_progress(job)
        store.keep_progress(job)  # in the place of the one before
        job.status = DONE
        store.keep(job, "output", "completed")
    receivers.refused = {"start", "output"}  # at the first try: what follows waits
    run_webhooks(store, receivers, lambda: len(receivers.got) >= 2)
    two = journal()
    run_webhooks(two, receivers, lambda: len(receivers.got) >= 4)
    assert [event for _, event in receivers.got] == ["start", "logs", "output", "completed"]
    assert two.receivers()[0] == "ann slow.test"


def test_webhooks_that_a_receiver_does_not_take_are_limited(
    journal: Callable[[], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    from seesr.serving import sqlite_store

    monkeypatch.setattr(sqlite_store, "MAX_WEBHOOKS", 2)
    store = journal()
    for _ in range(3):
        store.keep(Job.of("ann", Settings(seed=1), webhook="https://a.test/"), "completed")
    store.keep(Job.of("bob", Settings(seed=1), webhook="https://a.test/"), "completed")
    assert store.run("SELECT receiver, count(*) FROM webhooks GROUP BY receiver") == [
        ("ann a.test", 2),
        ("bob a.test", 1),
    ]


def test_a_canceled_job_that_waited_is_recorded(journal: Callable[[], SqliteStore], tmp_path: Path) -> None:
    jobs, path = LocalJobs(Echo, journal(), 9, "v1"), tmp_path / "parts/x"  # type: ignore[arg-type]
    path.write_bytes(sharp())
    jobs.submit(job := Job.of("ann", Settings(seed=1)), path)
    jobs.cancel(job.id)
    assert not jobs.waiting and jobs.journal.job(job.id).status == CANCELED  # type: ignore[union-attr]
