"""What all routes share: waiting for a job, signed links, checks of files, names and times."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_server import PNG, QUICK, serving
from PIL import Image
from serving import ANN, sharp
from starlette.testclient import TestClient

from lab.report import ROOT
from seesr.serving import service as service_module
from seesr.serving.job import CANCELED, DONE, FAILED, RUNNING, WAITING, Job
from seesr.serving.keys import Key
from seesr.serving.refusal import Refused
from seesr.serving.service import HEADER_SECONDS, LINK_SECONDS, Service, check_mask, check_priority, is_id, when
from seesr.serving.uploads import Stored
from seesr.settings import Settings
from seesr.settings.validation import FieldError


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("service"), rate=100_000) as client:
        yield client


@pytest.fixture
def service(client: TestClient) -> Service:
    return client.app.state.service  # type: ignore[attr-defined]


class Jobs:
    """Changes of one job, in turn; a number is how long the job stays as it is, seconds."""

    def __init__(self, *changes: str | float) -> None:
        self.changes, self.canceled, self.closing = list(changes), list[str](), False

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        change = self.changes.pop(0) if self.changes else 60.0
        if isinstance(change, float):
            await asyncio.sleep(min(change, seconds))
            return Job("ann", {}, id=id, status=RUNNING)
        return None if change == "gone" else Job("ann", {}, id=id, status=change)

    def cancel(self, id: str) -> None:
        self.canceled.append(id)


class Caller:
    """A request whose caller hangs up after so many looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    async def is_disconnected(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def waited(
    service: Service, jobs: Jobs, seconds: float, status: str = WAITING, request: Any = None
) -> tuple[Job, float]:
    started = time.monotonic()
    job = Job("ann", {}, id="a", status=status)
    result = asyncio.run(dataclasses.replace(service, jobs=jobs).wait(job, seconds, request))  # type: ignore[arg-type]
    return result, time.monotonic() - started


def test_a_job_is_waited_for_until_its_end_or_for_so_many_seconds(service: Service) -> None:
    job, seconds = waited(service, Jobs(RUNNING, RUNNING, DONE), 20)
    assert job.status == DONE and seconds < 10
    jobs = Jobs(DONE)
    assert waited(service, jobs, 0)[0].status == WAITING and jobs.changes == [DONE], "not looked for"
    assert waited(service, jobs, 20, FAILED)[0].status == FAILED and jobs.changes == [DONE]
    job, seconds = waited(service, Jobs(), 0.1)
    assert job.status == RUNNING and 0.09 < seconds < 10
    job, _ = waited(service, Jobs("gone", DONE), 20)
    assert job.status == DONE, "a record that cannot be read for a moment"


def test_a_server_that_stops_keeps_only_the_callers_of_the_running_job(service: Service) -> None:
    jobs = Jobs(DONE)
    jobs.closing = True
    assert waited(service, jobs, 20)[0].status == WAITING and jobs.changes == [DONE]
    assert waited(service, jobs, 20, RUNNING)[0].status == DONE


def test_a_caller_that_hangs_up_cancels_its_job_once_and_is_waited_for(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0 < service_module.POLL <= 1
    monkeypatch.setattr(service_module, "POLL", 0.01)
    jobs = Jobs(0.3, CANCELED)
    caller = Caller(3)
    job, _ = waited(service, jobs, 20, RUNNING, caller)
    assert job.status == CANCELED and jobs.canceled == ["a"] and caller.looks == -1
    jobs = Jobs(0.1, DONE)
    assert waited(service, jobs, 20, RUNNING, Caller(999))[0].status == DONE and not jobs.canceled


def query_of(service: Service, name: str) -> dict[str, str]:
    return dict(urllib.parse.parse_qsl(service.signed_query(name)))


def test_a_link_is_good_for_one_hour(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| links to results | valid for one hour;" in (ROOT / "docs/server.md").read_text()
    now = [1_000_000.75]
    monkeypatch.setattr(service_module, "time", SimpleNamespace(time=lambda: now[0]))
    query = query_of(service, "x.png")
    assert int(query["expires"]) == 1_000_000 + 60 * 60 == 1_000_000 + LINK_SECONDS
    now[0] = float(query["expires"])
    service.check_link("x.png", query)
    for name, changes, seconds in (("x.png", {}, 1.0), ("y.png", {}, 0.0), ("x.png", {"expires": "9999999"}, 0.0),
                                   ("x.png", {"signature": ""}, 0.0)):  # fmt: skip
        now[0] = float(query["expires"]) + seconds
        with pytest.raises(Refused, match="invalid or has expired") as error:
            service.check_link(name, {**query, **changes})
        assert error.value.status == 404
    late = 10**12 - 1
    service.check_link("x.png", {"expires": str(late), "signature": service.signature("x.png", late)})
    for expires in (str(late * 10), "", "x", "-1", "0x10"):
        with pytest.raises(Refused):
            service.check_link("x.png", {"expires": expires, "signature": service.signature("x.png", late * 10)})


def test_a_link_leads_to_its_result_alone(client: TestClient, service: Service) -> None:
    id = client.post("/upscale", params=QUICK, content=sharp(), headers=PNG).headers["x-job-id"]
    job = service.jobs.find(id)
    assert job and job.output
    assert service.linked(job.output, query_of(service, job.output)).read_bytes() == sharp()
    for name in (f"{id}.webp", id, "0" * 32 + ".png"):
        with pytest.raises(Refused, match="the result has expired"):
            service.linked(name, query_of(service, name))
    assert service.data_uri(job) == "data:image/png;base64," + base64.b64encode(sharp()).decode()


def request_of(key: Key | None = None, **headers: str) -> Any:
    scope = {"state": {"key": key or Key(name="ann", sha256="")}}
    return SimpleNamespace(scope=scope, headers=headers, base_url="http://here/")


def test_the_address_of_the_server(service: Service) -> None:
    assert service.base(request_of()) == "http://here"
    configured = service.configuration.model_copy(update={"public_url": "https://images.example/"})
    assert dataclasses.replace(service, configuration=configured).base(request_of()) == "https://images.example"


def test_an_upload_of_this_server_is_named_by_its_address(client: TestClient, service: Service) -> None:
    file = client.post("/v1/files", files={"content": ("a.png", sharp(), "image/png")}).json()
    request = request_of(Key(name="local", sha256=""))
    begin = "http://here/v1/files/"
    for url in (begin + file["id"], f"{begin}{file['id']}/download", f"{begin}{file['id']}?x=1"):
        found = service.source(request, url)
        assert found.record["id"] == file["id"] and found.path.read_bytes() == sharp()
    for other in ("http://there/v1/files/x", b"bytes", None, 5):
        assert service.source(request, other) is other
    with pytest.raises(Refused, match="no file has this ID"):
        service.source(request, begin + "0" * 32)
    with pytest.raises(Refused, match="no file has this ID"):
        service.source(request_of(), begin + file["id"])  # another's
    part = service.part(request)
    assert request.scope["state"]["parts"] == [part] and part.parent.name == "parts" and len(part.name) == 32


@pytest.mark.parametrize(
    ("text", "good"), [("a" * 64, True), ("a" * 65, False), ("é", False), ("a-b", False), ("", False), ("0a", True)]
)
def test_what_can_be_an_id(text: str, good: bool) -> None:
    assert is_id(text) is good


def test_times_are_utc_with_milliseconds() -> None:
    assert when(None) is None and when(0) == "1970-01-01T00:00:00.000Z"
    assert when(1_600_000_000.5) == "2020-09-13T12:26:40.500Z"


def test_a_priority_must_be_one_of_the_key() -> None:
    key = Key(name="ann", sha256="", priorities=("normal", "low"))
    assert (
        check_priority(request_of(key), {}) == "normal"
        and check_priority(request_of(key), {"priority": "low"}) == "low"
    )
    with pytest.raises(Refused, match="priority is urgent; this key may use normal, low") as error:
        check_priority(request_of(key), {"priority": "urgent"})
    assert (error.value.status, error.value.field) == (403, "priority")


def stored(folder: Path, name: str, data: bytes) -> Stored:
    (folder / name).write_bytes(data)
    return Stored(folder / name, name, "")


def png(folder: Path, name: str, width: int, height: int) -> Stored:
    Image.new("L", (width, height)).save(folder / name, "PNG")
    return Stored(folder / name, name, "")


def test_files_are_checked_before_they_are_queued(service: Service, tmp_path: Path) -> None:
    """What cannot be used is removed, with the name of its field."""
    for image, mask, field, message in (
        (b"", None, "image", "image is required: the file is empty"),
        (b"text", None, "image", "not an image"),
        (sharp(), b"text", "mask", "the mask cannot be used: "),
    ):
        files = stored(tmp_path, "image", image), mask and stored(tmp_path, "mask", mask)
        with pytest.raises(FieldError, match=message) as error:
            asyncio.run(service.check(files[0], Settings(), files[1] or None))
        assert error.value.field == field and not list(tmp_path.iterdir())
    image = png(tmp_path, "image", 40, 20)
    with pytest.raises(FieldError) as error:
        asyncio.run(service.check(png(tmp_path, "wide", 5000, 10), Settings(scale_factor=8)))
    assert error.value.field == "scale_factor"
    asyncio.run(service.check(image, Settings(), png(tmp_path, "mask", 80, 40)))
    with pytest.raises(FieldError) as error:
        check_mask(png(tmp_path, "mask", 40, 40), (40, 20))
    assert error.value.field == "mask"
    assert f"worker thread within {HEADER_SECONDS:g} s" in (ROOT / "docs/security.md").read_text()


def test_an_idempotency_key_is_for_one_request_until_its_job_is_canceled(client: TestClient, service: Service) -> None:
    request = request_of(**{"idempotency-key": "k"})
    assert service.claim(request_of(), ["a"], "x") is None, "no key"
    job = Job.of("ann", Settings(seed=1))
    service.jobs.submit(job, stored(service.part(request).parent, "image", sharp()).path)
    assert service.claim(request, ["a"], job.id) is None and service.claim(request, ["a"], "y") == job.id
    with pytest.raises(Refused, match="was used for a different request") as error:
        service.claim(request, ["b"], "y")
    assert error.value.status == 422
    service.release(request_of(), job.id)
    assert service.claim(request, ["a"], "y") == job.id
    service.release(request, "another job")
    assert service.claim(request, ["a"], "y") == job.id
    service.release(request, job.id)
    assert service.claim(request, ["b"], "y") is None


@pytest.mark.parametrize(
    ("statuses", "cancel", "canceled"),
    [
        ([], False, False), ([CANCELED], False, True), ([RUNNING], False, False), ([RUNNING], True, True),
        ([DONE], True, False), ([CANCELED, DONE], False, False), ([CANCELED, RUNNING], True, True),
    ],
)  # fmt: skip
def test_when_a_job_or_a_batch_counts_as_canceled(
    statuses: list[str], cancel: bool, canceled: bool, service: Service
) -> None:
    jobs = [Job("ann", {}, status=status, cancel=cancel) for status in statuses]
    found = jobs[0] if len(jobs) == 1 else None
    queue = SimpleNamespace(find=lambda id: found, batch=lambda owner, id: jobs if owner == "ann" and not found else [])
    assert dataclasses.replace(service, jobs=queue).canceled("ann", "x") is canceled  # type: ignore[arg-type]


def test_jobs_of_a_platform_belong_to_it(tmp_path: Path) -> None:
    with serving(tmp_path, "http://10.0.0.1", platform="sagemaker", api_keys=f"ann:{ANN}") as client:
        answer = client.post("/invocations", params=QUICK, content=sharp(), headers=PNG)
        service: Service = client.app.state.service  # type: ignore[attr-defined]
        job = service.jobs.find(answer.headers["x-job-id"])
        assert job and job.owner == "sagemaker"


def test_a_quota_is_full_until_the_next_utc_day(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "time", SimpleNamespace(time=lambda: 86400 * 100 + 86000.5))
    key, settings = Key(name="small", sha256="", megapixels_per_day=0.005), Settings(seed=1)
    image, queued = stored(tmp_path, "image", sharp(24, 18)).path, list[Job]()
    queue = SimpleNamespace(submit=lambda job, image, mask: queued.append(job))
    limited = dataclasses.replace(service, jobs=queue)  # type: ignore[arg-type]
    with pytest.raises(Refused, match=r"the result has 0\.0 MP and would exceed the 0\.005 MP of this key") as error:
        limited.queue(key, Job.of("small", settings), settings, image, None)  # 96x72 pixels
    assert error.value.headers == {"Retry-After": "400"} and not queued
    limited.queue(key, Job.of("small", settings), settings.replace(scale_factor=2), image, None)
    assert len(queued) == 1 and service.store.usage("small")[0][1:] == (1, 48 * 36 / 1e6)


def test_a_job_that_is_not_queued_is_not_counted(service: Service, tmp_path: Path) -> None:
    def fail(*values: Any) -> None:
        raise LookupError("broken")

    settings, image = Settings(seed=1), stored(tmp_path, "image", sharp()).path
    broken = dataclasses.replace(service, jobs=SimpleNamespace(submit=fail))  # type: ignore[arg-type]
    with pytest.raises(LookupError):
        broken.queue(Key(name="unlucky", sha256=""), Job.of("unlucky", settings), settings, image, None)
    assert service.store.usage("unlucky")[0][1:] == (0, 0.0)
