"""The life cycle of `seesr serve`: health checks, limits, shutdown, crashes and restarts."""

from __future__ import annotations

import signal
import socket
import threading
import time
import urllib.parse
from pathlib import Path

import pytest
import requests
from echo_server import PNG, serving
from prometheus_client.parser import text_string_to_metric_families
from serving import ANN, LONG, QUICK, EchoServing, Serving, sharp

from seesr.networks import weights


def test_health_from_the_start(tmp_path: Path) -> None:
    with Serving(tmp_path, ready=False) as server:
        assert server.ask("GET", "/live", None).status_code == 200
        loading = server.ask("GET", "/ready", None)
        assert loading.status_code == 503 and loading.json()["detail"] == "the weights are loading"
        assert server.ask("GET", "/ping", None).status_code == 204
        waiting = server.begin()  # taken already
        server.until_ready()
        server.until(waiting["id"], "succeeded")
        status = server.ask("GET", "/status").json()
        assert status["ready"] and status["engine"]["bundle"]["files"]["unet/config.json"]
        assert status["engine"]["device"] == "cpu" and status["queue_length"] == 0


def test_missing_weights_end_the_server_with_its_own_code(tmp_path: Path) -> None:
    broken = tmp_path / "bundle"
    broken.mkdir()
    (broken / weights.MANIFEST).write_text("{}")
    with Serving(tmp_path / "s", "--bundle", str(broken), ready=False) as server:
        assert server.process.wait(30) == 3
    assert "not a bundle manifest" in server.log()


def test_ready_is_quick_during_a_run(service: Serving) -> None:
    job, times = service.begin(**LONG), []
    service.until(job["id"], "processing")
    with requests.Session() as session:
        for _ in range(30):
            started = time.perf_counter()
            assert session.get(f"{service.url}/ready", timeout=5).status_code == 200
            times.append(time.perf_counter() - started)
            time.sleep(0.03)
    service.ask("DELETE", f"/jobs/{job['id']}")
    assert sorted(times)[len(times) * 9 // 10] < 0.05, times


def test_metrics_count(service: Serving) -> None:
    def read() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(service.ask("GET", "/metrics").text)
        return {(s.name, "".join(s.labels.values())): s.value for family in families for s in family.samples}

    before = read()
    assert service.upscale(seed=56).status_code == 200  # no earlier run has cached stages
    deadline = time.monotonic() + 5
    while (after := read())["seesr_tiles_total", ""] == before["seesr_tiles_total", ""]:
        assert time.monotonic() < deadline  # the figures of a job follow its answer
        time.sleep(0.05)
    assert after["seesr_jobs_total", "succeeded"] == before.get(("seesr_jobs_total", "succeeded"), 0) + 1
    assert after["seesr_stage_seconds_sum", "denoise"] > before.get(("seesr_stage_seconds_sum", "denoise"), 0)
    assert after["seesr_ready", ""] == 1 and after["seesr_memory_bytes", ""] > 1e8


def test_a_full_queue_says_when_to_come_again(tmp_path: Path) -> None:
    with EchoServing(tmp_path, SEESR_MAX_QUEUE="2", ECHO_SECONDS="10") as server:
        running = server.begin()
        server.until(running["id"], "processing")
        waiting = [server.begin() for _ in range(2)]
        answer = server.upscale(wait=0)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        for job in (*waiting, running):
            server.ask("DELETE", f"/jobs/{job['id']}")


def test_a_key_has_a_rate(tmp_path: Path) -> None:
    with serving(tmp_path, rate=3) as client:
        query = {**QUICK, "wait": 0}
        statuses = [client.post("/upscale", params=query, content=sharp(), headers=PNG).status_code for _ in range(4)]
    assert statuses == [202, 202, 202, 429]


def test_sigterm_finishes_the_running_job_and_refuses_new_ones(tmp_path: Path) -> None:
    with EchoServing(tmp_path, ECHO_SECONDS="1") as server:
        answers: list[requests.Response] = []
        asking = threading.Thread(target=lambda: answers.append(server.upscale()))
        asking.start()
        while server.ask("GET", "/status").json()["running"] is None:
            time.sleep(0.01)
        queued = server.begin(scale_factor=2)
        server.process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert answers[0].status_code == 200 and answers[0].content == sharp()
        assert server.process.wait(30) == 0
    with EchoServing(tmp_path) as server:  # what waited is made by the next one
        assert server.until(queued["id"], "succeeded")["status"] == "succeeded"


def test_after_a_kill_nothing_is_lost(tmp_path: Path) -> None:
    with EchoServing(tmp_path, ECHO_SECONDS="20") as server:
        running = server.begin(seed=2)
        server.until(running["id"], "processing")
        waiting = [server.begin(data=sharp(24, 18 + number)) for number in range(5)]
        server.process.kill()
        server.process.wait()
    with EchoServing(tmp_path) as server:
        for job in [running, *waiting]:
            server.until(job["id"], "succeeded")
        assert server.ask("GET", f"/jobs/{waiting[3]['id']}/result").content == sharp(24, 21)
        deadline = time.monotonic() + 10  # inputs are removed after the result is reported
        while left := [path for name in ("parts", "inputs") for path in (tmp_path / "data" / name).iterdir()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def test_an_image_that_kills_the_server_fails_after_three_attempts(tmp_path: Path) -> None:
    with EchoServing(tmp_path, ECHO_SECONDS="20") as server:
        poison = server.begin()
        server.until(poison["id"], "processing")
        server.process.kill()
        server.process.wait()
    for attempt in range(3):
        with EchoServing(tmp_path, ready=attempt < 2, ECHO_SECONDS="20") as server:
            if attempt < 2:
                server.until(poison["id"], "processing")
                server.process.kill()
                server.process.wait()
            else:
                assert "the server died 3 times" in server.until(poison["id"], "failed")["error"]


def test_results_expire(tmp_path: Path) -> None:
    with EchoServing(tmp_path) as server:
        job = server.until(server.begin()["id"], "succeeded")
    with EchoServing(tmp_path, SEESR_KEEP="1e-9") as server:
        deadline = time.monotonic() + 10
        while server.ask("GET", f"/jobs/{job['id']}").status_code != 404:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not list((tmp_path / "data/outputs").iterdir())


def test_a_server_without_keys_does_not_listen_on_other_addresses(tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "seesr", "serve", "--host", "0.0.0.0", "--bundle", str(weights.POCKET)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "set SEESR_API_KEYS" in done.stderr


def raw(service: Serving, data: bytes, *more: bytes, pause: float = 0) -> bytes:
    """What comes back for bytes that no client library would send."""
    address = urllib.parse.urlsplit(service.url)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(data)
        for part in more:
            time.sleep(pause)
            try:
                connection.sendall(part)
            except OSError:
                break
        connection.settimeout(60)
        response = b""
        try:
            while chunk := connection.recv(65536):
                response += chunk
        except OSError:
            pass
        return response


HEAD = f"POST /upscale HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ANN}\r\nConnection: close\r\n".encode()


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 10737418240\r\n\r\n", b"413"),
        (HEAD + b"Content-Length: -5\r\n\r\n", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", b"400"),
        (HEAD + b"X: y\r\n" * 20000 + b"\r\n", b"4"),
        (b"GARBAGE\r\n\r\n", b"400"),
        (HEAD.replace(b"/upscale", b"/upscale/../../etc/passwd") + b"Content-Length: 0\r\n\r\n", b"404"),
        (HEAD.replace(b"/upscale", b"/jobs/..%2f..%2fetc") + b"Content-Length: 0\r\n\r\n", b"4"),
        (HEAD + b"Content-Type: text/html\r\nContent-Length: 2\r\n\r\nhi", b"415"),
        (HEAD + b"Content-Type: multipart/form-data; boundary=x\r\nContent-Length: 8\r\n\r\n--x\r\nrub", b"4"),
        (HEAD + b"Content-Type: application/json\r\nContent-Length: 3\r\n\r\n[1]", b"400"),
        (HEAD + b"Content-Type: application/json\r\nContent-Length: 12\r\n\r\n" + b"[" * 12, b"400"),
    ],
)
def test_odd_requests_are_answered_and_the_next_is_good(service: Serving, data: bytes, status: bytes) -> None:
    before = service.upscale().content
    answer = raw(service, data)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert b"Traceback" not in answer
    assert service.upscale().content == before


def test_a_large_body_is_refused_while_it_comes(service: Serving) -> None:
    """Chunked, so that nobody knows its size; the server's memory must not grow with it."""

    def memory() -> int:
        pages = Path(f"/proc/{service.process.pid}/statm").read_text().split()[1]
        return int(pages) * 4096

    before, chunk = memory(), bytes(2**20)

    def body():
        for _ in range(1024):
            yield chunk

    try:
        answer = service.ask("POST", "/upscale", data=body(), headers={"Content-Type": "image/png"})
        assert answer.status_code == 413 and "larger than 100 MiB" in answer.json()["detail"]
    except requests.ConnectionError:
        pass  # closed while we still sent
    assert memory() - before < 50e6
    assert not list((service.folder / "data/parts").iterdir())
    assert service.upscale().status_code == 200


def test_json_that_is_too_large_says_what_to_do(service: Serving) -> None:
    answer = service.ask("POST", "/upscale", json={"image": "x" * (17 * 2**20)})
    assert answer.status_code == 413 and "as a file upload" in answer.json()["detail"]


def test_unknown_routes_and_methods_are_json(service: Serving) -> None:
    assert service.ask("GET", "/nothing").json()["status"] == 404
    assert service.ask("GET", "/upscale").json()["status"] == 405


def test_hugging_face_vertex_and_sagemaker(service: Serving) -> None:
    import base64

    encoded = base64.b64encode(sharp()).decode()
    expected = service.upscale().content
    face = service.ask("POST", "/", json={"inputs": encoded, "parameters": {**QUICK, "scale_factor": "4"}}).json()
    assert base64.b64decode(face["image"]) == expected and face["seed"] == 1
    vertex = service.ask("POST", "/invocations", json={"instances": [{"image": encoded}], "parameters": QUICK}).json()
    assert base64.b64decode(vertex["predictions"][0]["image"]) == expected
    maker = service.ask("POST", "/invocations", params=QUICK, data=sharp(), headers={"Content-Type": "image/png"})
    assert maker.content == expected
    for body, words_back in (({"inputs": "@@"}, "not valid base64"), ({"instances": 3}, "must be a list")):
        answer = service.ask("POST", "/invocations", json=body)
        assert answer.status_code == 422 and words_back in answer.json()["detail"]


def test_vertex_names_its_own_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIP_HEALTH_ROUTE", "/healthz")
    monkeypatch.setenv("AIP_PREDICT_ROUTE", "/predict")
    with serving(tmp_path) as client:
        assert client.get("/healthz").status_code == 200
        assert client.post("/predict", json={"instances": []}).status_code == 422
