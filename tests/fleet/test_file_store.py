"""The images of a fleet in an object store that is a folder."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import obstore
import pytest

from seesr.fleet import file_store
from seesr.fleet.file_store import MAX_CALLS, CallLimit, FileStore
from seesr.serving.job import Job, Unavailable


def seconds(objects: FileStore, operation: str) -> float:
    """How often an operation was timed."""
    samples = [sample for metric in objects.seconds.collect() for sample in metric.samples]
    return sum(s.value for s in samples if s.name.endswith("_count") and s.labels["operation"] == operation)


def test_a_file_is_written_read_fetched_and_removed(objects: FileStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"from disk")
    objects.put("in/a", tmp_path / "file")
    objects.put("in/b", b"first")
    objects.put("in/b", b"second")
    objects.put("in/b", b"third", once=True)
    assert objects.read("in/a") == b"from disk" and objects.read("in/b") == b"second"
    path = objects.get("in/b")
    assert path.read_bytes() == b"second" and path.parent == objects.cache
    objects.put("in/b", b"changed")
    assert objects.get("in/b").read_bytes() == b"second", "what was fetched is not fetched again"
    assert objects.exists("in/b")
    for _ in range(2):  # one that is gone is no error
        objects.drop("in/b")
    assert not objects.exists("in/b") and not path.exists()
    for read in (objects.get, objects.read):
        with pytest.raises(FileNotFoundError):
            read("in/b")
    assert not list(objects.cache.iterdir()), "nothing of the failed fetch is left"
    counts = [seconds(objects, operation) for operation in ("put", "get", "head", "delete")]
    assert counts == [5, 5, 2, 2]


def test_inputs_and_masks_are_removed_together(objects: FileStore) -> None:
    plain, masked = Job("ann", {}), Job("ann", {}, masked=True)
    for job in (plain, masked):
        for kind in ("", "-mask"):
            objects.put(f"in/{job.id}{kind}", b"x")
            objects.get(f"in/{job.id}{kind}")
    objects.forget_inputs(masked)
    assert objects.exists(f"in/{masked.id}-mask") and len(list(objects.cache.iterdir())) == 2
    objects.forget_inputs(masked)
    objects.drop_inputs(masked)
    assert not any(objects.exists(f"in/{masked.id}{kind}") for kind in ("", "-mask"))
    objects.drop_inputs(plain)
    assert not objects.exists(f"in/{plain.id}") and objects.exists(f"in/{plain.id}-mask"), "it has none"


def test_old_files_are_listed_page_by_page_in_every_folder(
    objects: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = obstore.list, []

    def listed(store: Any, folder: str, chunk_size: int) -> Any:
        sizes.append(chunk_size)
        return real(store, folder, chunk_size=2)

    monkeypatch.setattr(obstore, "list", listed)
    names = [f"{folder}/{number}" for folder in file_store.FOLDERS for number in range(5)]
    for name in [*names, "in/new", "elsewhere/old"]:
        objects.put(name, b"x")
        if name != "in/new":
            os.utime(tmp_path / "store" / name, (time.time() - 100,) * 2)
    pages = list(objects.older(50))
    assert sorted(name for page in pages for name in page) == sorted(names)
    assert len(pages) > len(file_store.FOLDERS) and min(sizes) > 100
    assert not [name for page in objects.older(200) for name in page]


def test_a_store_is_probed_now_and_then(
    objects: FileStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, probes = [1000.0], []
    monkeypatch.setattr(file_store, "time", SimpleNamespace(monotonic=lambda: now[0], monotonic_ns=time.monotonic_ns))

    def head(store: Any, name: str) -> None:
        probes.append(now[0])
        if len(probes) == 2:
            raise obstore.exceptions.GenericError("a\nb")

    monkeypatch.setattr(obstore, "head", head)
    interval = file_store.PROBE_INTERVAL
    with caplog.at_level(logging.WARNING):
        for seconds, reason in ((0.0, None), (interval, None), (0.1, "the object store is unavailable"),
                                (interval - 0.1, "the object store is unavailable"), (0.2, None)):  # fmt: skip
            now[0] += seconds
            assert objects.unavailable() == reason
    assert len(probes) == 3 and "object store: a b" in caplog.text and 1 <= interval <= 10


@pytest.mark.parametrize("error", [obstore.exceptions.GenericError("down"), OSError("no such host")])
def test_errors_of_a_store_are_unavailable(
    error: Exception, objects: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*values: Any, **more: Any) -> None:
        raise error

    for name in ("put", "get", "head", "delete"):
        monkeypatch.setattr(obstore, name, fail)
    calls = [lambda: objects.put("in/a", b""), lambda: objects.get("in/a"), lambda: objects.read("in/a"),
             lambda: objects.exists("in/a"), lambda: objects.drop("in/a")]  # fmt: skip
    for call in calls:
        with pytest.raises(Unavailable, match="the object store is unavailable"):
            call()
    assert not list(objects.cache.iterdir())


def test_files_that_were_fetched_long_ago_are_removed(objects: FileStore) -> None:
    for name in ("old", "new"):
        (objects.cache / name).write_bytes(b"x")
    os.utime(objects.cache / "old", (time.time() - 100,) * 2)
    objects.trim(50)
    assert [path.name for path in objects.cache.iterdir()] == ["new"] and objects.free_bytes() > 0


def test_a_call_that_ends_gives_its_place_back_and_the_oldest_one_counts() -> None:
    limit = CallLimit(2, slow=60)
    with pytest.raises(LookupError), limit.call():
        raise LookupError
    with limit.call(), limit.call():
        assert len(limit.started) == 2
        limit.started[min(limit.started)] -= 59
        now = time.monotonic()
        limit.slow = 59.1
        with pytest.raises(Unavailable, match="too slow"), limit.call():
            pass
        assert time.monotonic() - now < 1, "it waits for the oldest call only until that is slow"
    assert not limit.started and limit.number == 3


def test_a_hanging_store_leaves_threads_to_other_routes(objects: FileStore) -> None:
    async def threads() -> float:
        return anyio.to_thread.current_default_thread_limiter().total_tokens

    assert objects.limit.max_running == MAX_CALLS < anyio.run(threads) / 2
    assert objects.limit.slow == file_store.SLOW
