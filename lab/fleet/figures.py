"""Measures a fleet's guarantees on this machine; starts and stops all of its servers.

    python -m lab.fleet kill --json results/fleet/kill.json
    python -m lab.fleet all --json results/fleet            every one, a file each

kill      200 jobs; a worker, then Redis is killed: no job is lost, none has two results
load      2,000 jobs of 20 ms through two gateways and four workers: jobs a second and the gateway's slowest answers
lease     a job that takes five times SEESR_LEASE, and one whose worker gets SIGTERM: one run each
child     the process that computes is killed: the next job is served; a job is canceled: the same process continues
poison    an image that kills the process that computes it: it fails after three runs, others run
priority  100 jobs of low priority, then an urgent one: it runs next
freeze    Redis does not respond: 503 within five seconds; Redis is full: new jobs are rejected, nothing is evicted
drain     six clean restarts of workers under load: every job runs once
lost      a message is lost between two commands of the broker: its job is found and published again

The experiments of lab.fleet.faults also call /live all the time, and wait until every record and file has expired:

readonly  Redis is a read-only replica for some seconds
hang      the object store does not respond for some seconds while clients send
tail      Redis is killed and loses the last writes of its append-only file
upgrade   workers and a gateway of a new version start, and the old ones stop one after the other
chaos     workers, a gateway and Redis are killed, Redis hangs, a record is lost; with uploads, batches, cancellations

lost, misreported  jobs that were accepted and did not end; that failed, or whose result is not the image that was sent
mixed              runs of a job by a worker of another version
left               places that name a job or a file after everything has expired
live_ms            time of a gateway's /live, called 20 times a second

All use the echo engine (lab.fleet.echo), which sleeps instead of computing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab import report
from lab.fleet import faults
from lab.fleet.callers import IMAGE, PNG, Caller, Figures
from lab.fleet.servers import Fleet, fleet
from seesr.fleet.broker import queues_of
from seesr.fleet.transport import list_of
from seesr.serving.job import NORMAL


def kill(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=workers, ECHO_SECONDS="0.25") as cluster:
        caller, started = Caller(cluster), time.monotonic()
        ids = caller.send_many(jobs)
        caller.wait_for(jobs // 4, 60)
        cluster.kill("worker0")
        cluster.start_worker("worker0", wait=False)
        caller.wait_for(jobs // 2, 60)
        cluster.kill("redis")
        cluster.start_redis()
        caller.wait_for(jobs, 120)
        return {**caller.summary(ids), "workers": workers, "seconds": round(time.monotonic() - started, 1)}


def load(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=workers, gateways=2, ECHO_SECONDS="0.02") as cluster:
        caller = Caller(cluster)
        memory = resident(cluster)
        started = time.monotonic()
        ids = caller.send_many(jobs)
        sent = time.monotonic() - started
        slowest = np.percentile(caller.seconds, (50, 99)) * 1000
        caller.wait_for(jobs, 120)
        seconds = time.monotonic() - started
        result = caller.summary(ids)
        return {
            **result,
            "workers": workers,
            "gateways": 2,
            "seconds": round(seconds, 2),
            "jobs_per_second": round(jobs / seconds, 1),
            "sent_per_second": round(jobs / sent, 1),
            "gateway_median_ms": round(slowest[0], 1),
            "gateway_p99_ms": round(slowest[1], 1),
            "gateway_memory_mb": {name: [memory[name], resident(cluster)[name]] for name in memory},
        }


def resident(cluster: Fleet) -> dict[str, int]:
    """MB that the gateways hold."""
    results = {}
    for name in cluster.addresses:
        parts = Path(f"/proc/{cluster.processes[name].pid}/statm").read_text().split()
        results[name] = int(parts[1]) * 4096 // 10**6
    return results


def lease(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=2, lease=4, ECHO_SECONDS="2.5") as cluster:
        caller = Caller(cluster)
        long = caller.send(num_inference_steps=8)  # 20 s
        caller.wait_for(1, 40)
        runs_before = len(cluster.runs())
        second = caller.send(num_inference_steps=8)
        cluster.until(lambda: caller.job(second)["status"] == "processing", 10)
        busy = next(name for name in ("worker0", "worker1") if cluster.state(name) == "busy")
        time.sleep(3)
        code = cluster.kill(busy, signal.SIGTERM)
        caller.wait_for(2, 40)
        time.sleep(6)
        return {
            "lease": 4,
            "job_seconds": 20,
            "runs": runs_before,
            "runs_with_sigterm": len(cluster.runs()) - runs_before,
            "exit_code": code,
            "results": caller.summary([long, second])["results"],
        }


def child(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=1, ECHO_SECONDS="0.5") as cluster:
        caller = Caller(cluster)
        before = cluster.child("worker0")
        os.kill(before, signal.SIGKILL)
        started = time.monotonic()
        first = caller.send()
        caller.wait_for(1, 60)
        served = time.monotonic() - started
        after = cluster.child("worker0")
        long = caller.send(num_inference_steps=8)
        cluster.until(lambda: caller.job(long)["status"] == "processing", 10)
        time.sleep(0.5)
        started = time.monotonic()
        caller.ask("DELETE", f"/jobs/{long}")
        cluster.until(lambda: caller.job(long)["status"] == "canceled", 10)
        canceled = time.monotonic() - started
        last = caller.send()
        caller.wait_for(2, 20)
        result = caller.summary([first, last])
        return {
            "results": result["results"],
            "new_child": after != before,
            "served_after_seconds": round(served, 1),
            "cancel_seconds": round(canceled, 2),
            "same_child_after_cancel": cluster.child("worker0") == after,
        }


def poison(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=1, ECHO_SECONDS="0.2") as cluster:
        caller = Caller(cluster)
        bad, good = caller.send(user_prompt="poison"), caller.send()
        caller.wait_for(2, 120, "succeeded", "failed")
        job = caller.job(bad)
        attempts = int(cluster.redis.hget(f"seesr:job:{bad}", "attempts"))
        return {"status": job["status"], "error": job["error"], "begun": attempts,
                "other": caller.job(good)["status"]}  # fmt: skip


def priority(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=1, ECHO_SECONDS="0.2") as cluster:
        caller = Caller(cluster)
        low = caller.send_many(100, priority="low")
        urgent = caller.send(priority="urgent")
        done = caller.ended("succeeded")
        cluster.until(lambda: caller.job(urgent)["status"] == "succeeded", 20)
        ahead = caller.ended("succeeded") - done - 1
        for id in low:
            caller.ask("DELETE", f"/jobs/{id}")
        caller.wait_for(101, 30, "succeeded", "canceled")
        return {"low": 100, "others_before_the_urgent": ahead, "ended": caller.ended("succeeded", "canceled")}


def freeze(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=1, ECHO_SECONDS="0.2") as cluster:
        caller = Caller(cluster)
        cluster.processes["redis"].send_signal(signal.SIGSTOP)
        answers = []
        for path in ("/upscale", "/ready", "/upscale"):
            started = time.monotonic()
            method = "POST" if path == "/upscale" else "GET"
            content = IMAGE if method == "POST" else None
            result = caller.ask(method, path, content=content, headers=PNG)
            answers.append((result.status_code, round(time.monotonic() - started, 2)))
        alive = caller.ask("GET", "/live").status_code
        cluster.processes["redis"].send_signal(signal.SIGCONT)
        cluster.until(lambda: caller.ask("GET", "/ready").status_code == 200, 30)
        after = caller.send()
        caller.wait_for(1, 20)
        # full: what is queued stays, what comes is refused
        cluster.processes["worker0"].send_signal(signal.SIGSTOP)
        queued = caller.send_many(20)
        cluster.redis.config_set("maxmemory", cluster.redis.info("memory")["used_memory"] * 9 // 10)
        time.sleep(1.2)
        full = caller.ask("POST", "/upscale", content=IMAGE, headers=PNG)
        cluster.redis.config_set("maxmemory", 0)
        cluster.processes["worker0"].send_signal(signal.SIGCONT)
        caller.wait_for(21, 60)
        return {
            "frozen": answers,
            "live": alive,
            "full": [full.status_code, full.json().get("detail")],
            **caller.summary([after, *queued]),
        }


def drain(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=3, ECHO_SECONDS="0.2") as cluster:
        caller, codes = Caller(cluster), []
        started = time.monotonic()
        ids = caller.send_many(jobs)
        for number in range(6):
            name = f"worker{number % 3}"
            cluster.until(lambda name=name: cluster.works(name), 90)
            codes.append(cluster.kill(name, signal.SIGTERM))
            cluster.start_worker(name, wait=False)
        caller.wait_for(jobs, 120)
        return {**caller.summary(ids), "exit_codes": codes, "seconds": round(time.monotonic() - started, 1)}


def lost(folder: Path, jobs: int, workers: int) -> Figures:
    with fleet(folder, workers=1, ECHO_SECONDS="0.2") as cluster:
        caller = Caller(cluster)
        cluster.processes["worker0"].send_signal(signal.SIGSTOP)
        ids = caller.send_many(3)
        version = json.loads(cluster.redis.hget("seesr:worker:worker0@here", "version"))
        removed = any(cluster.redis.rpop(list_of(queue, NORMAL)) for queue in queues_of(version))
        started = time.monotonic()
        cluster.processes["worker0"].send_signal(signal.SIGCONT)
        caller.wait_for(3, 60)
        return {"removed": removed, "seconds": round(time.monotonic() - started, 1), **caller.summary(ids)}


ALL: dict[str, Callable[[Path, int, int], Figures]] = {
    "kill": kill, "load": load, "lease": lease, "child": child, "poison": poison, "priority": priority,
    "freeze": freeze, "drain": drain, "lost": lost, **faults.EXPERIMENTS,
}  # fmt: skip
JOBS = {"load": 2000, **dict.fromkeys(faults.EXPERIMENTS, 60)}
WORKERS = {"load": 4}


def measure(name: str, jobs: int | None = None, workers: int | None = None) -> Figures:
    """The figures of one experiment, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return ALL[name](Path(folder), jobs or JOBS.get(name, 200), workers or WORKERS.get(name, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=[*ALL, "all"])
    parser.add_argument("--jobs", type=int)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--json", type=Path, help="a file, or for all a folder")
    args = parser.parse_args()
    for name in ALL if args.experiment == "all" else [args.experiment]:
        figures = measure(name, args.jobs, args.workers)
        print(name, json.dumps(figures), flush=True)
        if args.json:
            path = args.json / f"{name}.json" if args.experiment == "all" else args.json
            report.write(path, [{"experiment": name, **figures}])
