"""The journal of one server on disk: what it removes, what it keeps, and what it says when it cannot."""

from __future__ import annotations

import datetime
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seesr.serving import sqlite_store
from seesr.serving.job import DONE, FAILED, RUNNING, WAITING, Job
from seesr.serving.keys import today
from seesr.serving.metadata_store import USAGE_DAYS
from seesr.serving.sqlite_store import SqliteStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(tmp_path)
    yield store
    store.close()


def reopened(store: SqliteStore) -> SqliteStore:
    """The store of the next server."""
    store.close()
    return SqliteStore(store.folder)


def names(store: SqliteStore, kind: str) -> set[str]:
    return {path.name for path in (store.folder / kind).iterdir()}


def test_what_a_killed_server_left_is_removed_and_the_rest_stays(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path)
    waiting, running, done = (Job("ann", {}, status=status) for status in (WAITING, RUNNING, DONE))
    for job in (waiting, running, done):
        store.keep(job)
    lost = "0" * 32
    kept = {
        "inputs": {waiting.id, f"{waiting.id}-mask", running.id},
        "outputs": {f"{done.id}.png", f"{waiting.id}.png"},
    }
    gone = {"inputs": {lost, f"{lost}-mask", done.id}, "outputs": {f"{lost}.png"}, "parts": {"a", "b"}}
    for kind, files in [*kept.items(), *gone.items()]:
        for name in files:
            store.file(kind, name).write_bytes(b"x")
    store.keep_note("b" * 32, {})
    for key, id in (("job", done.id), ("batch", "b" * 32), ("lost", lost), ("lost too", lost)):
        store.claim("ann", key, "digest", id)
    again = reopened(store)
    assert {kind: names(again, kind) for kind in ("inputs", "outputs", "parts")} == {**kept, "parts": set()}
    claims = [again.claim("ann", key, "digest", "new") for key in ("job", "batch", "lost", "lost too")]
    assert claims == [("digest", done.id), ("digest", "b" * 32), None, None]
    again.close()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"SEESR_DATA=.*file cannot be written: Not a directory; free space there"):
        SqliteStore(tmp_path / "file")

    def connect(*values: Any, **more: Any) -> Any:
        raise sqlite3.OperationalError("unable to open database file")

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_store.sqlite3, "connect", connect)
        with pytest.raises(ValueError, match="cannot be written: unable to open database file"):
            SqliteStore(tmp_path / "data")
    SqliteStore(tmp_path / "data").close()  # the folder is not locked any more


def test_the_process_that_uses_a_folder_is_named(store: SqliteStore) -> None:
    with pytest.raises(ValueError, match=rf"is used by another server \(process {os.getpid()}\)"):
        SqliteStore(store.folder)


def test_a_job_is_written_with_its_webhooks_or_not_at_all(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("ann", {}, webhook="https://a.test/", events=["completed", "output"])
    store.keep(job, "start", "output", "completed")
    assert store.run("SELECT event FROM webhooks ORDER BY number") == [("output",), ("completed",)]

    def fail(*values: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(store, "add_webhook", fail)
    job.status = DONE
    with pytest.raises(sqlite3.OperationalError):
        store.keep(job, "completed")
    found = store.job(job.id)
    assert found and found.status == WAITING and not store.base.in_transaction
    store.keep(job)
    found = store.job(job.id)
    assert found and found.status == DONE and store.job("unknown") is None


def test_a_message_about_progress_replaces_one_that_was_not_tried(store: SqliteStore) -> None:
    job = Job("ann", {}, webhook="https://a.test/")
    for done in range(3):
        job.done = done
        store.keep_progress(job)
    message = store.next_webhook("ann a.test")
    assert message and (message.event, message.job.done, message.tries) == ("logs", 2, 0)
    assert store.untried_webhooks() == 1 and abs(message.due - time.time()) < 5
    store.delay_webhook(message.number, 5.0)
    store.keep_progress(job)
    message = store.next_webhook("ann a.test")
    assert message and (message.tries, message.due) == (1, 5.0), "one that was tried is tried again first"
    assert store.run("SELECT count(*) FROM webhooks") == [(2,)] and store.untried_webhooks() == 1
    store.drop_webhook(message.number)
    assert store.receivers() == ["ann a.test"] and store.next_webhook("bob a.test") is None


def test_receivers_come_by_their_longest_wait(store: SqliteStore) -> None:
    for host in ("b", "a", "b", "c"):
        store.keep(Job("ann", {}, webhook=f"https://{host}.test/"), "completed")
    assert store.receivers() == ["ann b.test", "ann a.test", "ann c.test"]


def test_the_number_of_messages_for_one_receiver_is_limited(
    store: SqliteStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert sqlite_store.MAX_WEBHOOKS >= 100
    monkeypatch.setattr(sqlite_store, "MAX_WEBHOOKS", 2)
    for _ in range(3):
        store.keep(Job("ann", {}, webhook="https://a.test/"), "completed")
    assert store.untried_webhooks() == 2 and "dropped: 2 messages wait for its receiver" in caplog.text


def test_a_damaged_record_is_a_failed_job(store: SqliteStore, caplog: pytest.LogCaptureFixture) -> None:
    job = Job("ann", {"seed": 1}, batch="b" * 32, priority=9, webhook="https://a.test/")
    store.keep(job, "completed")
    for record in ("{", "[]"):
        store.run("UPDATE jobs SET record = ?", record)
        store.run("UPDATE webhooks SET record = ?", record)
        found, message = store.job(job.id), store.next_webhook("ann a.test")
        assert found and message
        assert (found.id, found.owner, found.batch, found.priority) == (job.id, "ann", "b" * 32, 9)
        assert (found.status, found.completed, found.created) == (FAILED, job.created, job.created)
        assert (message.job.id, message.job.status, message.event) == (job.id, FAILED, "completed")
        assert found.error == message.job.error == "the record of this job is damaged; send the image again"
    assert "table webhooks, row 1" in caplog.text and "table jobs, row 1" in caplog.text


def test_everything_that_is_old_expires_in_one_turn(store: SqliteStore) -> None:
    now = time.time()
    jobs = {
        "old": Job("ann", {}, status=DONE, created=now - 200, completed=now - 100, output="old.png"),
        "just ended": Job("ann", {}, status=DONE, created=now - 200, completed=now - 10, output="new.png"),
        "waits": Job("ann", {}, status=WAITING, created=now - 200),
        "runs": Job("ann", {}, status=RUNNING, created=now - 200),
        "failed": Job("ann", {}, status=FAILED, created=now - 200),
        "old too": Job("ann", {}, status=DONE, created=now - 200, completed=now - 51, output="gone.png"),
        "new": Job("ann", {}, status=DONE, created=now, completed=now),
    }
    for job in jobs.values():
        store.keep(job)
        if job.output and job.output != "gone.png":
            store.file("outputs", job.output).write_bytes(b"x")
    for id in ("a" * 32, "b" * 32, "c" * 32):
        store.file("parts", id).write_bytes(b"x")
        store.keep_upload("ann", {"id": id}, store.file("parts", id))
    store.run("UPDATE uploads SET created = ? WHERE id != ?", now - 60, "b" * 32)
    for key in ("old", "new"):
        store.claim("ann", key, "digest", "id")
    store.run("UPDATE idempotency SET created = ? WHERE key = 'old'", now - 60)
    for name in ("old.zip", "new.zip"):
        store.file("zips", name).write_bytes(b"x")
    os.utime(store.file("zips", "old.zip"), (now - 60, now - 60))
    store.expire(50)
    assert {name for name, job in jobs.items() if store.job(job.id)} == {"just ended", "waits", "runs", "new"}
    assert names(store, "outputs") == {"new.png"} and names(store, "uploads") == {"b" * 32}
    assert [record["id"] for record in store.uploads("ann")] == ["b" * 32]
    assert store.claim("ann", "old", "d", "x") is None and store.claim("ann", "new", "d", "x") == ("digest", "id")
    assert names(store, "zips") == {"new.zip"}


def test_notes_of_batches_stay_as_long_as_a_job_of_theirs(store: SqliteStore) -> None:
    now = time.time()
    store.keep(Job("ann", {}, status=WAITING, batch="a" * 32))
    for id in ("a" * 32, "b" * 32, "c" * 32):
        store.keep_note(id, {"owner": "ann"})
        if id[0] != "c":
            os.utime(store.file("notes", id), (now - 60, now - 60))
    store.expire(50)
    assert names(store, "notes") == {"a" * 32, "c" * 32}


def test_the_usage_of_old_days_is_removed(store: SqliteStore) -> None:
    days = [(today() - datetime.timedelta(days=age)).isoformat() for age in (0, USAGE_DAYS - 1, USAGE_DAYS + 1)]
    for day in days:
        store.add_usage("ann", day, 1, 1.0, None)
    store.expire(50)
    assert [day for day, _, _ in store.usage("ann")] == days[:2]


def test_a_damaged_note_is_named(store: SqliteStore) -> None:
    store.file("notes", "a" * 32).write_text("{")
    with pytest.raises(RuntimeError, match=r"notes/a+ is damaged .*; remove it to forget its batch"):
        store.note("a" * 32)


def test_accesses_are_timed(store: SqliteStore) -> None:
    def count() -> float:
        return next(s.value for m in store.seconds.collect() for s in m.samples if s.name.endswith("_count"))

    before = count()
    store.keep(Job("ann", {}))
    store.run("SELECT 1")
    assert count() == before + 2
