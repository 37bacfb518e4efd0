"""Jobs, uploads and waiting webhooks of one server on disk: an SQLite file beside the images."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import math
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import Histogram

from seesr.serving.job import FAILED, RUNNING, WAITING, Job
from seesr.serving.metadata_store import USAGE_DAYS, remove_older

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT, status TEXT, priority INTEGER, created REAL, batch TEXT, record TEXT);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, created);
CREATE TABLE IF NOT EXISTS usage (owner TEXT, day TEXT, images INTEGER, megapixels REAL, PRIMARY KEY (owner, day));
CREATE TABLE IF NOT EXISTS uploads (id TEXT PRIMARY KEY, owner TEXT, created REAL, record TEXT);
CREATE TABLE IF NOT EXISTS idempotency (owner TEXT, key TEXT, digest TEXT, answer TEXT, created REAL,
    PRIMARY KEY (owner, key));
CREATE TABLE IF NOT EXISTS webhooks (
    number INTEGER PRIMARY KEY AUTOINCREMENT, receiver TEXT, job TEXT, event TEXT, record TEXT, due REAL,
    tries INTEGER DEFAULT 0);
CREATE INDEX IF NOT EXISTS webhooks_by_receiver ON webhooks (receiver, number);
"""
MAX_WEBHOOKS = 1000  # that wait for one receiver; more are not kept
log = logging.getLogger(__name__)


class Webhook(NamedTuple):
    """A message that a receiver has not taken yet.

    Attributes:
        number: its place in the order of sending.
        job: the job as it was when the event happened.
        due: when it may be tried, seconds since 1970.
        tries: how often it was tried.
    """

    number: int
    job: Job
    event: str
    due: float
    tries: int


class SqliteStore:
    """What must outlive the process: a MetadataStore (metadata_store.py), and the jobs of LocalJobs.

    Args:
        folder: holds jobs.sqlite, and the files in inputs, outputs and uploads. One server uses it at a time.

    Raises:
        ValueError: another server uses the folder, or the file is damaged or cannot be written; one line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.lock = folder, folder / "jobs.sqlite", threading.Lock()
        self.seconds = Histogram(
            "seesr_journal_seconds", "Duration of one access to the job journal on disk", registry=None
        )
        with self.one_line():
            for name in ("inputs", "outputs", "uploads", "parts", "zips", "notes"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            self.handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self.lock_folder()
            with self.one_line():
                self.base = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
                self.base.execute("PRAGMA journal_mode=WAL")
                self.base.execute("PRAGMA synchronous=NORMAL")
                problem = self.base.execute("PRAGMA quick_check(1)").fetchone()[0]
                if problem != "ok":
                    raise sqlite3.DatabaseError(problem)
                self.base.executescript(TABLES)
                self.remove_leftovers()
        except BaseException:
            os.close(self.handle)
            raise

    @contextlib.contextmanager
    def one_line(self) -> Iterator[None]:
        """Storage errors of the start as one line."""
        try:
            yield
        except (OSError, sqlite3.OperationalError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(
                f"SEESR_DATA={self.folder} cannot be written: {reason}; free space there, or set it to another folder"
            ) from error
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{self.path} is damaged: {' '.join(str(error).split())}; restore it from a backup, recover it with "
                f"sqlite3 {self.path} .recover, or move it away to start with an empty queue"
            ) from error

    def lock_folder(self) -> None:
        """Refuses a folder that another server uses: both would run its jobs. The kernel unlocks it at our end."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            other = os.read(self.handle, 20).decode(errors="replace").strip()
            raise ValueError(
                f"SEESR_DATA={self.folder} is used by another server (process {other}); stop it, or set SEESR_DATA to "
                "another folder"
            ) from None
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"{os.getpid()}\n".encode(), 0)

    def remove_leftovers(self) -> None:
        """What a killed server left: half-received bodies, images of no job, keys of no job or batch."""
        for part in (self.folder / "parts").iterdir():
            part.unlink()
        waiting = {id for (id,) in self.run("SELECT id FROM jobs WHERE status IN (?, ?)", WAITING, RUNNING)}
        known = {id for (id,) in self.run("SELECT id FROM jobs")}
        for kind, ids in (("inputs", waiting), ("outputs", known)):
            for path in (self.folder / kind).iterdir():
                if path.name.partition(".")[0].partition("-")[0] not in ids:
                    path.unlink()
        known_ids = known | {path.name for path in (self.folder / "notes").iterdir()}
        for owner, key, id in self.run("SELECT owner, key, answer FROM idempotency"):
            if id not in known_ids:
                self.release(owner, key, id)

    def run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.seconds.time(), self.lock:
            return self.base.execute(statement, values).fetchall()

    def keep(self, job: Job, *events: str) -> None:
        """Writes a job, and the webhooks of these events, in one transaction.

        Raises:
            sqlite3.OperationalError: the disk is full or fails; nothing has changed.
        """
        record = json.dumps(dataclasses.asdict(job))
        values = (job.id, job.owner, job.status, job.priority, job.created, job.batch, record)
        with self.seconds.time(), self.lock:
            self.base.execute("BEGIN IMMEDIATE")
            try:
                self.base.execute("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", values)
                for event in events:
                    if job.wants(event):
                        self.add_webhook(job, event, record)
                self.base.execute("COMMIT")
            except BaseException:
                if self.base.in_transaction:
                    self.base.execute("ROLLBACK")
                raise

    def keep_progress(self, job: Job) -> None:
        """Writes a webhook about a running job's logs; it takes the place of one that waits."""
        with self.lock:
            self.base.execute("DELETE FROM webhooks WHERE job = ? AND event = 'logs' AND tries = 0", (job.id,))
            self.add_webhook(job, "logs", json.dumps(dataclasses.asdict(job)))

    def add_webhook(self, job: Job, event: str, record: str) -> None:
        receiver = job.receiver
        count = self.base.execute("SELECT count(*) FROM webhooks WHERE receiver = ?", (receiver,)).fetchone()[0]
        if count >= MAX_WEBHOOKS:
            log.warning("webhook of job %s dropped: %d messages wait for its receiver", job.id, count)
            return
        self.base.execute(
            "INSERT INTO webhooks (receiver, job, event, record, due) VALUES (?, ?, ?, ?, ?)",
            (receiver, job.id, event, record, time.time()),
        )

    def receivers(self) -> list[str]:
        """Receivers with queued webhooks, longest wait first."""
        return [name for (name,) in self.run("SELECT receiver FROM webhooks GROUP BY receiver ORDER BY min(number)")]

    def next_webhook(self, receiver: str) -> Webhook | None:
        columns = "number, job, record, event, due, tries"
        rows = self.run(f"SELECT {columns} FROM webhooks WHERE receiver = ? ORDER BY number LIMIT 1", receiver)
        if not rows:
            return None
        number, id, record, event, due, tries = rows[0]
        job = self.read_job(record, "webhooks", number, lambda: Job("", {}, id=id, status=FAILED))
        return Webhook(number, job, event, due, tries)

    def delay_webhook(self, number: int, due: float) -> None:
        self.run("UPDATE webhooks SET due = ?, tries = tries + 1 WHERE number = ?", due, number)

    def drop_webhook(self, number: int) -> None:
        self.run("DELETE FROM webhooks WHERE number = ?", number)

    def untried_webhooks(self) -> int:
        return self.run("SELECT count(*) FROM webhooks WHERE tries = 0")[0][0]

    def read_job(self, record: str, table: str, row: int, otherwise: Callable[[], Job]) -> Job:
        """The job of a record; of a damaged one what else is known, as failed with the place of the damage."""
        try:
            return Job.from_record(json.loads(record))
        except (ValueError, TypeError) as error:
            place = f"{self.path}, table {table}, row {row}"
            log.error("damaged job record: %s: %s", place, error)
            job = otherwise()
            job.status, job.error = FAILED, "the record of this job is damaged; send the image again"
            return job

    def job(self, id: str) -> Job | None:
        return next(iter(self.jobs("id = ?", id)), None)

    def jobs(self, where: str, *values: Any) -> list[Job]:
        jobs = []
        select = "SELECT rowid, record, id, owner, priority, created, batch FROM jobs WHERE"
        for row, record, id, owner, priority, created, batch in self.run(f"{select} {where}", *values):
            known = {"id": id, "priority": priority, "created": created, "batch": batch, "completed": created}
            jobs.append(self.read_job(record, "jobs", row, lambda owner=owner, known=known: Job(owner, {}, **known)))
        return jobs

    def unfinished(self) -> list[Job]:
        """What was waiting or running when the process before ended."""
        return self.jobs("status IN (?, ?) ORDER BY created", WAITING, RUNNING)

    def keep_upload(self, owner: str, record: dict[str, Any], path: Path) -> None:
        path.replace(self.upload_file(record["id"]))
        self.run("INSERT INTO uploads VALUES (?, ?, ?, ?)", record["id"], owner, time.time(), json.dumps(record))

    def uploads(self, owner: str, id: str | None = None) -> list[dict[str, Any]]:
        if id is None:
            rows = self.run("SELECT record FROM uploads WHERE owner = ? ORDER BY created DESC", owner)
        else:
            rows = self.run("SELECT record FROM uploads WHERE owner = ? AND id = ?", owner, id)
        return [json.loads(row[0]) for row in rows]

    def upload_file(self, id: str) -> Path:
        return self.file("uploads", id)

    def drop_upload(self, owner: str, id: str) -> None:
        self.run("DELETE FROM uploads WHERE owner = ? AND id = ?", owner, id)
        self.upload_file(id).unlink(missing_ok=True)

    def claim(self, owner: str, key: str, digest: str, id: str) -> tuple[str, str] | None:
        result = self.run(
            "INSERT OR IGNORE INTO idempotency VALUES (?, ?, ?, ?, ?) RETURNING key",
            owner,
            key,
            digest,
            id,
            time.time(),
        )
        if result:
            return None
        return self.run("SELECT digest, answer FROM idempotency WHERE owner = ? AND key = ?", owner, key)[0]

    def release(self, owner: str, key: str, id: str) -> None:
        self.run("DELETE FROM idempotency WHERE owner = ? AND key = ? AND answer = ?", owner, key, id)

    def add_usage(self, owner: str, day: str, images: int, megapixels: float, quota: float | None) -> bool:
        limit = math.inf if quota is None else quota
        if megapixels > limit:
            return False
        return bool(self.run(
            "INSERT INTO usage VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET images = images + ?3, "
            "megapixels = megapixels + ?4 WHERE megapixels + ?4 <= ?5 RETURNING day",
            owner, day, images, megapixels, limit,
        ))  # fmt: skip

    def usage(self, owner: str) -> list[tuple[str, int, float]]:
        select = "SELECT day, images, megapixels FROM usage WHERE owner = ? ORDER BY day DESC LIMIT ?"
        return [(day, images, megapixels) for day, images, megapixels in self.run(select, owner, USAGE_DAYS)]

    def keep_note(self, id: str, note: dict[str, Any]) -> None:
        part = self.file("parts", f"{id}-note")
        part.write_text(json.dumps(note))
        part.replace(self.file("notes", id))  # a killed server leaves all of it or nothing

    def note(self, id: str) -> dict[str, Any] | None:
        path = self.file("notes", id)
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except ValueError as error:
            raise RuntimeError(f"{path} is damaged ({error}); remove it to forget its batch") from error

    def file(self, kind: str, name: str) -> Path:
        """A path below the folder; names are generated ids."""
        assert "/" not in name and name not in ("", ".", "..")
        return self.folder / kind / name

    def expire(self, seconds: float) -> None:
        """Removes jobs that ended longer ago than this, and uploads and keys that are older, with their files."""
        limit = time.time() - seconds
        for job in self.jobs("created < ? AND status NOT IN (?, ?)", limit, WAITING, RUNNING):
            if (job.completed or job.created) >= limit:
                continue
            if job.output:
                self.file("outputs", job.output).unlink(missing_ok=True)
            self.run("DELETE FROM jobs WHERE id = ?", job.id)
        for id, owner in self.run("SELECT id, owner FROM uploads WHERE created < ?", limit):
            self.drop_upload(owner, id)
        self.run("DELETE FROM idempotency WHERE created < ?", limit)
        self.run("DELETE FROM usage WHERE day < date('now', ?)", f"-{USAGE_DAYS} days")
        remove_older(self.folder / "zips", limit)
        remove_older(self.folder / "notes", limit, {batch for (batch,) in self.run("SELECT DISTINCT batch FROM jobs")})

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def close(self) -> None:
        with self.lock:
            self.base.close()
            os.close(self.handle)  # unlocks the folder
