"""Zip archives and image headers that exceed the limits: rejected as a whole or entry by entry."""

from __future__ import annotations

import io
import struct
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from serve.test_background import PNG, begin, serving, status, until  # type: ignore[import-not-found]
from serving import archive, sharp, unpacked

from seesr.images import metadata_limits, read
from seesr.serving import archives, service, uploads
from seesr.serving.job import CANCELED, DONE, RUNNING, WAITING


def damaged(**files: bytes) -> bytes:
    """The first file's bytes are changed; its CRC is not."""
    data = bytearray(archive(zipfile.ZIP_STORED, **files))
    first = next(iter(files.values()))
    data[data.find(first)] ^= 1
    return bytes(data)


def test_a_bad_entry_fails_alone(tmp_path: Path) -> None:
    files, refused = unpacked(damaged(a=b"first", b=b"second"), tmp_path)
    assert [stored.name for stored in files] == ["b"]
    assert refused == [{"name": "a", "code": "invalid_input", "error": "it is damaged (BadZipFile)"}]
    for method in (zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2):
        (tmp_path / "p-1").unlink(missing_ok=True)
        files, refused = unpacked(archive(method, a=bytes(10**6)), tmp_path)
        assert not files and refused[0]["error"] == "its compression is not supported; use stored or deflate"
    data = bytearray(archive(a=bytes(10**5), b=b"good"))
    data[40:60] = b"\xff" * 20  # within the deflate stream of the first
    files, refused = unpacked(bytes(data), tmp_path)
    assert len(refused) == 1 and refused[0]["error"].startswith("it is damaged") and len(files) == 1
    encrypted = archive(a=b"x").replace(b"PK\3\4\x14\0\0\0", b"PK\3\4\x14\0\1\0").replace(
        b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0")  # fmt: skip
    assert unpacked(encrypted, tmp_path)[1] == [
        {"name": "a", "code": "invalid_input", "error": "it is encrypted; send it without a password"}
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "p-1"]


def test_an_archive_is_refused_by_what_it_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "LARGEST_UNPACKED", 10_000_000)
    with pytest.raises(ValueError, match="holds 12000000 bytes; the limit is 10000000"):
        unpacked(archive(a=bytes(4_000_000), b=bytes(4_000_000), c=bytes(4_000_000)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    monkeypatch.setattr(archives, "LARGEST_FILE", 1000)
    assert unpacked(archive(a=bytes(1001)), tmp_path)[1] == [
        {"name": "a", "code": "invalid_input", "error": uploads.TOO_LARGE}
    ]
    monkeypatch.setattr(archives, "MAX_FILES", 2)
    with pytest.raises(ValueError, match="has 3 files; the limit is 2"):
        unpacked(archive(a=b"", b=b"", c=b""), tmp_path)
    monkeypatch.setattr(archives, "MAX_FILES", 0)
    with pytest.raises(ValueError, match="more than 0 entries"):
        unpacked(archive(a=b""), tmp_path)


def test_an_entry_that_declares_less_than_it_holds_is_damaged(tmp_path: Path) -> None:
    data = bytearray(archive(a=bytes(10**6)))
    for place, at in ((data.find(b"PK\3\4"), 22), (data.find(b"PK\1\2"), 24)):
        data[place + at : place + at + 4] = struct.pack("<I", 1000)
    files, refused = unpacked(bytes(data), tmp_path)
    assert not files and refused == [{"name": "a", "code": "invalid_input", "error": "it is damaged (BadZipFile)"}]


@pytest.mark.parametrize(
    "data", [b"", b"PK\3\4", b"no zip", archive(a=b"x" * 99)[:-30]], ids=["empty", "signature", "text", "cut"]
)
def test_what_is_no_zip_is_one_line(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the archive cannot be read"):
        unpacked(data, tmp_path)


def jpeg(*segments: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "JPEG")
    data = buffer.getvalue()
    return data[:2] + b"".join(segments) + data[2:]


def exif(size: int) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", size) + b"Exif\0\0" + bytes(size - 8)


def test_metadata_that_take_minutes_are_refused_by_their_size() -> None:
    started = time.perf_counter()
    for data in (jpeg(exif(65535) * 300), jpeg(exif(8) * 6000)):
        with pytest.raises(ValueError, match="of metadata; the limit is 16 MiB in 5000 segments"):
            read.open_header(data)
    entries = b"".join(struct.pack("<HHII", tag, 2, 100, 2**31 - 1) for tag in range(65535))
    for data in (
        b"II*\0" + struct.pack("<IH", 8, 65535) + entries,
        b"MM\0*" + struct.pack(">IH", 8, 65535) + entries,
        b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 65535) + entries,
    ):
        with pytest.raises(ValueError, match="has 65535 tags; the limit is 1000"):
            read.open_header(data)
    assert time.perf_counter() - started < 1
    assert read.open_header(jpeg(exif(65535) * 100)).size == (16, 16)
    metadata_limits.check_metadata(b"II*\0\xff\xff\xff\xff")  # for the decoder


def test_a_header_that_takes_too_long_does_not_stop_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(service, "size_of", lambda stored: time.sleep(1))
    with serving(tmp_path) as client:
        answer = client.post("/upscale", content=sharp(), headers=PNG)
        assert answer.status_code == 422 and "could not be read in 0 s" in answer.json()["detail"]


def test_a_key_whose_server_was_killed_before_the_job_gets_it_at_the_next_try(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        headers = {**PNG, "Idempotency-Key": "k"}
        app_service = client.app.state.service  # type: ignore[attr-defined]
        claims: list[str] = []
        real = app_service.store.claim

        def claim(owner: str, key: str, digest: str, id: str) -> object:
            claims.append(id)
            return real(owner, key, digest, id)

        app_service.store.claim = claim
        ids = [client.post("/upscale?seed=1&wait=0", content=sharp(), headers=headers).json()["id"]]
        app_service.store.claim = real
        until(lambda: status(client, ids[0]) == "succeeded")
        app_service.jobs.journal.run("DELETE FROM jobs WHERE id = ?", ids[0])
        ids.append(client.post("/upscale?seed=1&wait=0", content=sharp(), headers=headers).json()["id"])
        assert ids == [claims[0], claims[0]]
        until(lambda: status(client, ids[1]) == "succeeded")


def test_one_key_covers_a_batch_and_a_canceled_job_frees_its_key(tmp_path: Path) -> None:
    from lab.serve.echo import Echo

    with serving(tmp_path, Echo(3)) as client:
        blocker = begin(client)
        until(lambda: status(client, blocker) == RUNNING)
        headers = {"Idempotency-Key": "k1", "Content-Type": "application/zip"}
        data = archive(a=sharp(), b=sharp(20, 20), c=b"no image")
        first, second = (client.post("/batches", content=data, headers=headers).json() for _ in range(2))
        assert first["id"] == second["id"] and len(second["jobs"]) == 2 and len(second["refused"]) == 1
        assert [job["id"] for job in first["jobs"]] == [job["id"] for job in second["jobs"]]
        other = client.post("/batches", content=archive(a=sharp()), headers=headers)
        assert other.status_code == 422 and "was used for a different request" in other.json()["detail"]
        for job in first["jobs"]:
            client.delete(f"/jobs/{job['id']}")
        third = client.post("/batches", content=data, headers=headers).json()
        assert third["id"] != first["id"] and len(third["jobs"]) == 2
        for key in ("waits", "runs"):
            one = begin(client, headers={"Idempotency-Key": key}, priority="urgent")
            assert begin(client, headers={"Idempotency-Key": key}, priority="urgent") == one
            assert status(client, one) == WAITING
            if key == "runs":
                client.delete(f"/jobs/{blocker}")
                until(lambda one=one: status(client, one) == RUNNING)
            client.delete(f"/jobs/{one}")
            again = begin(client, headers={"Idempotency-Key": key}, priority="urgent")
            assert again != one
            client.delete(f"/jobs/{again}")
            until(lambda one=one: status(client, one) == CANCELED)
        for job in client.get("/v1/predictions").json()["results"]:
            client.delete(f"/jobs/{job['id']}")
    assert DONE not in {job["status"] for job in third["jobs"]}
