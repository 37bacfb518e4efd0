"""The plain API: event streams on scripted jobs, and single requests on the echo engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from echo_server import PNG, QUICK, serving
from serving import sharp
from starlette.testclient import TestClient

from seesr.serving import api
from seesr.serving.api import KEEP_ALIVE, NO_CHANGE, describe
from seesr.serving.job import CANCELED, DONE, FAILED, RUNNING, WAITING, Job
from seesr.serving.keys import Key
from seesr.settings import Settings

IMAGE = sharp()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("api"), rate=100_000) as client:
        yield client


class Queue:
    """Jobs whose changes a test scripts.

    Args:
        changes: what each wait for a change gives; None: the job is gone.
    """

    def __init__(self, *changes: Job | None) -> None:
        self.changes, self.canceled, self.closing = list(changes), list[str](), False
        self.waits: list[tuple[int, float]] = []
        self.places: dict[str, int] = {}
        self.asked: list[list[str]] = []

    async def changed(self, id: str, revision: int, seconds: float) -> Job | None:
        self.waits.append((revision, seconds))
        if not self.changes:
            await asyncio.sleep(60)
        change = self.changes.pop(0)
        if change is not None and change.name == "closing":
            self.closing = True
        return change

    def find(self, id: str) -> Job:
        return Job("ann", {}, id=id)

    def cancel(self, id: str) -> None:
        self.canceled.append(id)

    def ahead(self, ids: list[str]) -> dict[str, int]:
        self.asked.append(ids)
        return self.places


def service_with(queue: Queue) -> Any:
    def owned(request: Any, id: str) -> Job:
        return queue.find(id)

    return SimpleNamespace(
        jobs=queue, base=lambda request: "http://here", owned=owned, link=lambda base, job: f"{base}/x"
    )


def request_to(service: Any, **query: str) -> Any:
    app = SimpleNamespace(state=SimpleNamespace(service=service))
    scope = {"state": {"key": Key(name="ann", sha256="")}}
    return SimpleNamespace(app=app, scope=scope, query_params=query, path_params={"id": "a"})


def job(status: str = RUNNING, revision: int = 0, **values: Any) -> Job:
    return Job("ann", {}, id="a", status=status, revision=revision, created=1.0, **values)


def collected(items: AsyncIterator[Any]) -> list[Any]:
    async def work() -> list[Any]:
        return [item async for item in items]

    return asyncio.run(work())


def test_an_event_is_written_line_by_line() -> None:
    assert api.event("job", "{}") == "event: job\ndata: {}\n\n"
    assert api.event("logs", "one\ntwo", 3) == "event: logs\nid: 3\ndata: one\ndata: two\n\n"
    assert api.event("logs", "x", 0) == "event: logs\nid: 0\ndata: x\n\n"


def test_changes_come_until_the_end_with_a_word_where_nothing_changes() -> None:
    queue = Queue(job(revision=0), None, job(revision=1), job(revision=2), job(DONE, 3))
    changes = collected(api.changes_of(service_with(queue), job()))
    assert [change and (change.status, change.revision) for change in changes] == [
        (RUNNING, 0), None, None, (RUNNING, 1), (RUNNING, 2), (DONE, 3)
    ]  # fmt: skip
    assert queue.waits == [(0, KEEP_ALIVE)] * 3 + [(1, KEEP_ALIVE), (2, KEEP_ALIVE)]
    assert collected(api.changes_of(service_with(Queue()), job(FAILED))) == [job(FAILED)]
    assert collected(api.changes_of(service_with(Queue(job(DONE))), job())) == [job(), None, job(DONE)]


def test_a_job_that_waits_is_not_followed_by_a_server_that_stops() -> None:
    queue = Queue()
    queue.closing = True
    assert collected(api.changes_of(service_with(queue), job(WAITING))) == [job(WAITING)]
    queue = Queue(job(DONE, 1))
    queue.closing = True
    assert [change.status for change in collected(api.changes_of(service_with(queue), job()))] == [RUNNING, DONE]
    queue = Queue(job(WAITING, name="closing"))
    changes = collected(api.changes_of(service_with(queue), job(WAITING)))
    assert [change and change.status for change in changes] == [WAITING, WAITING], "it ends at once"


def stream(service: Any, **query: str) -> AsyncIterator[Any]:
    response: Any = asyncio.run(api.events(request_to(service, **query)))
    assert response.headers["cache-control"] == "no-store" and response.headers["x-accel-buffering"] == "no"
    return response.body_iterator


def test_the_stream_of_a_job_has_its_progress_and_its_end() -> None:
    queue = Queue(job(revision=0), job(RUNNING, 1), job(DONE, 2, output="a.png"))
    queue.find = lambda id: job()  # type: ignore[method-assign]
    parts = collected(stream(service_with(queue)))
    assert [part.partition("\n")[0] for part in parts] == ["event: progress", NO_CHANGE.strip(), "event: progress",
                                                           "event: end"]  # fmt: skip
    assert json.loads(parts[-1].split("data: ")[1])["result"] == "http://here/x" and not queue.canceled


@pytest.mark.parametrize(
    ("query", "changes", "closing", "canceled"),
    [
        ({"cancel_on_close": "1"}, [], False, ["a"]), ({"cancel_on_close": "true"}, [], False, ["a"]),
        ({"cancel_on_close": "on"}, [], False, ["a"]), ({"cancel_on_close": "0"}, [], False, []), ({}, [], False, []),
        ({"cancel_on_close": "1"}, [job(DONE, 1)], False, []), ({"cancel_on_close": "1"}, [], True, []),
    ],
)  # fmt: skip
def test_closing_the_stream_cancels_the_job_where_that_is_wanted(
    query: dict[str, str], changes: list[Job], closing: bool, canceled: list[str]
) -> None:
    queue = Queue(*changes)
    queue.find = lambda id: job()  # type: ignore[method-assign]

    async def read() -> None:
        response: Any = await api.events(request_to(service_with(queue), **query))
        parts = response.body_iterator
        for _ in range(1 + len(changes)):
            await anext(parts)
        queue.closing = closing
        await parts.aclose()

    asyncio.run(read())
    assert queue.canceled == canceled


class Steps:
    """The turns of a stream of all jobs: what each finds, when, and what waits."""

    def __init__(self, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queue, self.now, self.turns = queue, 0.0, list[Callable[[dict[str, Job]], list[Job]]]()
        self.pauses: list[float] = []
        monkeypatch.setattr(api, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(api, "changes", self.changes)
        monkeypatch.setattr(api, "asyncio", SimpleNamespace(sleep=self.sleep, to_thread=asyncio.to_thread))

    def changes(self, service: Any, owner: str, revisions: Any, active: dict[str, Job]) -> list[Job]:
        assert owner == "ann"
        if len(self.turns) == 1:
            self.queue.closing = True
        return self.turns.pop(0)(active)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


def test_the_stream_of_all_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue()
    steps = Steps(queue, monkeypatch)
    waiting, running = Job("ann", {}, id="w", status=WAITING), Job("ann", {}, id="r", status=RUNNING)

    def first(active: dict[str, Job]) -> list[Job]:
        active |= {"w": waiting, "r": running}
        queue.places = {"w": 3}
        return [waiting, running]

    def turn(seconds: float, *jobs: Job, places: dict[str, int] | None = None) -> Callable[[dict[str, Job]], list[Job]]:
        def work(active: dict[str, Job]) -> list[Job]:
            steps.now += seconds
            queue.places = queue.places if places is None else places
            return list(jobs)

        return work

    def ended(active: dict[str, Job]) -> list[Job]:
        active.clear()
        return []

    steps.turns = [
        first, turn(0.0), turn(KEEP_ALIVE), turn(0.5), turn(KEEP_ALIVE), turn(0.0, places={"w": 2}),
        turn(0.0, running), turn(KEEP_ALIVE), turn(0.0, places={}), ended, turn(0.0),
    ]  # fmt: skip
    response: Any = asyncio.run(api.all_events(request_to(service_with(queue))))
    parts = collected(response.body_iterator)
    names = [line.removeprefix("event: ") for part in parts for line in part.split("\n")
             if line.startswith(("event", ":"))]  # fmt: skip
    assert names == ["job", "job", "queue", "ready", NO_CHANGE.strip(), "queue", "job"]
    assert 'data: {"w": 3}' in parts[1] and 'data: {"w": 2}' in "".join(parts[3:])
    assert steps.pauses == [api.EVENTS_INTERVAL] * 10 and 0 < api.EVENTS_INTERVAL <= 0.5 and 5 <= KEEP_ALIVE <= 30
    assert queue.asked == [["w"]] * 9, "the places are asked only while something waits"


def test_a_job_as_programs_see_it() -> None:
    service = service_with(Queue())
    done = describe(service, "http://here", job(DONE, progress=0.5, seconds_left=1.0, output="a.png"))
    assert (done["progress"], done["seconds_left"], done["result"]) == (1.0, None, "http://here/x")
    running = describe(service, "http://here", job(progress=0.5, seconds_left=1.0), 4)
    assert (running["progress"], running["seconds_left"], running["result"], running["ahead"]) == (0.5, 1.0, None, 4)
    failed = describe(service, "http://here", job(FAILED, error="x", seconds_left=1.0))
    assert (failed["error"], failed["seconds_left"], failed["result"], failed["ahead"]) == ("x", None, None, None)
    assert running["urls"] == {
        "self": "http://here/jobs/a", "events": "http://here/jobs/a/events", "result": "http://here/jobs/a/result"
    }  # fmt: skip


def test_the_place_of_a_job_is_shown_while_it_waits() -> None:
    queue = Queue()
    queue.places = {"a": 7}
    for status, ahead in ((WAITING, 7), (RUNNING, None)):
        queue.find = lambda id, status=status: job(status)  # type: ignore[method-assign, misc]
        response = api.show(request_to(service_with(queue)))
        assert json.loads(bytes(response.body))["ahead"] == ahead


@pytest.mark.parametrize(
    ("status", "error", "code", "message"),
    [(FAILED, "too large", "job_failed", "too large"), (CANCELED, None, "canceled", "the job was canceled")],
)
def test_a_job_without_a_result_is_an_error(status: str, error: str | None, code: str, message: str) -> None:
    with pytest.raises(api.Refused, match=message) as caught:
        api.file_of(service_with(Queue()), job(status, error=error))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "filename"),
    [("my photo.jpeg", "my photo-x2.webp"), ("noext", "noext-x2.webp"), (".hidden", ".hidden-x2.webp")],
)
def test_a_result_is_named_after_its_image(name: str, filename: str, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"x")
    service = SimpleNamespace(result=lambda job: tmp_path / "r")
    settings = {**Job.of("ann", Settings(seed=5, scale_factor=2, output_format="webp")).settings}
    response: Any = api.file_of(service, Job("ann", settings, id="a", status=DONE, name=name))  # type: ignore[arg-type]
    assert response.filename == filename and response.media_type == "image/webp"
    assert response.headers["x-seed"] == "5" and response.headers["x-job-id"] == "a"


def test_a_job_without_a_result_yet_says_its_status(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    service = client.app.state.service  # type: ignore[attr-defined]
    id = client.post("/upscale", params=QUICK, content=IMAGE, headers=PNG).headers["x-job-id"]
    stored = service.jobs.find(id)
    stored.status = RUNNING
    monkeypatch.setattr(service.jobs, "find", lambda id: stored)
    answer = client.get(f"/jobs/{id}/result")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_finished")
    assert answer.json()["detail"] == "the job has no result yet: its status is processing"
    answer = client.delete(f"/jobs/{id}")
    assert answer.status_code == 202 and answer.json()["id"] == id


def test_a_request_that_is_not_waited_for_gets_the_address_of_its_job(client: TestClient) -> None:
    answer = client.post("/upscale", params={**QUICK, "wait": 0}, content=IMAGE, headers=PNG)
    assert answer.status_code == 202 and answer.headers["location"] == answer.json()["urls"]["self"]
    link = client.post("/upscale", params={**QUICK, "answer": "link"}, content=IMAGE, headers=PNG)
    assert link.status_code == 200 and set(link.json()) == {"file_key", "public_url"}
    assert client.get(link.json()["public_url"]).content == IMAGE


@pytest.mark.parametrize(
    ("kind", "status"),
    [("image/png", 200), ("IMAGE/JPEG", 200), ("application/octet-stream", 200), ("", 200), ("text/html", 415),
     ("application/xml", 415)],
)  # fmt: skip
def test_the_types_of_an_image_body(client: TestClient, kind: str, status: int) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert client.post("/upscale", params=QUICK, content=IMAGE, headers=headers).status_code == status


def form(files: int, fields: int) -> dict[str, Any]:
    names = ["image", "mask", *(f"more{number}" for number in range(files - 2))][:files]
    return {"files": [(name, ("a.png", IMAGE, "image/png")) for name in names],
            "data": {f"field{number}": "" for number in range(fields)}}  # fmt: skip


@pytest.mark.parametrize(("files", "fields", "code"), [(2, 0, None), (3, 0, "invalid_body"), (1, 100, "invalid_input"),
                                                       (1, 101, "invalid_body")])  # fmt: skip
def test_a_form_has_an_image_a_mask_and_its_settings(
    client: TestClient, files: int, fields: int, code: str | None
) -> None:
    answer = client.post("/upscale", params=QUICK, **form(files, fields))
    assert (None if answer.status_code == 200 else answer.json()["code"]) == code


def test_a_form_may_call_the_image_a_file(client: TestClient) -> None:
    assert client.post("/upscale", params=QUICK, files={"file": ("a.png", IMAGE, "image/png")}).content == IMAGE


@pytest.mark.parametrize(
    ("mask", "code"), [("http://a.test/a.png", "url_not_allowed"), ("data:image/png;base64,AAAA", "invalid_input")]
)
def test_an_error_of_the_mask_names_it(client: TestClient, mask: str, code: str) -> None:
    files = {"image": ("a.png", IMAGE, "image/png")}
    answer = client.post("/upscale", params=QUICK, files=files, data={"mask": mask})
    body = answer.json()
    assert (body["code"], body["field"]) == (code, "mask") and "the mask cannot be used: " in body["detail"]


def test_a_quote_of_a_server_that_has_unloaded_the_model(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
    for deadline, met in ((None, None), (1000, True)):
        params = QUICK if deadline is None else {**QUICK, "deadline": deadline}
        assert client.post("/quote", params=params, content=IMAGE, headers=PNG).json()["meets_deadline"] is met
    monkeypatch.setattr(jobs, "quote", lambda job, path: None)
    answer = client.post("/quote", params=QUICK, content=IMAGE, headers=PNG)
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready") and "unloaded" in answer.json()["detail"]
    monkeypatch.setattr(jobs, "failure", "the device has failed")
    answer = client.post("/quote", params=QUICK, content=IMAGE, headers=PNG)
    assert (answer.status_code, answer.json()["detail"]) == (503, "the device has failed")


def test_a_fleet_without_rates_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path, redis="redis://127.0.0.1:1/0") as client:
        jobs = client.app.state.service.jobs  # type: ignore[attr-defined]
        monkeypatch.setattr(jobs, "quote", lambda job, path: None)
        answer = client.post("/quote", params=QUICK, content=IMAGE, headers=PNG)
        assert (answer.status_code, answer.json()["code"]) == (501, "no_quotes")
