"""Uploads, idempotency keys, quotas and batch notes: one server's store and a fleet's behave the same."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.report import ROOT
from seesr.fleet.file_store import FileStore
from seesr.fleet.metadata_store import FleetMetadataStore
from seesr.fleet.redis_client import RedisClient
from seesr.serving.keys import today
from seesr.serving.metadata_store import USAGE_DAYS, MetadataStore, remove_older
from seesr.serving.sqlite_store import SqliteStore

ID, OTHER = "a" * 32, "b" * 32


@pytest.fixture(params=["sqlite", "fleet"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MetadataStore]:
    if request.param == "sqlite":
        opened: Any = SqliteStore(tmp_path / "data")
    else:
        redis, objects = request.getfixturevalue("redis"), request.getfixturevalue("objects")
        opened = FleetMetadataStore(redis, objects, tmp_path / "data", 3600)
    yield opened
    opened.close()


def keep(store: MetadataStore, owner: str, id: str) -> None:
    part = store.file("parts", id)
    part.write_bytes(id.encode())
    store.keep_upload(owner, {"id": id, "name": "x.png"}, part)
    assert not part.exists()


def test_an_idempotency_key_is_claimed_once_and_released_by_its_holder(store: MetadataStore) -> None:
    assert store.claim("ann", "k", "digest", ID) is None
    assert store.claim("ann", "k", "another digest", OTHER) == ("digest", ID)
    assert store.claim("bob", "k", "digest", OTHER) is None and store.claim("ann", "l", "digest", OTHER) is None
    store.release("ann", "k", OTHER)
    assert store.claim("ann", "k", "digest", OTHER) == ("digest", ID)
    store.release("ann", "k", ID)
    assert store.claim("ann", "k", "digest", OTHER) is None
    store.release("nobody", "k", ID)


def test_a_quota_is_used_up_exactly_and_given_back(store: MetadataStore) -> None:
    day = today().isoformat()
    assert [store.add_usage("ann", day, 1, 0.5, 1.0) for _ in range(3)] == [True, True, False]
    assert not store.add_usage("eve", day, 1, 1.5, 1.0) and store.usage("eve") == []
    assert store.add_usage("eve", day, 1, 1.5, 1.5)
    assert store.add_usage("ann", day, -1, -0.5, None) and store.usage("ann") == [(day, 1, 0.5)]
    assert store.add_usage("ann", day, 2, 1000.0, None) and store.usage("ann") == [(day, 3, 1000.5)]


def test_the_usage_of_the_last_days_is_shown_newest_first(store: MetadataStore) -> None:
    days = [f"2030-{number // 28 + 1:02}-{number % 28 + 1:02}" for number in range(USAGE_DAYS + 3)]
    for day in days:
        store.add_usage("ann", day, 1, 1.0, None)
    assert store.usage("ann") == [(day, 1, 1.0) for day in days[: -USAGE_DAYS - 1 : -1]]
    assert store.usage("bob") == []
    schemas = json.loads((ROOT / "docs/openapi.json").read_text())["components"]["schemas"]
    assert f"the last {USAGE_DAYS} days" in schemas["Usage"]["properties"]["days"]["description"]


def test_uploads_belong_to_their_owner_and_come_newest_first(store: MetadataStore) -> None:
    for number in range(3):
        keep(store, "ann", str(number) * 32)
        time.sleep(0.002)
    keep(store, "bob", OTHER)
    assert [record["id"][0] for record in store.uploads("ann")] == ["2", "1", "0"]
    assert [record["name"] for record in store.uploads("ann", "1" * 32)] == ["x.png"]
    assert store.uploads("ann", OTHER) == [] and store.uploads("eve") == []
    assert store.upload_file("1" * 32).read_bytes() == b"1" * 32
    store.drop_upload("ann", "1" * 32)
    assert [record["id"][0] for record in store.uploads("ann")] == ["2", "0"] and not store.uploads("ann", "1" * 32)
    with contextlib.suppress(FileNotFoundError):
        assert not store.upload_file("1" * 32).exists()


def test_a_note_of_a_batch_is_read_again(store: MetadataStore) -> None:
    assert store.note(ID) is None
    store.keep_note(ID, {"refused": [], "owner": "ann"})
    assert store.note(ID) == {"refused": [], "owner": "ann"} and store.note(OTHER) is None
    assert store.free_bytes() > 0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_does_not_lead_out_of_the_folder(store: MetadataStore, name: str) -> None:
    with pytest.raises(AssertionError):
        store.file("parts", name)
    assert store.file("parts", "ok").parent.is_dir() and store.file("zips", "ok").parent.is_dir()


@pytest.mark.parametrize("kind", ["parts", "zips"])
def test_old_scratch_files_are_removed(redis: RedisClient, objects: FileStore, tmp_path: Path, kind: str) -> None:
    store = FleetMetadataStore(redis, objects, tmp_path / "data", 3600)
    paths = [store.file(kind, "old"), store.file(kind, "new"), objects.cache / "old"]
    for path in paths:
        path.write_bytes(b"x")
    for path in paths[::2]:
        os.utime(path, (time.time() - 100,) * 2)
    store.expire(50)
    assert [path.exists() for path in paths] == [False, True, False]


def test_records_of_a_fleet_end_by_themselves(redis: RedisClient, objects: FileStore, tmp_path: Path) -> None:
    """As Redis has them: a key, an upload and a note with SEESR_KEEP, the usage with the days that are shown."""
    store, client = FleetMetadataStore(redis, objects, tmp_path / "data", 3600), redis.client
    store.claim("ann", "k", "digest", ID)
    store.add_usage("ann", "2030-01-01", 1, 1.0, None)
    keep(store, "ann", ID)
    store.keep_note(OTHER, {})
    assert 3590 <= client.ttl("seesr:key:ann:k") <= 3600
    assert 0 <= USAGE_DAYS * 86400 - client.ttl("seesr:usage:ann") <= 5
    for name in (f"upload:{ID}", f"batch:{OTHER}"):
        assert client.zscore("seesr:expiry", name) == pytest.approx(time.time() + 3600, abs=5)


def test_the_list_of_uploads_has_a_page(redis: RedisClient, objects: FileStore, tmp_path: Path) -> None:
    store = FleetMetadataStore(redis, objects, tmp_path / "data", 3600)
    for number in range(102):
        id = f"{number:032}"
        redis.client.set(f"seesr:upload:{id}", f'["ann", {{"id": "{id}"}}]')
        redis.client.zadd("seesr:uploads:ann", {id: number})
    assert [int(record["id"]) for record in store.uploads("ann")] == [*range(101, 1, -1)]


def test_files_are_removed_by_their_age_and_not_by_name(tmp_path: Path) -> None:
    for name, written in (("old", 999), ("kept", 999), ("older", 1), ("on time", 1000), ("new", 1001)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (written, written))
    remove_older(tmp_path, 1000, {"kept", None})
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "on time", "new"}
    remove_older(tmp_path, 1001)
    assert {path.name for path in tmp_path.iterdir()} == {"new"}
