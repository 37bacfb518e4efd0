"""How much of a job is done and how long the rest takes, from the stage that it is in and the time so far."""

from __future__ import annotations

SHARES = {  # of a job's time by stage, in order; measured with the pocket weights on a CPU at 0.05 to 2.5 megapixels
    "read": 0.005,
    "tags": 0.01,
    "text": 0.002,
    "enlarge": 0.003,
    "encode": 0.12,
    "denoise": 0.70,
    "decode": 0.14,
    "finish": 0.01,
    "file": 0.01,
}
LEAST_PROGRESS = 0.05  # below which nothing can be said about the time left


def progress(stage: str, done: int, total: int) -> float:
    """The finished share of the whole job, from 0 to 1; it does not fall from one stage to the next.

    Args:
        stage: a key of SHARES; any other counts as not begun.
        done: finished parts of the stage.
        total: parts of the stage.
    """
    if stage not in SHARES or not total:
        return 0.0
    names = list(SHARES)
    before = sum(SHARES[name] for name in names[: names.index(stage)])
    return round(min(1.0, before + SHARES[stage] * done / total), 4)


def seconds_left(elapsed: float, progress: float) -> float | None:
    """Seconds until the whole job ends, at its speed so far; None: too little is done to say."""
    return None if progress < LEAST_PROGRESS else round(elapsed * (1 - progress) / progress, 1)
