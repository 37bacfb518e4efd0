"""Counts of ended jobs: what each job adds, and the counters and histograms for Prometheus that are made of them."""

from __future__ import annotations

import collections
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from seesr.images.limits import megapixels
from seesr.serving.job import DONE, ENDED, Job

Name = tuple[str, ...]  # a metric and the values of its labels; of a histogram also a bucket, or "sum"
Seen = tuple[str, float, float]  # an exemplar: id of a job, seconds, when it ended (seconds since 1970)

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, math.inf)  # seconds
MAX_KEYS = 100  # names of keys that have metrics of their own
OTHER = "(other)"  # stands for the keys beyond them
HISTOGRAMS = {  # name -> (labels, description)
    "queue_seconds": ((), "Time in the queue of a job that succeeded, from the request to its latest start"),
    "job_seconds": ((), "Duration of a job that succeeded, from the request to its result"),
    "stage_seconds": (("stage",), "Duration of one stage of an image"),
}
COUNTERS = {
    "jobs": (("status",), "Jobs that ended"),
    "key_jobs": (("key", "status"), f"Jobs that ended, of the first {MAX_KEYS} keys"),
    "key_megapixels": (("key",), f"Megapixels of results, of the first {MAX_KEYS} keys"),
    "tiles": ((), "Tiles that were denoised, of all steps"),
    "retries": ((), "Retries of a part of an image, after an out-of-memory error or an overflow"),
}


def durations(job: Job) -> dict[Name, float]:
    """The histograms that a job which succeeded adds to, with its seconds."""
    if job.status != DONE or not job.metrics:  # no metrics: its result was found after a crash
        return {}
    started, completed = job.started or job.created, job.completed or job.created
    counts: dict[Name, float] = {("queue_seconds",): started - job.created, ("job_seconds",): completed - job.created}
    return counts | {("stage_seconds", stage): seconds for stage, seconds in job.metrics["seconds"].items()}


def bucket_of(seconds: float) -> str:
    """The `le` label of the smallest bucket."""
    return floatToGoString(next(bound for bound in BUCKETS if seconds <= bound))


def increments(job: Job, owner: str) -> dict[Name, float]:
    """What an ended job adds.

    Args:
        owner: the name that its key is counted under.
    """
    counts: dict[Name, float] = {("jobs", job.status): 1, ("key_jobs", owner, job.status): 1}
    for name, seconds in durations(job).items():
        counts |= {(*name, bucket_of(seconds)): 1, (*name, "sum"): seconds}
    if job.status == DONE and job.metrics:
        counts["key_megapixels", owner] = megapixels(*map(int, job.metrics["output_size"].split("x")))
        counts["tiles",] = job.metrics["tiles"] * job.metrics["steps"]
        counts["retries",] = job.metrics["out_of_memory_retries"] + job.metrics["float32_retries"]
    return counts


def exemplars(job: Job) -> dict[Name, Seen]:
    """The job as the exemplar of each bucket that it adds to."""
    ended = job.completed or job.created
    return {(*name, bucket_of(seconds)): (job.id, seconds, ended) for name, seconds in durations(job).items()}


class JobCounts:
    """The counts of this process."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.values: dict[Name, float] = collections.defaultdict(float)
        self.exemplars: dict[Name, Seen] = {}
        self.owners: set[str] = set()

    def add(self, job: Job) -> None:
        """Counts an ended job."""
        with self.lock:
            if len(self.owners) < MAX_KEYS:
                self.owners.add(job.owner)
            for name, value in increments(job, job.owner if job.owner in self.owners else OTHER).items():
                self.values[name] += value
            self.exemplars |= exemplars(job)

    def snapshot(self) -> tuple[dict[Name, float], dict[Name, Seen]]:
        """The counts and the latest exemplars."""
        with self.lock:
            return dict(self.values), dict(self.exemplars)


def summary(counts: Mapping[Name, float]) -> dict[str, Any]:
    """What /status shows of the counts."""
    stages = {name[1]: value for name, value in counts.items() if name[0] == "stage_seconds" and name[2] == "sum"}
    return {
        "ended": {status: int(counts["jobs", status]) for status in sorted(ENDED) if ("jobs", status) in counts},
        "seconds_per_stage": stages,
        "queue_seconds": counts.get(("queue_seconds", "sum"), 0.0),
        "tiles": int(counts.get(("tiles",), 0)),
        "retries": int(counts.get(("retries",), 0)),
    }


def families(counts: Mapping[Name, float], seen: Mapping[Name, Seen], key: str | None) -> Iterator[Metric]:
    """The metrics of the counts.

    Args:
        key: the one key whose rows are shown, without exemplars; None: all keys and exemplars.
    """
    for name, (labels, description) in COUNTERS.items():
        counter = CounterMetricFamily(f"seesr_{name}", description, labels=labels)
        for (metric, *values), count in sorted(counts.items()):
            if metric == name and ("key" not in labels or key in (None, values[0])):
                counter.add_metric(values, count)
        if not labels and not counter.samples:
            counter.add_metric((), 0)
        yield counter
    for name, (labels, description) in HISTOGRAMS.items():
        histogram = HistogramMetricFamily(f"seesr_{name}", description, labels=labels)
        for series in sorted({full[:-1] for full in counts if full[0] == name} | ({(name,)} if not labels else set())):
            buckets, total = [], 0.0
            for bound in map(floatToGoString, BUCKETS):
                total += counts.get((*series, bound), 0)
                exemplar = seen.get((*series, bound)) if key is None else None
                buckets.append((bound, total, exemplar and Exemplar({"job_id": exemplar[0]}, *exemplar[1:])))
            histogram.add_metric(series[1:], buckets, counts.get((*series, "sum"), 0.0))
        yield histogram
