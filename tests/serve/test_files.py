"""Uploads, archives and batches: limits of forms, names, and what is written into the zip of results."""

from __future__ import annotations

import asyncio
import hashlib
import json
import zipfile
from collections.abc import AsyncIterator, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_server import QUICK, serving
from serving import archive, sharp, unpacked
from starlette.testclient import TestClient

from lab.report import ROOT
from seesr.images.limits import LARGEST_FILE
from seesr.serving import archives, batches, uploads
from seesr.serving.files import LARGEST_METADATA
from seesr.serving.job import CANCELED, DONE, FAILED, Job
from seesr.serving.middleware import LARGEST_BODY
from seesr.serving.refusal import Refused
from seesr.serving.uploads import Uploaded, clean_name, store, store_image
from seesr.settings import Settings
from seesr.settings.validation import FieldError

IMAGE = sharp()
FILE = ("a.png", IMAGE, "image/png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    with serving(folder, rate=100_000, keep=2) as client:
        yield client


def test_an_upload_is_described(client: TestClient) -> None:
    metadata = {"a": [1, "x"]}
    answer = client.post("/v1/files", files={"content": FILE}, data={"metadata": json.dumps(metadata)})
    assert answer.status_code == 201
    file = answer.json()
    assert (file["name"], file["size"], file["content_type"], file["metadata"]) == (
        "a.png", len(IMAGE), "image/png", metadata
    )  # fmt: skip
    md5 = hashlib.md5(IMAGE, usedforsecurity=False).hexdigest()
    assert file["checksums"] == {"sha256": hashlib.sha256(IMAGE).hexdigest(), "md5": md5} and file["etag"] == md5
    times = [datetime.fromisoformat(file[name]) for name in ("created_at", "expires_at")]
    assert (times[1] - times[0]).total_seconds() == pytest.approx(2 * 3600, abs=0.01), "SEESR_KEEP"
    assert len(file["id"]) == 32 and file["urls"]["get"].endswith(f"/v1/files/{file['id']}")
    assert client.get(f"/v1/files/{file['id']}").json() == file
    assert client.get(f"/v1/files/{file['id']}/download").content == IMAGE


@pytest.mark.parametrize(
    ("files", "fields", "status"), [(2, 0, 201), (3, 0, 400), (1, 4, 201), (1, 5, 400), (2, 4, 201)]
)
def test_the_form_of_an_upload_has_few_parts(client: TestClient, files: int, fields: int, status: int) -> None:
    parts = [("content", FILE), *(("other", ("b.json", b"{}", "application/json")) for _ in range(files - 1))]
    answer = client.post("/v1/files", files=parts, data={f"field{number}": "x" for number in range(fields)})
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(("more", "status"), [(0, 201), (1, 400)])
def test_metadata_has_the_documented_size(client: TestClient, folder: Path, more: int, status: int) -> None:
    assert f"`metadata` of a file to {LARGEST_METADATA // 1024} KiB" in (ROOT / "docs/security.md").read_text()
    text = "{" + " " * (LARGEST_METADATA - 2 + more) + "}"
    answer = client.post("/v1/files", files={"content": FILE}, data={"metadata": text})
    assert answer.status_code == status
    file = ("m.json", text.encode(), "application/json")
    answer = client.post("/v1/files", files={"content": FILE, "metadata": file})
    assert answer.status_code == (201 if status == 201 else 413)
    assert not list((folder / "parts").iterdir())


@pytest.mark.parametrize("metadata", ["{", "1e999", "[1]", '"x"'])
def test_metadata_must_be_an_object(client: TestClient, metadata: str) -> None:
    answer = client.post("/v1/files", files={"content": FILE}, data={"metadata": metadata})
    assert answer.status_code == 422 and "metadata" in answer.json()["detail"]


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


def test_a_file_may_have_exactly_the_documented_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{LARGEST_FILE / 2**20:.0f} MiB per image" in (ROOT / "docs/security.md").read_text()
    assert uploads.TOO_LARGE == "the image file is larger than 100 MiB"
    monkeypatch.setattr(uploads, "LARGEST_FILE", 6)
    stored = asyncio.run(store(pieces(b"123", b"456"), tmp_path / "a", "x/y.png"))
    assert stored.path.read_bytes() == b"123456" and stored.name == "y.png"
    assert stored.digest == hashlib.sha256(b"123456").hexdigest()
    with pytest.raises(Refused) as error:
        asyncio.run(store(pieces(b"123", b"4567"), tmp_path / "b", "x"))
    assert error.value.code == "too_large" and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("name", "clean"), [("x" * 120, "x" * 120), ("x" * 121, "x" * 120), (" .a.png. ", "a.png"), ('a:*?<>|b"', "ab")]
)
def test_a_file_name_is_short_and_harmless(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_images_come_from_uploads_streams_and_data_uris_alone(tmp_path: Path) -> None:
    def stored(source: Any, name: str = "image") -> Any:
        return asyncio.run(store_image(source, tmp_path / "part", "", name))

    (tmp_path / "upload").write_bytes(IMAGE)
    record = {"name": "up.png", "checksums": {"sha256": "digest"}}
    result = stored(Uploaded(tmp_path / "upload", record))
    assert (result.name, result.digest, result.path.read_bytes()) == ("up.png", "digest", IMAGE)
    for source in (pieces(IMAGE), " DATA:image/png;base64,QUJD"):
        (tmp_path / "part").unlink()
        assert stored(source).name == "image"
    assert (tmp_path / "part").read_bytes() == b"ABC"
    (tmp_path / "part").unlink()
    for source in (5, "/etc/passwd", "file:///etc/passwd", None):
        with pytest.raises(FieldError, match="mask must be a data URI, an upload of this server or an http"):
            stored(source, "mask")


def test_an_archive_may_have_exactly_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"| files of one batch | {archives.MAX_FILES} |" in (ROOT / "docs/server.md").read_text()
    assert archives.LARGEST_UNPACKED == 2 * LARGEST_BODY
    monkeypatch.setattr(archives, "LARGEST_FILE", 10)
    monkeypatch.setattr(archives, "LARGEST_UNPACKED", 30)
    monkeypatch.setattr(archives, "MAX_FILES", 4)
    files, refused = unpacked(archive(a=bytes(10), b=bytes(11), c=bytes(10), d=bytes(10)), tmp_path)
    assert [stored.name for stored in files] == ["a", "c", "d"] and [entry["name"] for entry in refused] == ["b"]
    assert [stored.path.name for stored in files] == ["p-0", "p-2", "p-3"] and not (tmp_path / "p-1").exists()
    assert files[0].digest == hashlib.sha256(bytes(10)).hexdigest() and files[0].path.read_bytes() == bytes(10)
    for data, message in (
        (archive(a=bytes(10), b=bytes(10), c=bytes(10), d=bytes(1)), "holds 31 bytes; the limit is 30"),
        (archive(**dict.fromkeys("abcde", b"x")), "has 5 files; the limit is 4"),
    ):
        for path in tmp_path.glob("p-*"):
            path.unlink()
        with pytest.raises(ValueError, match=message):
            unpacked(data, tmp_path)
        assert not list(tmp_path.glob("p-*"))


def test_folders_are_no_files_and_entries_are_counted_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_FILES", 2)
    folders = {f"{name}/": b"" for name in "abcdefghijklmnopqr"}  # 18 folders and 2 files: ten times the limit
    files, refused = unpacked(archive(**folders, x=b"1", y=b"2"), tmp_path)
    assert len(files) == 2 and not refused
    with pytest.raises(ValueError, match="has more than 20 entries; the limit is 2 files"):
        unpacked(archive(**folders, **{"s/": b""}, x=b"1", y=b"2"), tmp_path)


def test_a_disk_that_is_full_ends_the_whole_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = archives.unpack_entry, list[str]()

    def unpack_entry(opened: Any, entry: Any, path: Path) -> Any:
        calls.append(entry.filename)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        return real(opened, entry, path)

    monkeypatch.setattr(archives, "unpack_entry", unpack_entry)
    with pytest.raises(OSError, match="No space left"):
        unpacked(archive(a=b"1", b=b"2", c=b"3", d=b"4"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"] and len(calls) == 3


@pytest.mark.parametrize("fields", [100, 101])
def test_a_batch_has_as_many_fields_as_an_image(client: TestClient, fields: int) -> None:
    data = {f"field{number}": "x" for number in range(fields)}
    answer = client.post("/batches", files={"image": FILE}, data=data)
    assert answer.json()["code"] == ("invalid_input" if fields == 100 else "invalid_body")


def test_a_batch_without_files_or_of_another_type_is_refused(client: TestClient) -> None:
    answer = client.post("/batches", files={"x": (None, "y")})
    assert (answer.status_code, answer.json()["detail"]) == (422, "the batch has no files")
    answer = client.post("/batches", content=b"x", headers={"Content-Type": "image/png"})
    assert answer.status_code == 415 and "form of files, or a zip" in answer.json()["detail"]
    data = archive(zipfile.ZIP_BZIP2, a=IMAGE)
    answer = client.post("/batches", params=QUICK, content=data, headers={"Content-Type": "APPLICATION/ZIP"})
    assert answer.status_code == 202 and answer.json()["jobs"] == [] and len(answer.json()["refused"]) == 1
    batch = client.get(f"/batches/{answer.json()['id']}").json()
    assert batch["status"] == "ended" and batch["result"].endswith(f"/batches/{batch['id']}/result")


def test_a_batch_that_runs_has_no_result_yet(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = client.post("/batches", params=QUICK, files={"image": FILE}).json()
    jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
    running = [Job("local", Job.of("local", Settings(seed=1)).settings, status=DONE, output="x"), Job("local", {})]
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "batch", lambda owner, id: running)
        shown = client.get(f"/batches/{batch['id']}").json()
        assert shown["status"] == "processing" and shown["result"] is None and len(shown["jobs"]) == 2
        answer = client.get(f"/batches/{batch['id']}/result")
        assert (answer.status_code, answer.json()["code"]) == (409, "not_finished")
    assert client.get("/batches/none").status_code == 404


def test_a_batch_that_cannot_be_noted_is_taken_back(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets an error without an id: its next try sends all of it again."""
    service = client.app.state.service  # type: ignore[attr-defined]
    canceled: list[str] = []

    def fail(id: str, note: Any) -> None:
        raise OSError(28, "No space left on device")

    headers = {"Idempotency-Key": "whole"}
    files = [("image", (f"{number}.png", IMAGE, "image/png")) for number in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(service.store, "keep_note", fail)
        patch.setattr(service.jobs, "cancel", canceled.append)
        assert client.post("/batches", params=QUICK, files=files, headers=headers).status_code == 503
    assert len(canceled) == 2
    again = client.post("/batches", params=QUICK, files=files, headers=headers)
    assert again.status_code == 202 and len(again.json()["jobs"]) == 2


def test_a_key_whose_batch_is_still_received_says_so(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    monkeypatch.setattr(service.store, "claim", lambda owner, key, digest, id: (digest, "0" * 32))
    answer = client.post("/batches", params=QUICK, files={"image": FILE}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_expired")


def test_the_zip_of_a_batch_has_every_result_once_and_the_names_of_what_failed(tmp_path: Path) -> None:
    settings = Job.of("ann", Settings(seed=1)).settings

    def job(name: str, status: str = DONE, **values: Any) -> Job:
        return Job("ann", settings, name=name, status=status, **values)

    jobs = [job("a.png"), job("bad.png", FAILED, error="it is damaged"), job("a.jpg"), job("noext"),
            job("c.png", CANCELED), job("removed.png"), job("last.png")]  # fmt: skip
    for each in jobs:
        (tmp_path / each.id).write_bytes(each.name.encode())

    def result(job: Job) -> Path:
        if job.name == "removed.png":
            raise Refused("expired", "the result was removed")
        return tmp_path / job.id

    service: Any = SimpleNamespace(result=result)
    refused: Any = [{"name": "text.txt", "code": "invalid_input", "error": "not an image"}]
    batches.write_zip(service, tmp_path / "part", tmp_path / "a.zip", jobs, refused)
    assert not (tmp_path / "part").exists()
    with zipfile.ZipFile(tmp_path / "a.zip") as opened:
        files = {name: opened.read(name).decode() for name in opened.namelist()}
        assert {entry.compress_type for entry in opened.infolist()} == {zipfile.ZIP_STORED}, "images are compressed"
    second = f"a-{jobs[2].id[:8]}.png"
    assert files.pop("failed.txt").splitlines() == [
        "text.txt: not an image", "bad.png: it is damaged", "c.png: canceled", "removed.png: the result was removed"
    ]  # fmt: skip
    assert files == {"a.png": "a.png", second: "a.jpg", "noext.png": "noext", "last.png": "last.png"}
    batches.write_zip(service, tmp_path / "part", tmp_path / "b.zip", jobs[:1], [])
    assert zipfile.ZipFile(tmp_path / "b.zip").namelist() == ["a.png"]
