"""The plain API: bodies, forms, jobs, events, batches, keys."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import zipfile

import pytest
import requests
from cog_client import data_uri, png
from PIL import Image
from serving import ANN, BOB, LONG, QUICK, Serving, sharp

from seesr import Engine, Settings


def test_every_entry_point_gives_the_bytes_of_the_engine(service: Serving, engine: Engine) -> None:
    image = sharp()
    expected = engine.run(image, Settings(**QUICK)).data
    body = service.upscale(image)
    form = service.ask("POST", "/upscale", files={"image": ("my-photo.png", image)}, data=QUICK)
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    in_json = service.ask("POST", "/upscale", json={"image": uri, **QUICK})
    assert [answer.status_code for answer in (body, form, in_json)] == [200] * 3
    assert body.content == form.content == in_json.content == expected
    assert body.headers["content-type"] == "image/png" and body.headers["x-seed"] == "1"
    assert 'filename="my-photo-x4.png"' in form.headers["content-disposition"]


def test_the_format_and_a_drawn_seed_come_back(service: Serving) -> None:
    answer = service.ask(
        "POST", "/upscale", params={**QUICK, "seed": "", "output_format": "webp"}, data=sharp(),
        headers={"Content-Type": "image/png"},
    )  # fmt: skip
    assert answer.headers["content-type"] == "image/webp"
    again = service.upscale(seed=answer.headers["x-seed"], output_format="webp")
    assert again.content == answer.content


def test_all_views_come_as_one_zip(service: Serving, engine: Engine) -> None:
    answer = service.upscale(output_view="all")
    assert answer.headers["content-type"] == "application/zip"
    assert 'filename="image-x4.zip"' in answer.headers["content-disposition"]
    assert answer.content == engine.run(sharp(), Settings(**QUICK, output_view="all")).data


def test_one_stream_has_all_jobs_of_a_key(service: Serving) -> None:
    """Those from before, then each change, and never another key's; closing it cancels nothing."""
    earlier = service.upscale().headers["x-job-id"]
    foreign = service.upscale(token=BOB).headers["x-job-id"]
    seen: dict[str, list[dict[str, object]]] = {}
    with service.ask("GET", "/events", stream=True) as stream:
        lines, later = stream.iter_lines(), ""
        for line in lines:
            if line == b"event: ready":
                assert seen[earlier][-1]["status"] == "succeeded"
                later = service.begin(num_inference_steps=4)["id"]
            elif line.startswith(b'data: {"id'):
                job = json.loads(line[6:])
                seen.setdefault(job["id"], []).append(job)
                if job["id"] == later and job["status"] == "processing":
                    break
    assert service.until(later, "succeeded", "canceled")["status"] == "succeeded"
    assert foreign not in seen


def test_a_job_streams_its_progress_and_then_its_result(service: Serving) -> None:
    job = service.begin(num_inference_steps=4, seed=2)  # no earlier run has cached stages
    seen = []
    with service.ask("GET", f"/jobs/{job['id']}/events", stream=True) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith(b"data: "):
                seen.append(json.loads(line[6:]))
    assert seen[-1]["status"] == "succeeded" and seen[-1]["metrics"]["seed"] == 2
    assert {"denoise", "decode"} <= {event["stage"] for event in seen}
    assert all(event["done"] <= event["total"] for event in seen)
    result = service.ask("GET", f"/jobs/{job['id']}/result")
    linked = requests.get(seen[-1]["result"], timeout=30)  # the link needs no key
    assert result.content == linked.content == service.upscale(num_inference_steps=4, seed=2).content


def test_a_slow_reader_receives_the_end_event(service: Serving) -> None:
    for _ in range(10):
        job = service.begin(scale_factor=1)
        with service.ask("GET", f"/jobs/{job['id']}/events", stream=True) as stream:
            lines = stream.iter_lines()
            first = next(lines)  # the end itself if the job was quicker
            time.sleep(0.15)
            assert b"event: end" in [first, *lines]


@pytest.mark.parametrize("change", ["signature", "expires"])
def test_a_forged_or_expired_link_is_refused(service: Serving, change: str) -> None:
    job = service.until(service.begin()["id"], "succeeded")
    link = job["result"].replace(f"{change}=", f"{change}=1", 1)
    answer = requests.get(link, timeout=30)
    assert answer.status_code == 404 and "invalid or has expired" in answer.json()["detail"]


def test_cancelling_a_running_and_a_waiting_job(service: Serving) -> None:
    running, waiting = service.begin(**LONG), service.begin(**LONG)
    service.until(running["id"], "processing")
    assert service.ask("DELETE", f"/jobs/{waiting['id']}").json()["status"] == "canceled"
    started = time.monotonic()
    service.ask("DELETE", f"/jobs/{running['id']}")
    service.until(running["id"], "canceled")
    assert time.monotonic() - started < 1
    assert service.upscale().status_code == 200


@pytest.mark.parametrize("how", ["wait", "events"])
def test_a_disconnect_cancels_the_job(service: Serving, how: str) -> None:
    headers = {"Authorization": f"Bearer {ANN}", "Content-Type": "image/png", "Idempotency-Key": "hang up"}
    if how == "wait":
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(f"{service.url}/upscale", params=LONG, data=sharp(), timeout=1, headers=headers)
    else:
        job = service.begin(**LONG)
        stream = service.ask("GET", f"/jobs/{job['id']}/events?cancel_on_close=1", stream=True)
        lines = stream.iter_lines()
        next(lines)
        service.until(job["id"], "processing")
        stream.close()
    started = time.monotonic()
    while service.ask("GET", "/status").json()["running"] is not None:
        assert time.monotonic() - started < 1.5
        time.sleep(0.02)
    if how == "wait":  # the canceled job has released its key
        params = {**LONG, "wait": 0}
        again = requests.post(f"{service.url}/upscale", params=params, data=sharp(), timeout=10, headers=headers)
        assert again.status_code == 202 and again.json()["status"] in ("starting", "processing"), again.text
        service.ask("DELETE", f"/jobs/{again.json()['id']}")


def test_an_idempotency_key_gives_the_same_job_or_is_refused(service: Serving) -> None:
    def send(seed: int, token: str = ANN) -> requests.Response:
        headers = {"Content-Type": "image/png", "Idempotency-Key": "order 5"}
        params = {"num_inference_steps": 1, "seed": seed, "wait": 0}
        return service.ask("POST", "/upscale", token, params=params, data=sharp(), headers=headers)

    first, again = send(1).json(), send(1)
    service.until(first["id"], "succeeded")
    assert (again.json() if again.status_code == 202 else {"id": again.headers["x-job-id"]})["id"] == first["id"]
    assert send(2).status_code == 422
    other = send(2, BOB)
    assert other.status_code == 202 and other.json()["id"] != first["id"]


def test_a_batch_of_files_in_which_a_bad_one_fails_alone(service: Serving) -> None:
    files = [("image", ("a.png", sharp())), ("image", ("b.png", b"no image")), ("image", ("a.png", sharp(20, 20)))]
    batch = service.ask("POST", "/batches", files=files, data={**QUICK, "priority": "low"}).json()
    assert [job["name"] for job in batch["jobs"]] == ["a.png", "a.png"]
    assert batch["refused"][0]["name"] == "b.png" and "not an image" in batch["refused"][0]["error"]
    for job in batch["jobs"]:
        service.until(job["id"], "succeeded")
    body = service.ask("GET", f"/batches/{batch['id']}").json()
    assert body["status"] == "ended"
    archive = zipfile.ZipFile(io.BytesIO(service.ask("GET", f"/batches/{batch['id']}/result").content))
    names = archive.namelist()
    assert len(names) == 3 and "a.png" in names and "failed.txt" in names
    assert archive.read("a.png") == service.upscale().content
    assert archive.read("failed.txt").startswith(b"b.png: ")
    assert service.ask("GET", f"/batches/{batch['id']}", BOB).status_code == 404


def test_a_zip_is_a_batch_and_its_paths_are_not_followed(service: Serving) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("../../etc/evil.png", sharp())
        archive.writestr("folder/broken.png", b"x")
    headers = {"Content-Type": "application/zip"}
    batch = service.ask("POST", "/batches", params=QUICK, data=buffer.getvalue(), headers=headers).json()
    assert [job["name"] for job in batch["jobs"]] == ["evil.png"]
    assert [(file["name"], file["code"]) for file in batch["refused"]] == [("broken.png", "invalid_input")]
    service.until(batch["jobs"][0]["id"], "succeeded")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"scale_factor": "9"}, "must be from 1 to 8"),
        ({"scale_factor": "big"}, "must be a float"),
        ({"num_inference_steps": "1.5"}, "must be an int"),
        ({"use_kds": "perhaps"}, "must be a bool"),
        ({"color_fix": "lab"}, "wavelet, adain, none"),
        ({"wait": "1e9"}, "wait is 1e9; it must be from 0 to 600"),
        ({"priority": "first"}, "must be one of urgent, normal, low"),
        ({"deadline": "-1"}, "deadline is -1"),
        ({"upscaler": "x"}, "there is no input 'upscaler'"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(service: Serving, query: dict, message: str) -> None:
    answer = service.upscale(**query)
    assert answer.status_code == 422 and message in answer.json()["detail"] and "\n" not in answer.json()["detail"]


def test_a_deadline_of_one_job(service: Serving) -> None:
    """Refused at once, since three images have told how long it would take."""
    for seed in range(3):
        assert service.upscale(**{**QUICK, "seed": seed}).status_code == 200
    answer = service.upscale(deadline=0.2, **LONG)
    assert answer.status_code == 409 and "a deadline of 0.2 s cannot be met" in answer.json()["detail"]
    assert answer.json()["code"] == "deadline_too_short" and answer.json()["quote"]["seconds"] > 0.2


def test_keys(service: Serving) -> None:
    for token in (None, "wrong", ANN + "x", ANN[:-1]):
        answer = service.ask("GET", "/v1/predictions", token)
        assert answer.status_code == 401 and "valid authentication" in answer.json()["detail"]
    job = service.begin()
    service.until(job["id"], "succeeded")
    for path in (f"/jobs/{job['id']}", f"/jobs/{job['id']}/result", f"/v1/predictions/{job['id']}"):
        assert service.ask("GET", path, BOB).status_code == 404
    assert job["id"] not in service.ask("GET", "/v1/predictions", BOB).text


def test_logs_hold_no_token_and_no_prompt(service: Serving) -> None:
    answer = service.upscale(user_prompt="a very secret prompt", headers={})
    assert answer.status_code == 200
    deadline = time.monotonic() + 5
    while answer.headers["x-request-id"] not in (log := service.log()):  # written once the answer is sent
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert ANN not in log and "secret prompt" not in log


def test_hundred_requests_of_sixteen_clients_come_back_in_order_of_priority(service: Serving) -> None:
    blocker = service.begin(**LONG)
    service.until(blocker["id"], "processing")
    names, lock, jobs = iter([("low", "normal", "urgent")[n % 3] for n in range(100)]), threading.Lock(), []

    def client() -> None:
        while True:
            with lock:
                priority = next(names, None)
            if priority is None:
                return
            job = service.begin(priority=priority, scale_factor=1, fidelity=1)  # soon made
            with lock:
                jobs.append((job["id"], priority))

    threads = [threading.Thread(target=client) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(jobs) == 100
    service.ask("DELETE", f"/jobs/{blocker['id']}")
    ended = [(service.until(id, "succeeded", seconds=120)["completed"], priority) for id, priority in jobs]
    order = [priority for _, priority in sorted(ended)]
    assert order == sorted(order, key=["urgent", "normal", "low"].index)


def test_an_idle_server_adds_little(service: Serving, engine: Engine) -> None:
    image, overheads = sharp(), []
    for _ in range(15):
        started = time.perf_counter()
        job = service.upscale(image).headers["x-job-id"]
        whole = time.perf_counter() - started
        metrics = service.ask("GET", f"/jobs/{job}").json()["metrics"]
        overheads.append(whole - sum(metrics["seconds"].values()))
    assert min(overheads) < 0.015, overheads  # the least: a busy machine only adds


def test_the_description_has_every_setting(service: Serving) -> None:
    import dataclasses

    names = [field.name for field in dataclasses.fields(Settings)]
    body = service.ask("GET", "/settings", None).json()
    assert [field["name"] for field in body["fields"]] == names and set(body["presets"]) >= {"fast", "careful"}
    document = service.ask("GET", "/openapi.json", None).json()
    parameters = {parameter["name"] for parameter in document["paths"]["/upscale"]["post"]["parameters"]}
    parameters -= {"Idempotency-Key"}
    assert parameters == {*names, "wait", "priority", "deadline", "answer"}


def test_a_mask_comes_by_form_by_json_and_by_replicates_client(service: Serving, engine: Engine) -> None:
    """Black stays the plain enlargement, whichever way it came."""
    white, black = (png(Image.new("L", (24, 18), value)) for value in (255, 0))
    expected = engine.run(sharp(), Settings(**QUICK), mask=black).data
    form = service.ask("POST", "/upscale", files={"image": sharp(), "mask": black}, data=QUICK)
    assert form.content == expected != service.upscale().content
    values = {"image": data_uri(sharp()), "mask": data_uri(black), **QUICK}
    assert service.ask("POST", "/upscale", json=values).content == expected
    result = service.ask("POST", "/v1/models/you/seesr/predictions", json={"input": values}, headers={"Prefer": "wait"})
    assert base64.b64decode(result.json()["output"].partition(",")[2]) == expected
    vertex = {"instances": [{"image": data_uri(sharp())}], "parameters": {"mask": data_uri(white), **QUICK}}
    answer = service.ask("POST", "/invocations", json=vertex).json()
    assert (
        base64.b64decode(answer["predictions"][0]["image"]) == engine.run(sharp(), Settings(**QUICK), mask=white).data
    )


def test_a_mask_is_compared_with_the_upright_image(service: Serving) -> None:
    """A phone's image lies on its side in the file; who paints a mask sees it upright."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.open(io.BytesIO(sharp())).save(buffer, "PNG", exif=exif)
    mask = png(Image.new("L", (18, 24), 255))
    answer = service.ask("POST", "/upscale", files={"image": buffer.getvalue(), "mask": mask}, data=QUICK)
    assert answer.status_code == 200
    decoded = Image.open(io.BytesIO(answer.content))
    assert decoded.height > decoded.width


def test_a_mask_that_cannot_be_used_is_refused_before_it_waits(service: Serving) -> None:
    turned, inputs = png(Image.new("L", (18, 24))), service.folder / "data/parts"
    for mask, message in ((turned, "aspect ratios differ"), (b"no image", "the mask cannot be used")):
        for requested in (
            {"files": {"image": sharp(), "mask": mask}, "data": QUICK},
            {"json": {"image": data_uri(sharp()), "mask": data_uri(mask), **QUICK}},
        ):
            answer = service.ask("POST", "/upscale", **requested)
            assert answer.status_code == 422 and message in answer.json()["detail"]
    answer = service.ask("POST", "/upscale", json={"image": data_uri(sharp()), "mask": 7, **QUICK})
    assert answer.status_code == 422 and "mask" in answer.json()["detail"]
    batch = service.ask("POST", "/batches", files={"a": sharp()}, data={**QUICK, "mask": "x"})
    assert batch.status_code == 422 and "there is no input 'mask'" in batch.json()["detail"]
    assert not list(inputs.iterdir())


def test_a_link_instead_of_the_file(service: Serving) -> None:
    body = service.upscale(answer="link").json()
    assert set(body) == {"file_key", "public_url"} and body["file_key"] in body["public_url"]
    assert requests.get(body["public_url"], timeout=30).content == service.upscale().content
    refused = service.upscale(answer="fax")
    assert refused.status_code == 422 and "answer is 'fax'" in refused.json()["detail"]
