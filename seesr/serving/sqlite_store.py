"""Jobs and all else of one server on disk: an SQLite file beside the pictures, so that a kill forgets nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from seesr.serving.job import RUNNING, WAITING, Job

TABLES = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, owner TEXT, status TEXT, priority INTEGER, created REAL, batch TEXT, record TEXT);
CREATE INDEX IF NOT EXISTS jobs_by_owner ON jobs (owner, created);
CREATE TABLE IF NOT EXISTS uploads (id TEXT PRIMARY KEY, owner TEXT, created REAL, record TEXT);
CREATE TABLE IF NOT EXISTS idempotency (owner TEXT, key TEXT, digest TEXT, answer TEXT, created REAL,
    PRIMARY KEY (owner, key));
"""


class Journal:
    """All that must outlive the process; a Ledger (ledger.py), and the jobs of LocalJobs.

    Args:
        folder: holds jobs.sqlite, and the files in inputs, outputs and uploads.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("inputs", "outputs", "uploads", "parts", "zips", "notes"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for part in (folder / "parts").iterdir():  # of bodies that were on their way when the server died
            part.unlink()
        self.lock = threading.Lock()
        self.base = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
        self.base.execute("PRAGMA journal_mode=WAL")
        self.base.execute("PRAGMA synchronous=NORMAL")
        self.base.executescript(TABLES)

    def run(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self.lock:
            return self.base.execute(statement, values).fetchall()

    def keep(self, job: Job) -> None:
        record = json.dumps(dataclasses.asdict(job))
        values = (job.id, job.owner, job.status, job.priority, job.created, job.batch, record)
        self.run("INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?)", *values)

    def job(self, id: str) -> Job | None:
        rows = self.run("SELECT record FROM jobs WHERE id = ?", id)
        return Job(**json.loads(rows[0][0])) if rows else None

    def jobs(self, where: str, *values: Any) -> list[Job]:
        return [Job(**json.loads(row[0])) for row in self.run(f"SELECT record FROM jobs WHERE {where}", *values)]

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
        made = self.run(
            "INSERT OR IGNORE INTO idempotency VALUES (?, ?, ?, ?, ?) RETURNING key",
            owner,
            key,
            digest,
            id,
            time.time(),
        )
        if made:
            return None
        return self.run("SELECT digest, answer FROM idempotency WHERE owner = ? AND key = ?", owner, key)[0]

    def release(self, owner: str, key: str) -> None:
        self.run("DELETE FROM idempotency WHERE owner = ? AND key = ?", owner, key)

    def keep_note(self, id: str, note: dict[str, Any]) -> None:
        self.file("notes", id).write_text(json.dumps(note))

    def note(self, id: str) -> dict[str, Any] | None:
        path = self.file("notes", id)
        return json.loads(path.read_text()) if path.exists() else None

    def file(self, kind: str, name: str) -> Path:
        """A path below the folder; names are ids of our own making."""
        assert "/" not in name and name not in ("", ".", "..")
        return self.folder / kind / name

    def expire(self, seconds: float) -> None:
        """Removes ended jobs, uploads and keys older than this, with their files."""
        limit = time.time() - seconds
        for job in self.jobs("created < ? AND status NOT IN (?, ?)", limit, WAITING, RUNNING):
            self.run("DELETE FROM jobs WHERE id = ?", job.id)
            if job.output:
                self.file("outputs", job.output).unlink(missing_ok=True)
        for id, owner in self.run("SELECT id, owner FROM uploads WHERE created < ?", limit):
            self.drop_upload(owner, id)
        self.run("DELETE FROM idempotency WHERE created < ?", limit)
        for kind in ("zips", "notes"):
            for path in (self.folder / kind).iterdir():
                if path.stat().st_mtime < limit:
                    path.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def close(self) -> None:
        with self.lock:
            self.base.close()
