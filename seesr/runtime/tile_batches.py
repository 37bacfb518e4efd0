"""The tile batches of one denoising step, shared between the process that has the image and its helpers."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol


class TileBatches:
    """The batches of one step: which are waiting, which are taken, and the results. Thread-safe.

    Args:
        image: identifies the run of the image.
        context: what a helper needs once for each image.
        count: number of batches.
        task: encodes what a helper needs for the batch of this number.

    Attributes:
        from_helpers: numbers of the batches whose result came from a helper.
    """

    def __init__(self, image: str, context: bytes, count: int, task: Callable[[int], bytes]) -> None:
        self.image, self.context, self.task = image, context, task
        self.waiting = collections.deque(range(count))
        self.started: dict[int, float] = {}  # number -> when it was taken, seconds
        self.results: dict[int, Any] = {}
        self.finished: set[int] = set()
        self.from_helpers: set[int] = set()
        self.closed = False
        self.changed = threading.Condition()

    def take(self) -> int | None:
        """The next batch that nobody has taken; None: there is none."""
        with self.changed:
            return self._take()

    def _take(self) -> int | None:
        if not self.waiting:
            return None
        number = self.waiting.popleft()
        self.started[number] = time.monotonic()
        return number

    def take_or_wait(self) -> int | None:
        """As `take`, but waits for a batch that is given back; None: the step has ended."""
        with self.changed:
            while not self.closed:
                number = self._take()
                if number is not None:
                    return number
                self.changed.wait()
            return None

    def take_overdue(self, seconds: float) -> int | None:
        """The batch that was taken first, if that was more than `seconds` ago; the caller computes it, too."""
        with self.changed:
            number = min(self.started, key=self.started.__getitem__, default=None)
            if number is None or time.monotonic() - self.started[number] <= seconds:
                return None
            self.started[number] = time.monotonic()
            return number

    def put(self, number: int, result: Any, from_helper: bool = False) -> None:
        """The result of a batch; only the first counts."""
        with self.changed:
            if number in self.finished:
                return
            self.finished.add(number)
            self.started.pop(number, None)
            if number in self.waiting:  # it was given back, and then arrived
                self.waiting.remove(number)
            if from_helper:
                self.from_helpers.add(number)
            self.results[number] = result
            self.changed.notify_all()

    def give_back(self, number: int) -> None:
        """Lets others take a batch whose helper is lost."""
        with self.changed:
            if number not in self.finished and number not in self.waiting:
                self.started.pop(number, None)
                self.waiting.appendleft(number)
                self.changed.notify_all()

    def pop(self, number: int, seconds: float = 0.0) -> Any:
        """The result of a batch, waited for at most so many seconds; None: it has not arrived."""
        with self.changed:
            if seconds and number not in self.results:
                self.changed.wait(seconds)
            return self.results.pop(number, None)

    def close(self) -> None:
        """Ends the step: helpers take nothing more, and late results are dropped."""
        with self.changed:
            self.closed = True
            self.waiting.clear()
            self.finished.update(self.started)
            self.changed.notify_all()


class TilePool(Protocol):
    """Helpers that compute tile batches of images of this process."""

    def begin(self, batches: TileBatches) -> None:
        """Lets the helpers take batches until these are closed. Returns at once."""
        ...
