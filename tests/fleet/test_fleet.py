"""A fleet through its HTTP API: the same routes as one server at every gateway, and invalid input."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import corpus
import httpx
import pytest
from cog_client import data_uri
from corpus import Case
from monitoring import documented_metrics, exported, series, used
from PIL import Image
from serving import sharp

from lab.fleet.callers import IMAGE, PNG
from lab.fleet.servers import Fleet
from seesr import Engine, Settings
from seesr.config import Configuration
from seesr.fleet import broker, redis_client, transport
from seesr.fleet.job_store import EXPIRY, HOOKS, JobStore
from seesr.fleet.metadata_store import FleetMetadataStore
from seesr.serving.job import NORMAL, Job

QUICK: dict[str, Any] = {"num_inference_steps": 1, "seed": 1}


def ask(fleet: Fleet, method: str, path: str, gateway: str = "gateway", **more: Any) -> httpx.Response:
    return httpx.request(method, fleet.addresses[gateway] + path, timeout=60, **more)


def send(fleet: Fleet, gateway: str = "gateway", headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
    params = {"num_inference_steps": 1, "wait": 0, **query}
    return ask(fleet, "POST", "/upscale", gateway, content=IMAGE, headers={**PNG, **(headers or {})}, params=params)


def ended(fleet: Fleet, id: str, gateway: str = "gateway") -> dict[str, Any]:
    results: dict[str, Any] = {}

    def look() -> bool:
        results.update(ask(fleet, "GET", f"/jobs/{id}", gateway).json())
        return results["status"] in ("succeeded", "failed", "canceled")

    fleet.until(look, 60)
    return results


@pytest.mark.long
def test_bytes_are_those_of_the_engine(pocket_fleet: Fleet, engine: Engine) -> None:
    answer = ask(pocket_fleet, "POST", "/upscale", content=sharp(), headers=PNG, params=QUICK)
    assert answer.status_code == 200
    assert answer.content == engine.run(sharp(), Settings(**QUICK)).data


@pytest.mark.long
def test_replicates_client_runs(pocket_fleet: Fleet, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    import replicate

    client = replicate.Client(api_token="anything", base_url=pocket_fleet.addresses["gateway"])
    output = client.run("you/seesr", input={"image": io.BytesIO(sharp()), **QUICK})
    assert output.read() == engine.run(sharp(), Settings(**QUICK)).data  # pyright: ignore[reportAttributeAccessIssue]
    client._client.close()


@pytest.mark.long
def test_the_corpus_is_answered_as_by_one_server(pocket_fleet: Fleet) -> None:
    from serve.test_corpus import OTHERWISE, OURS, SMALL  # type: ignore[import-not-found]

    def answer(case: Case) -> httpx.Response:
        image = data_uri(case.image) if isinstance(case.image, bytes) else case.image
        values = {} if image is None else {"image": image}
        assert isinstance(case.inputs, dict)
        return ask(pocket_fleet, "POST", "/upscale", json={**SMALL, **values, **case.inputs})

    for case in corpus.cases():
        if case.name not in corpus.SAMPLE or isinstance(case.inputs, str):
            continue
        message, result = OTHERWISE.get(case.name, OURS.get(case.message or "", case.message)), answer(case)
        if message is None:
            assert result.status_code == 200, (case.name, result.text[:200])
            Image.open(io.BytesIO(result.content)).load()
        else:
            assert result.status_code in (400, 413, 422), (case.name, result.status_code, result.text[:200])
            assert re.search(message, result.json()["detail"]), (case.name, result.text)
    assert ask(pocket_fleet, "POST", "/upscale", content=sharp(), headers=PNG, params=QUICK).status_code == 200


def test_a_quote_comes_from_the_rates_that_the_workers_publish(echo: Fleet) -> None:
    for _ in range(3):
        assert ended(echo, send(echo).json()["id"])["status"] == "succeeded"
    params = {"num_inference_steps": 1}
    quote = ask(echo, "POST", "/quote", "gateway1", content=IMAGE, headers=PNG, params=params)
    assert quote.status_code == 200, quote.text
    values = quote.json()
    assert values["seconds"] == pytest.approx(0.1, rel=0.2) and values["bytes"] == len(IMAGE)
    assert values["wait"] == 0 and values["promised"] >= values["seconds"] and values["images"] >= 3
    assert "rates" not in str(ask(echo, "GET", "/status").json()["workers"])


def test_a_deadline_that_no_worker_can_meet_is_refused_with_the_quote(echo: Fleet) -> None:
    for _ in range(3):
        assert ended(echo, send(echo).json()["id"])["status"] == "succeeded"
    refused = send(echo, num_inference_steps=8, deadline=0.3)
    assert refused.status_code == 409, refused.text
    assert "a deadline of 0.3 s cannot be met" in refused.json()["detail"]
    assert refused.json()["quote"]["seconds"] == pytest.approx(0.8, rel=0.3)
    jobs = [send(echo, num_inference_steps=8).json()["id"] for _ in range(4)]
    waiting = ask(echo, "POST", "/quote", content=IMAGE, headers=PNG, params={"num_inference_steps": 1}).json()
    assert waiting["wait"] > 0.1
    urgent = {"num_inference_steps": 1, "priority": "urgent"}
    first = ask(echo, "POST", "/quote", content=IMAGE, headers=PNG, params=urgent).json()
    assert first["wait"] < waiting["wait"]
    assert send(echo, deadline=0.11).status_code == 409
    accepted = send(echo, deadline=60)
    assert accepted.status_code == 202
    result = ended(echo, accepted.json()["id"])
    assert result["status"] == "succeeded"
    assert all(ended(echo, id)["status"] == "succeeded" for id in jobs)


def test_every_gateway_serves_every_job_and_file(echo: Fleet) -> None:
    result = send(echo).json()
    assert ended(echo, result["id"], "gateway1")["status"] == "succeeded"
    link = ask(echo, "GET", f"/jobs/{result['id']}", "gateway1").json()["result"]
    assert httpx.get(link).content == IMAGE
    assert httpx.get(link.replace(echo.addresses["gateway1"], echo.addresses["gateway"])).content == IMAGE
    upload = ask(echo, "POST", "/v1/files", files={"content": ("x.png", IMAGE)}).json()
    again = ask(echo, "GET", f"/v1/files/{upload['id']}/download", "gateway1")
    assert again.content == IMAGE
    url = f"{echo.addresses['gateway1']}/v1/files/{upload['id']}"
    version = ask(echo, "GET", "/status").json()["version"]
    body = {"version": version, "input": {"image": url, "num_inference_steps": 1}}
    response = ask(echo, "POST", "/v1/predictions", "gateway1", json=body, headers={"Prefer": "wait=30"}).json()
    assert response["status"] == "succeeded"
    assert base64.b64decode(response["output"].partition(",")[2]) == IMAGE
    assert ask(echo, "DELETE", f"/v1/files/{upload['id']}").status_code == 204
    assert ask(echo, "GET", f"/v1/files/{upload['id']}", "gateway1").status_code == 404


def test_an_idempotency_key_holds_for_all_gateways(echo: Fleet) -> None:
    key = {"Idempotency-Key": "once"}
    long: dict[str, Any] = {"seed": 5, "num_inference_steps": 8}  # it has not ended when the last is sent
    ids = {send(echo, gateway, key, **long).json()["id"] for gateway in ("gateway", "gateway1", "gateway")}
    assert len(ids) == 1
    assert send(echo, "gateway1", key, seed=6).status_code == 422


def test_a_batch_has_one_status_and_a_bad_image_fails_alone(echo: Fleet) -> None:
    files = [("a", ("a.png", IMAGE)), ("b", ("b.png", b"no image")), ("c", ("c.png", IMAGE))]
    result = ask(echo, "POST", "/batches", files=files, params={"num_inference_steps": 1, "priority": "low"}).json()
    assert [entry["name"] for entry in result["refused"]] == ["b.png"]
    path = f"/batches/{result['id']}"
    echo.until(lambda: ask(echo, "GET", path, "gateway1").json()["status"] == "ended", 30)
    archive = zipfile.ZipFile(io.BytesIO(ask(echo, "GET", f"{path}/result", "gateway1").content))
    assert sorted(archive.namelist()) == ["a.png", "c.png", "failed.txt"]
    assert archive.read("a.png") == IMAGE


def test_forged_expired_and_foreign_links_are_refused(echo: Fleet) -> None:
    job = ended(echo, send(echo).json()["id"])
    good, link = echo.addresses["gateway"], job["result"]
    other = ended(echo, send(echo).json()["id"])["result"]
    stem, _, query = link.partition("?")
    for bad in (
        f"{stem}?{query[:-1]}{'0' if query[-1] != '0' else '1'}",
        f"{stem}?{other.partition('?')[2]}",
        f"{stem}?expires=1&signature=00",
        f"{good}/v1/outputs/..%2Fsecret?{query}",
        stem,
    ):
        assert httpx.get(bad).status_code == 404, bad
    assert httpx.get(link).content == IMAGE


def test_a_full_queue_says_when_to_come_again(echo: Fleet) -> None:
    """From the times of the last images and the workers that are there."""
    ended(echo, send(echo).json()["id"])
    echo.start_gateway("stranger", SEESR_MAX_QUEUE="1")
    try:
        long = send(echo, num_inference_steps=8).json()["id"]
        echo.until(lambda: ask(echo, "GET", f"/jobs/{long}").json()["status"] == "processing", 10)
        waiting = send(echo, "stranger").json()["id"]
        full = send(echo, "stranger")
        assert full.status_code == 429 and 1 <= int(full.headers["retry-after"]) < 60
        assert "the queue is full; try again in" in full.json()["detail"]
        for id in (long, waiting):
            assert ended(echo, id)["status"] == "succeeded"
    finally:
        echo.kill("stranger")
        del echo.addresses["stranger"]


def test_a_link_instead_of_the_file(echo: Fleet) -> None:
    body = send(echo, wait=20, answer="link").json()
    assert httpx.get(body["public_url"]).content == IMAGE
    assert (echo.folder / "store" / "out" / body["file_key"]).exists()


def test_a_queued_job_is_canceled_at_once_and_its_image_is_removed(echo: Fleet) -> None:
    long = send(echo, num_inference_steps=8).json()["id"]
    waiting = send(echo).json()["id"]
    assert ask(echo, "DELETE", f"/jobs/{waiting}", "gateway1").json()["status"] == "canceled"
    assert not (echo.folder / "store" / "in" / waiting).exists()
    ask(echo, "DELETE", f"/jobs/{long}")
    assert ended(echo, long)["status"] == "canceled"
    assert waiting not in dict(echo.runs())


def test_a_record_deleted_during_a_run_does_not_stop_the_worker(echo: Fleet) -> None:
    job = send(echo, num_inference_steps=8).json()["id"]
    echo.until(lambda: ask(echo, "GET", f"/jobs/{job}").json()["status"] == "processing", 10)
    echo.redis.delete(f"seesr:job:{job}")
    assert ended(echo, send(echo).json()["id"])["status"] == "succeeded"
    assert ask(echo, "GET", f"/jobs/{job}").status_code == 404


@pytest.mark.parametrize("message", ["no JSON", "{}", '{"body": "x"}', "\x00\xff"])
def test_a_malformed_message_in_redis_is_dropped(echo: Fleet, message: str) -> None:
    version = ask(echo, "GET", "/status").json()["version"]
    echo.redis.lpush(transport.list_of(broker.queue_of(version, 0), NORMAL), message)
    assert ended(echo, send(echo).json()["id"])["status"] == "succeeded"


def test_a_worker_of_another_version_takes_no_job_of_this_one(echo: Fleet, tmp_path: Path) -> None:
    """A gateway of another bundle finds no worker, says so, and its job waits for one."""
    bundle = tmp_path / "other"
    bundle.mkdir()
    manifest = json.loads(Path("weights/pocket/bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps({**manifest, "name": "other"}))
    echo.start_gateway("stranger", SEESR_WEIGHTS=str(bundle))
    try:
        ready = ask(echo, "GET", "/ready", "stranger")
        assert (ready.status_code, ready.json()["detail"]) == (503, "no worker of this version is alive")
        job = send(echo, "stranger").json()["id"]
        time.sleep(1)
        assert ask(echo, "GET", f"/jobs/{job}", "stranger").json()["status"] == "starting"
        ask(echo, "DELETE", f"/jobs/{job}", "stranger")
    finally:
        echo.kill("stranger")
        del echo.addresses["stranger"]


@pytest.mark.long
def test_the_fleet_command_shows_and_controls_workers(echo: Fleet) -> None:
    def fleet(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "seesr", "fleet", *arguments]
        return subprocess.run(command, env=echo.environment, capture_output=True, text=True, timeout=60)

    output = json.loads(fleet("status").stdout)
    worker = output["workers"]["worker0@here"]
    assert (
        worker["state"] == "idle"
        and worker["bundle"] == "echo"
        and len(worker["bundle_sha256"]) == 64
        and len(worker["version"]) == 64
    )
    assert fleet("unload", "worker0@here").returncode == 0
    assert echo.state("worker0") == "unloaded"
    assert ask(echo, "GET", "/ready").status_code == 503
    job = send(echo).json()["id"]
    time.sleep(1)
    assert ask(echo, "GET", f"/jobs/{job}").json()["status"] == "starting"
    assert fleet("load", "worker0@here").returncode == 0
    assert ended(echo, job)["status"] == "succeeded"
    nobody = fleet("drain", "nobody@here")
    assert nobody.returncode == 2 and "no worker 'nobody@here'; alive: worker0@here" in nobody.stderr
    before = echo.processes["worker0"]
    assert fleet("restart", "worker0@here").returncode == 0
    assert before.wait(30) == 0
    assert echo.state("worker0") is None
    echo.start_worker("worker0")


def test_records_and_objects_expire_together(echo: Fleet) -> None:
    job = ended(echo, send(echo).json()["id"])
    stored = echo.folder / "store" / "out" / f"{job['id']}.png"
    assert stored.exists()
    echo.redis.zadd(EXPIRY, {f"job:{job['id']}": 1})
    echo.until(lambda: not stored.exists(), 20)
    assert ask(echo, "GET", f"/jobs/{job['id']}").status_code == 404


def test_a_gateway_needs_no_torch(echo: Fleet) -> None:
    maps = Path(f"/proc/{echo.processes['gateway'].pid}/maps").read_text()
    assert "libtorch" not in maps


def succeeded(fleet: Fleet) -> int:
    """Jobs that the fleet has counted."""
    return ask(fleet, "GET", "/status").json()["ended"].get("succeeded", 0)


def test_status_and_metrics_show_the_fleet(echo: Fleet) -> None:
    send(echo)
    echo.until(lambda: succeeded(echo) > 0, 60)
    echo.until(lambda: 'seesr_workers{state="idle"} 1.0' in ask(echo, "GET", "/metrics").text, 10)
    body = ask(echo, "GET", "/status").json()
    assert body["ready"] and list(body["workers"]) == ["worker0@here"]
    metrics = ask(echo, "GET", "/metrics").text
    assert "seesr_queue_length 0.0" in metrics
    for task in ("lease", "orders"):  # of the worker's parent and of its child
        assert f'seesr_worker_background_failures_total{{task="{task}",worker="worker0@here"}} 0.0' in metrics


def test_metrics_of_jobs_are_those_of_the_whole_fleet(echo: Fleet) -> None:
    before = succeeded(echo)
    send(echo, "gateway1")
    echo.until(lambda: succeeded(echo) > before, 60)
    both = [ask(echo, "GET", "/metrics", gateway).text for gateway in ("gateway", "gateway1")]
    names = {name for name, where in documented_metrics().items() if "fleet" in where}
    assert exported(both[0]) == exported(both[1]) == names
    for names_used in (used("fleet.rules.yaml"), used("server.rules.yaml") - {"seesr_journal_seconds_bucket"},
                       used("fleet.dashboard.json")):  # fmt: skip
        assert names_used <= series(names, both[0])
    lines = [
        {line for line in text.splitlines() if re.match("seesr_(job|queue_seconds|key_|stage_)", line)} for text in both
    ]
    assert lines[0] == lines[1] and any('seesr_stage_seconds_count{stage="denoise"}' in line for line in lines[0])
    assert 'seesr_store_seconds_count{operation="put"} ' in both[1] and "seesr_redis_seconds_count 0.0" not in both[1]
    text = ask(echo, "GET", "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}).text
    assert re.search(r'seesr_job_seconds_bucket\{le="[^"]+"\} [0-9.]+ # \{job_id="[0-9a-f]{32}"\}', text)


def test_a_webhook_that_one_gateway_leaves_is_sent_by_another(echo: Fleet) -> None:
    """The message stays claimed while one tries, and is due again when its time is over."""
    records = JobStore(redis_client.RedisClient(echo.environment["SEESR_REDIS"].replace("/0", "/1")), 60)
    records.hook(Job("ann", {}, webhook="https://example.com", id="ab"), "completed")
    records.hook(Job("ann", {}, webhook="https://example.com", events=["start"], id="cd"), "completed")
    assert records.claim_hook(0.2) == ("ab", "completed")
    assert records.claim_hook(0.2) is None
    time.sleep(0.25)
    assert records.claim_hook(5) == ("ab", "completed")
    records.drop_hook("ab", "completed")
    assert not records.redis(lambda client: client.zcard(HOOKS))


def test_a_worker_with_a_wrong_clock_does_not_start(echo: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time
    connected = redis_client.RedisClient(echo.environment["SEESR_REDIS"])
    connected.check_at_start()
    monkeypatch.setattr(redis_client.time, "time", lambda: now() + 600)
    with pytest.raises(ValueError, match="600 s ahead of that of Redis: set the time"):
        connected.check_at_start()
    monkeypatch.setattr(redis_client.time, "time", lambda: now() - 600)
    with pytest.raises(ValueError, match="600 s behind that of Redis"):
        connected.check_at_start()


def test_celery_settings_prevent_lost_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line was seen to lose or repeat jobs where it was otherwise (docs/decisions/0011)."""
    monkeypatch.setenv("SEESR_REDIS", "redis://127.0.0.1:1/0")
    conf = broker.application(Configuration.read(), ["ab" * 32], publishes=True).conf
    assert (conf.worker_pool, conf.worker_pool_start_method, conf.worker_concurrency) == ("prefork", "spawn", 1)
    assert conf.task_acks_late and conf.task_reject_on_worker_lost and conf.task_acks_on_failure
    assert conf.worker_proc_alive_timeout >= 300 and conf.worker_prefetch_multiplier == 1
    assert conf.broker_transport_options["priority_steps"] == [0, 5, 9] and conf.task_default_priority == 5
    assert conf.broker_transport_options["socket_timeout"] < 5 and not conf.task_publish_retry
    assert conf.broker_transport_options["unacked_restore_throttle"] == 1
    assert conf.worker_max_memory_per_child is None and conf.task_default_queue == "seesr-abababababab-0"
    assert conf.broker_transport_options["queue_order_strategy"] == "round_robin" and len(conf.task_queues) == 16


def test_the_fleet_without_redis_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "seesr"]
    base_environment = {name: value for name, value in os.environ.items() if not name.startswith("SEESR_")}
    for arguments in (["worker"], ["fleet", "status"]):
        completed = subprocess.run([*command, *arguments], env=base_environment, capture_output=True, text=True)
        assert completed.returncode == 2 and completed.stderr.startswith("SEESR_REDIS is not set")
    unreachable = {**base_environment, "SEESR_REDIS": "redis://127.0.0.1:1/0", "SEESR_STORE": "file:///tmp"}
    for arguments in (["worker"], ["serve", "--port", "0"]):
        completed = subprocess.run([*command, *arguments], env=unreachable, capture_output=True, text=True, timeout=60)
        assert completed.returncode == 2 and "Redis does not answer" in completed.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_result_is_a_image_of_its_settings(pocket_fleet: Fleet) -> None:
    answer = ask(pocket_fleet, "POST", "/upscale", content=sharp(), headers=PNG, params={**QUICK, "scale_factor": 2})
    assert Image.open(io.BytesIO(answer.content)).size == (48, 36)


def test_usage_is_counted_over_gateways_within_a_quota(echo: Fleet, tmp_path: Path) -> None:
    before = ask(echo, "GET", "/usage").json()["days"]
    for gateway in echo.addresses:
        assert send(echo, gateway).status_code == 202
    (first, second) = (ask(echo, "GET", "/usage", gateway).json()["days"] for gateway in echo.addresses)
    assert first == second and first[0]["images"] == (before[0]["images"] if before else 0) + 2
    store = FleetMetadataStore(redis_client.RedisClient(echo.environment["SEESR_REDIS"]), None, tmp_path, 60)  # type: ignore[arg-type]
    added = [store.add_usage("quota", "2030-01-01", 1, 0.5, 1.2) for _ in range(3)]
    assert added == [True, True, False] and store.usage("quota") == [("2030-01-01", 2, 1.0)]
    store.close()
