"""Keys of SEESR_KEYS_FILE: the commands, limits, rotation without a restart, and the usage of each key."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from echo_server import PNG, QUICK, serving
from serving import sharp
from starlette.testclient import TestClient

from seesr.cli import main
from seesr.config import Configuration
from seesr.serving import keys

IMAGE = sharp(20, 10)  # at scale 4: 3200 pixels


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEESR_KEYS_FILE", str(tmp_path / "keys.json"))
    return tmp_path / "keys.json"


@pytest.fixture
def add(file: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def added(*arguments: str) -> str:
        assert main(["keys", "add", *arguments]) == 0
        return capsys.readouterr().out.strip()

    return added


@pytest.fixture
def client(file: Path, add: Callable[..., str], tmp_path: Path) -> Iterator[TestClient]:
    add("first")
    with serving(tmp_path / "data", keys_file=file) as client:
        yield client


def upscale(client: TestClient, token: str, **query: Any) -> Any:
    headers = {**PNG, "Authorization": f"Bearer {token}"}
    return client.post("/upscale", params={**QUICK, **query}, content=IMAGE, headers=headers)


def test_the_commands_add_list_and_revoke(
    file: Path, add: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    token = add("ann", "--rate", "5", "--expires", "2020-01-01")
    other = add("ann")
    assert (
        len(base64.urlsafe_b64decode(token + "=")) == 32
        and token not in file.read_text()
        and file.stat().st_mode & 0o777 == 0o600
    )
    assert json.loads(file.read_text())[1] == {"name": "ann", "sha256": keys.digest(other)}
    assert main(["keys", "list"]) == 0
    shown = capsys.readouterr().out
    assert "ann (expired) rate=5 expires=2020-01-01" in shown and keys.digest(other)[:8] in shown
    assert main(["keys", "revoke", keys.digest(token)[:8]]) == 0 and [key.name for key in keys.read_file(file)] == [
        "ann"
    ]
    assert main(["keys", "revoke", "ann"]) == 0 and keys.read_file(file) == []
    assert main(["keys", "revoke", "ann"]) == 2
    assert main(["keys", "add", "bob", "--priorities", "high"]) == 2 and "priorities" in capsys.readouterr().err
    assert main(["keys", "add", "a b"]) == 2


def test_an_empty_keys_file_rejects_everyone_and_a_new_key_works_at_once(
    client: TestClient, add: Callable[..., str]
) -> None:
    assert client.get("/jobs/x").status_code == 401
    old = add("ann")
    job = upscale(client, old).headers["x-job-id"]
    new = add("ann")
    for token in (old, new):
        assert client.get(f"/jobs/{job}", headers={"Authorization": f"Bearer {token}"}).status_code == 200
    assert main(["keys", "revoke", keys.digest(old)[:8]]) == 0
    assert upscale(client, old).status_code == 401
    assert client.get(f"/jobs/{job}", headers={"Authorization": f"Bearer {new}"}).status_code == 200


def test_a_damaged_file_keeps_the_keys(client: TestClient, file: Path, add: Callable[..., str]) -> None:
    token = add("ann")
    assert upscale(client, token).status_code == 200
    good = file.read_text()
    for text in ("{", '[{"name": "ann"}]', '[{"name": "ann", "sha256": "", "rates": 1}]'):
        file.write_text(text)
        assert upscale(client, token).status_code == 200
    file.unlink()
    assert upscale(client, token).status_code == 200
    file.write_text(json.dumps([entry for entry in json.loads(good) if entry["name"] != "ann"]))
    assert upscale(client, token).status_code == 401
    file.write_text("{")
    with pytest.raises(ValueError, match=r"SEESR_KEYS_FILE=.*keys\.json"):
        keys.Keys(Configuration(keys_file=file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "0.name: "), ({"name": "a" * 101}, "0.name: "), ({"sha256": "0" * 63}, "0.sha256: "),
        ({"rate": 0}, "0.rate: "), ({"share": 0}, "0.share: "), ({"share": 1.01}, "0.share: "),
        ({"megapixels_per_day": 0}, "0.megapixels_per_day: "), ({"rates": 1}, "0.rates: "),
        ({"name": "a" * 100, "rate": 1, "share": 1, "megapixels_per_day": 0.001}, None), ({"name": "a"}, None),
    ],
)  # fmt: skip
def test_a_key_out_of_its_limits_is_named(file: Path, changes: dict[str, Any], message: str | None) -> None:
    file.write_text(json.dumps([{"name": "ann", "sha256": "0" * 64, **changes}]))
    if message is None:
        assert len(keys.read_file(file)) == 1
        return
    with pytest.raises(ValueError, match=message):
        keys.read_file(file)
    file.write_text(json.dumps([{"name": "", "sha256": "0", **changes}, {}]))
    with pytest.raises(ValueError, match=r"keys.json: 0\.name: "):  # the first of several
        keys.read_file(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="keys.json: the file: "):
        keys.read_file(file)


def test_a_file_that_did_not_change_is_not_read_again(
    file: Path, add: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    token = add("ann")
    known = keys.Keys(Configuration(keys_file=file))
    monkeypatch.setattr(keys, "read_file", lambda path: pytest.fail("read again"))
    assert known.find(token) is not None and known.find("another") is None


def test_limits_of_a_key(client: TestClient, add: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    token = add("ann", "--rate", "100", "--priorities", "normal,low", "--megapixels-per-day", "0.007")
    refused = upscale(client, token, priority="urgent").json()
    assert (refused["code"], refused["field"]) == ("priority_not_allowed", "priority")
    assert [upscale(client, token).status_code for _ in range(3)] == [200, 200, 429]
    answer = upscale(client, token)
    assert answer.json()["code"] == "quota_exceeded" and 0 < int(answer.headers["retry-after"]) <= 86400
    assert upscale(client, token, scale_factor=1).status_code == 200  # 200 pixels still fit
    usage = client.get("/usage", headers={"Authorization": f"Bearer {token}"}).json()
    assert usage["rate"] == 100 and usage["megapixels_per_day"] == 0.007 and usage["share"] == 0.5
    assert [(day["images"], day["megapixels"]) for day in usage["days"]] == [(3, 0.0066)]
    tomorrow = keys.today() + datetime.timedelta(days=1)
    monkeypatch.setattr("seesr.serving.service.today", lambda: tomorrow)
    assert upscale(client, token).status_code == 200
    slow = add("slow", "--rate", "1")
    assert [upscale(client, slow).status_code for _ in range(2)] == [200, 429]
    old = add("old", "--expires", keys.today().isoformat())
    assert upscale(client, old).status_code == 401


def test_a_quota_refuses_the_files_of_a_batch_that_exceed_it(client: TestClient, add: Callable[..., str]) -> None:
    token = add("ann", "--priorities", "normal", "--megapixels-per-day", "0.007")
    headers, files = {"Authorization": f"Bearer {token}"}, [("image", (f"{n}.png", IMAGE)) for n in range(3)]
    answer = client.post("/batches", params=QUICK, files=files, headers=headers)
    assert answer.status_code == 202 and [job["name"] for job in answer.json()["jobs"]] == ["0.png", "1.png"]
    assert [(file["name"], file["code"]) for file in answer.json()["refused"]] == [("2.png", "quota_exceeded")]
    answer = client.post("/batches", params={**QUICK, "priority": "low"}, files=files, headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (403, "priority_not_allowed")


def test_a_job_that_the_queue_refuses_is_not_counted(tmp_path: Path, file: Path, add: Callable[..., str]) -> None:
    token = add("ann")
    with serving(tmp_path / "data", keys_file=file) as client:
        client.app.state.service.jobs.stop()  # type: ignore[attr-defined]
        assert upscale(client, token).status_code == 503
        days = client.get("/usage", headers={"Authorization": f"Bearer {token}"}).json()["days"]
        assert days[0]["images"] == 0 and days[0]["megapixels"] == 0
