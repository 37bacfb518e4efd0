"""Progress and time left of one image: counted work of every stage times the speed that this process measured.

Quotes have other rates (seesr.engine.rates): lines over the size of an image, from all processes. Progress needs the
speed of this process, with the load that the machine has now.
"""

from __future__ import annotations

from collections.abc import Mapping

Work = Mapping[str, float]  # stage -> units of work, in the order of the stages; "file:png" belongs to the stage "file"
MEMORY = 0.8  # weight of all earlier images against the latest one
PRIOR = 0.1  # weight of earlier images in the speed of a running one, as a share of its work


class Speed:
    """Seconds per unit of work of every stage, refined by every image."""

    def __init__(self) -> None:
        self.totals: dict[str, tuple[float, float]] = {}  # name -> (units, seconds), older ones weigh less

    def learn(self, work: Work, seconds: Mapping[str, float]) -> None:
        """Adds a finished image.

        Args:
            work: its units by name.
            seconds: what each stage took; stages without work are left out.
        """
        for name, units in work.items():
            elapsed = seconds.get(stage_of(name))
            if units > 0 and elapsed is not None:
                before = self.totals.get(name, (0.0, 0.0))
                self.totals[name] = MEMORY * before[0] + units, MEMORY * before[1] + elapsed

    def seconds(self, work: Work) -> dict[str, float]:
        """Expected seconds of every stage; 0 for one that has not been measured yet."""
        expected = {}
        for name, units in work.items():
            measured, elapsed = self.totals.get(name, (0.0, 0.0))
            expected[stage_of(name)] = units * elapsed / measured if measured else 0.0
        return expected


def stage_of(name: str) -> str:
    """The stage of a name in Work."""
    return name.partition(":")[0]


class Forecast:
    """Progress and time left of one image. Progress never falls, and the time left never rises.

    Args:
        speed: measured so far.
        work: units of the image by name.
    """

    def __init__(self, speed: Speed, work: Work) -> None:
        self.expected = speed.seconds(work)
        self.whole = sum(self.expected.values())
        self.progress, self.left = 0.0, float("inf")
        self.stage, self.began = "", 0.0

    def at(self, stage: str, done: int, total: int, elapsed: float) -> tuple[float, float | None]:
        """(finished share of the whole image from 0 to 1, seconds left or None) at a moment.

        The more of the image is done, the more its own speed counts.

        Args:
            stage: the running stage.
            done: its finished parts.
            total: all of its parts.
            elapsed: seconds since the image began.
        """
        names = list(self.expected)
        if stage not in names or not self.whole:
            return self.progress, None
        if stage != self.stage:
            self.stage, self.began = stage, elapsed
        at, share = names.index(stage), done / max(1, total)
        planned, prior = self.expected[stage], PRIOR * self.whole
        finished = sum(self.expected[name] for name in names[:at]) + planned * share
        pace = (elapsed + prior) / (finished + prior)
        here = (elapsed - self.began + PRIOR * planned) / (planned * (share + PRIOR)) if planned and share else pace
        left = planned * (1 - share) * here + sum(self.expected[name] for name in names[at + 1 :]) * pace
        self.left = min(self.left, left)
        self.progress = max(self.progress, elapsed / (elapsed + left) if elapsed + left else 0.0)
        return round(self.progress, 4), round(self.left, 2)
