"""The record of a job, and the counts of ended jobs."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import sqlite3
import time
from typing import Any

import pytest
from prometheus_client import Histogram

from lab.report import ROOT
from seesr.serving import job_counts
from seesr.serving.job import (
    CANCELED,
    DONE,
    FAILED,
    FULL_DISK,
    LATER,
    NORMAL,
    PRIORITIES,
    RUNNING,
    URGENT,
    WAITING,
    Job,
    Late,
    QueueFull,
    check_deadline,
    storage_failure,
)
from seesr.serving.job_counts import BUCKETS, JobCounts, bucket_of, durations, exemplars, families, increments, summary
from seesr.serving.responses import STATUSES
from seesr.settings import Settings

QUOTE = {"output_size": "8x8", "tiles": 1, "seconds": 2.0, "seconds_at_most": 3.0, "bytes": 9,
         "peak_memory_mb": {"host": 5}, "price": None, "images": 9, "wait": 4.0}  # fmt: skip
METRICS = {"seconds": {"read": 0.5, "denoise": 2.0}, "tiles": 4, "steps": 2, "out_of_memory_retries": 1,
           "float32_retries": 2, "output_size": "2000x1000"}  # fmt: skip


def test_a_new_job_waits_with_a_drawn_seed_and_an_id_that_cannot_be_guessed() -> None:
    jobs = [Job.of("ann", Settings(seed=None)) for _ in range(9)]
    assert len({job.id for job in jobs}) == len({job.settings["seed"] for job in jobs}) == 9
    for job in jobs:
        assert (job.status, job.attempts, job.done, job.total, job.revision) == (WAITING, 0, 0, 0, 0)
        assert not job.masked and not job.cancel and job.progress == 0.0 and abs(job.created - time.time()) < 5
        assert len(job.id) == 32, "128 bits"
    assert PRIORITIES["urgent"] == URGENT < jobs[0].priority == PRIORITIES["normal"] == NORMAL < LATER
    assert NORMAL - URGENT > 1 < LATER - NORMAL, "there is room between them"
    assert {WAITING, RUNNING, DONE, FAILED, CANCELED} == set(STATUSES)


def test_a_reset_job_waits_again_from_its_start() -> None:
    job = Job("ann", {}, status=RUNNING, stage="denoise", done=3, total=5, progress=0.5, seconds_left=2.0, attempts=1)
    job.reset()
    assert job == Job("ann", {}, id=job.id, created=job.created, attempts=1)


def test_a_record_of_another_version_is_read_and_one_that_is_none_is_refused() -> None:
    job = Job.of("ann", Settings(seed=1, output_format="webp"))
    record = {**dataclasses.asdict(job), "of_tomorrow": 1}
    assert Job.from_record(record) == job
    del record["name"]
    assert Job.from_record(record).name == "image" and job.suffix == "webp"
    for bad in ([], {"owner": "ann"}):
        with pytest.raises(TypeError):
            Job.from_record(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("webhook", "receiver"),
    [("https://u:p@A.test:8443/x", "ann a.test:8443"), ("https://a.test/y", "ann a.test"), (None, "ann ")],
)
def test_webhooks_go_in_order_to_each_host(webhook: str | None, receiver: str) -> None:
    assert Job("ann", {}, webhook=webhook).receiver == receiver


@pytest.mark.parametrize(
    ("webhook", "events", "wanted"),
    [(None, None, False), (None, ["start"], False), ("x", None, True), ("x", [], True), ("x", ["start"], True),
     ("x", ["completed"], False)],
)  # fmt: skip
def test_a_webhook_hears_of_the_events_that_it_names(webhook: str | None, events: Any, wanted: bool) -> None:
    assert Job("ann", {}, webhook=webhook, events=events).wants("start") is wanted


def test_a_deadline_counts_from_the_request() -> None:
    limit = Job("ann", {}, deadline=10.0, created=time.time() - 4).limit
    assert limit is not None and limit.end - time.monotonic() == pytest.approx(6, abs=1)
    assert Job("ann", {}).limit is None


def test_a_deadline_is_refused_by_what_was_promised() -> None:
    """(wait + seconds) * at most / seconds = 9 seconds."""
    check_deadline(Job("ann", {}, deadline=9.0, quote=QUOTE))
    check_deadline(Job("ann", {}, deadline=0.1))
    check_deadline(Job("ann", {}, quote=QUOTE))
    check_deadline(Job("ann", {}, deadline=0.1, quote={**QUOTE, "images": 0}))
    with pytest.raises(Late, match=r"a deadline of 8.9 s cannot be met: .* can take 9.0 s") as late:
        check_deadline(Job("ann", {}, deadline=8.9, quote=QUOTE))
    assert late.value.quote == QUOTE and late.value.code == "deadline_too_short"
    assert QueueFull(3.4).seconds == 3.4 and "in 3 s" in str(QueueFull(3.4))


def test_metrics_have_the_quote_and_the_wait() -> None:
    job = Job("ann", {}, quote=QUOTE, created=100.0, started=101.23456)
    metrics = {**METRICS, "actual": {"seconds": 2.5}}
    result = job.with_quote(metrics)
    assert result["quote"] == {"seconds": 2.0, "bytes": 9, "peak_memory_mb": 5, "wait": 4.0}
    assert result["actual"] == {"seconds": 2.5, "wait": 1.235} and metrics["actual"] == {"seconds": 2.5}
    for other in (dataclasses.replace(job, quote=None), dataclasses.replace(job, started=None)):
        assert other.with_quote(metrics) == metrics
    assert job.with_quote(METRICS) == METRICS


def test_a_disk_that_takes_nothing_is_told_from_other_errors() -> None:
    for number in FULL_DISK:
        failure = storage_failure(OSError(number, "reason", "/secret/path"))
        assert failure and failure.code == "disk_full" and "(reason)" in str(failure) and "secret" not in str(failure)
    assert "(locked)" in str(storage_failure(sqlite3.OperationalError("locked")))
    assert storage_failure(OSError(errno.ENOENT, "x")) is None and storage_failure(ValueError("x")) is None


def ended(owner: str = "ann", status: str = DONE, **values: Any) -> Job:
    times = {"created": 100.0, "started": 101.0, "completed": 104.0}
    return Job(owner, {}, status=status, **{**times, "metrics": METRICS if status == DONE else {}, **values})


def test_what_an_ended_job_adds() -> None:
    job = ended()
    assert durations(job) == {
        ("queue_seconds",): 1.0, ("job_seconds",): 4.0,
        ("stage_seconds", "read"): 0.5, ("stage_seconds", "denoise"): 2.0,
    }  # fmt: skip
    assert increments(job, "(other)") == {
        ("jobs", DONE): 1, ("key_jobs", "(other)", DONE): 1, ("key_megapixels", "(other)"): 2.0, ("tiles",): 8,
        ("retries",): 3, ("queue_seconds", "1.0"): 1, ("queue_seconds", "sum"): 1.0, ("job_seconds", "5.0"): 1,
        ("job_seconds", "sum"): 4.0, ("stage_seconds", "read", "0.5"): 1, ("stage_seconds", "read", "sum"): 0.5,
        ("stage_seconds", "denoise", "2.5"): 1, ("stage_seconds", "denoise", "sum"): 2.0,
    }  # fmt: skip
    assert exemplars(job)["queue_seconds", "1.0"] == (job.id, 1.0, 104.0) and len(exemplars(job)) == 4
    for other in (ended(status=FAILED), ended(metrics={}), ended(status=CANCELED, metrics=METRICS)):
        assert durations(other) == {} == exemplars(other)
        assert increments(other, "ann") == {("jobs", other.status): 1, ("key_jobs", "ann", other.status): 1}
    found = ended(started=None, completed=None)
    assert durations(found)["queue_seconds",] == durations(found)["job_seconds",] == 0.0
    assert exemplars(found)["job_seconds", "0.05"] == (found.id, 0.0, 100.0)


def test_the_buckets_are_those_that_people_know() -> None:
    """The default ones of Prometheus up to ten seconds, then whole parts and multiples of a minute."""
    assert list(BUCKETS) == sorted(set(BUCKETS)) and BUCKETS[-1] == float("inf")
    short = [bound for bound in BUCKETS if bound <= 10]
    assert set(short) <= set(Histogram.DEFAULT_BUCKETS) and len(short) == 8
    long = BUCKETS[len(short) : -1]
    assert all(60 % bound == 0 or bound % 60 == 0 for bound in long) and long[-1] == 30 * 60
    assert all(after <= 3 * before for before, after in itertools.pairwise(BUCKETS[:-1]))
    assert [bucket_of(seconds) for seconds in (0.0, 0.05, 0.051, 1801)] == ["0.05", "0.05", "0.1", "+Inf"]


def test_the_summary_of_the_status_page() -> None:
    counts = JobCounts()
    assert summary(counts.snapshot()[0]) == {
        "ended": {}, "seconds_per_stage": {}, "queue_seconds": 0.0, "tiles": 0, "retries": 0
    }  # fmt: skip
    for job in (ended(), ended(), ended(status=FAILED)):
        counts.add(job)
    assert summary(counts.snapshot()[0]) == {
        "ended": {FAILED: 1, DONE: 2}, "seconds_per_stage": {"read": 1.0, "denoise": 4.0}, "queue_seconds": 2.0,
        "tiles": 16, "retries": 6,
    }  # fmt: skip


def samples(counts: JobCounts, key: str | None) -> dict[tuple[str, ...], Any]:
    return {(s.name, *s.labels.values()): s for family in families(*counts.snapshot(), key) for s in family.samples}


def test_metrics_without_labels_are_there_from_the_start() -> None:
    result = samples(JobCounts(), None)
    zero = {name[0] for name, sample in result.items() if sample.value == 0}
    assert zero == {
        "seesr_tiles_total", "seesr_retries_total", "seesr_queue_seconds_bucket", "seesr_queue_seconds_count",
        "seesr_queue_seconds_sum", "seesr_job_seconds_bucket", "seesr_job_seconds_count", "seesr_job_seconds_sum",
    }  # fmt: skip
    assert len(result) == 2 + 2 * (len(BUCKETS) + 2)


def test_histograms_are_cumulative_with_an_exemplar_for_all_keys_alone() -> None:
    counts = JobCounts()
    jobs = [ended(), ended("bob", completed=2000.0), ended(completed=9999.0)]
    for job in jobs:
        counts.add(job)
    result = samples(counts, None)
    values = [result["seesr_job_seconds_bucket", bound].value for bound in ("2.5", "5.0", "600.0", "1800.0", "+Inf")]
    assert values == [0, 1, 1, 1, 3]
    assert result["seesr_job_seconds_sum",].value == 4 + 1900 + 9899 and result["seesr_job_seconds_count",].value == 3
    exemplar = result["seesr_job_seconds_bucket", "5.0"].exemplar
    assert exemplar.labels == {"job_id": jobs[0].id} and (exemplar.value, exemplar.timestamp) == (4.0, 104.0)
    assert result["seesr_stage_seconds_bucket", "denoise", "2.5"].value == 3
    own = samples(counts, "bob")
    assert not any(sample.exemplar for sample in own.values())
    assert {name[1] for name in own if name[0].startswith("seesr_key")} == {"bob"}
    assert own["seesr_key_jobs_total", "bob", DONE].value == 1 and own["seesr_jobs_total", DONE].value == 3


def test_the_documented_number_of_keys_has_metrics_of_its_own() -> None:
    counts = JobCounts()
    for number in range(job_counts.MAX_KEYS + 2):
        counts.add(ended(f"key{number}", FAILED))
    names = {name[1] for name in counts.snapshot()[0] if name[0] == "key_jobs"}
    assert len(names) == job_counts.MAX_KEYS + 1 and "(other)" in names
    assert f"the first {job_counts.MAX_KEYS} names" in (ROOT / "docs/operations.md").read_text()
