"""Fair scheduling of a queue between API keys: the share that one key may fill, and the next job."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from seesr.serving.job import Job


def has_room(owner: str, waiting: Iterable[str], max_queue: int, share: float) -> bool:
    """Whether a queue takes one more job of an owner.

    Alone, an owner may fill the queue. While others wait, it may have `share` of it. What another owner has beyond its
    share takes no room from this one, so that a queue that one owner filled alone still takes the jobs of the others.

    Args:
        waiting: the owner of each job that waits.
        max_queue: jobs that may wait.
        share: of `max_queue`, from 0 to 1; at least one job.
    """
    counts, limit = collections.Counter(waiting), share_of(max_queue, share)
    own_jobs = counts.pop(owner, 0)
    other_jobs = sum(min(count, limit) for count in counts.values())
    return own_jobs + other_jobs < max_queue and (not other_jobs or own_jobs < limit)


def share_of(max_queue: int, share: float) -> int:
    """Jobs that one owner may have in the queue while others wait."""
    return max(1, int(share * max_queue))


class Turns:
    """Owners take turns within a priority: the owner that was served longest ago is next, with its oldest job."""

    def __init__(self) -> None:
        self.count, self.served = 0, collections.defaultdict[str, int](int)  # owner -> its latest turn

    def order(self, waiting: Sequence[Job]) -> list[Job]:
        """The jobs in the order in which `next` would give them if no more came."""
        results: list[Job] = []
        served = self.served.copy()
        for priority in sorted({job.priority for job in waiting}):
            turns = collections.Counter[str]()
            keys: dict[str, tuple[int, int, float]] = {}
            group = sorted((job for job in waiting if job.priority == priority), key=lambda job: job.created)
            for job in group:
                keys[job.id] = turns[job.owner], served[job.owner], job.created
                turns[job.owner] += 1
            results += sorted(group, key=lambda job: keys[job.id])
            served |= {job.owner: self.count + place for place, job in enumerate(results, 1)}
        return results

    def before(self, job: Job, waiting: Iterable[Job]) -> list[Job]:
        """The waiting jobs that would run before this one, in their order."""
        order = self.order([*waiting, job])
        return order[: [other.id for other in order].index(job.id)]

    def next(self, waiting: Sequence[Job]) -> Job:
        """The job to run now; its owner has had its turn then."""
        job = min(waiting, key=lambda job: (job.priority, self.served[job.owner], job.created))
        self.count += 1
        self.served[job.owner] = self.count
        return job
