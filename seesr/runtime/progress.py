"""Progress of one image. Watchers are called after every batch of tiles, and stop the work by raising."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from seesr.runtime.estimate import Forecast


class Position(NamedTuple):
    """The stage of one image, and the tiles done in it.

    Attributes:
        stage: read, tags, text, enlarge, encode, denoise, decode, finish or file.
        done: tiles of the stage that are done; a stage without tiles counts as one.
        total: tiles of the stage.
        progress: the finished share of the whole image, from 0 to 1; 0 without a forecast.
        seconds_left: of the whole image; None: not known.
    """

    stage: str
    done: int
    total: int
    progress: float = 0.0
    seconds_left: float | None = None

    def __str__(self) -> str:
        return f"{self.stage}, {self.done} of {self.total}"


Watcher = Callable[[Position], None]  # called at the start of every stage and after every batch of tiles


class DeadlineExceeded(RuntimeError):
    """An image took longer than its deadline. One line with the deadline and the progress."""


class Deadline:
    """A watcher that ends the work once `seconds` have passed.

    Args:
        seconds: until the end.
        passed: seconds of them that have passed already.
    """

    def __init__(self, seconds: float, passed: float = 0.0) -> None:
        self.seconds, self.end = seconds, time.monotonic() + seconds - passed

    def __call__(self, position: Position) -> None:
        if time.monotonic() > self.end:
            raise DeadlineExceeded(f"the deadline of {self.seconds:g} s has passed ({position}); allow more time")


class LineStream:
    """A text stream for tqdm that turns its carriage returns into lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        text = text.replace("\r", "").strip()
        if text:
            self.stream.write(text + "\n")

    def flush(self) -> None:
        self.stream.flush()


class Bar:
    """A watcher that shows one line at most once a second: rewritten on a terminal, one after the other in a log."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self.stream = stream
        self.bar: tqdm[Any] | None = None

    def __call__(self, position: Position) -> None:
        if self.bar is None or self.bar.desc.removesuffix(": ") != position.stage or position.done < self.bar.n:
            self.close()
            file = self.stream if self.stream.isatty() else LineStream(self.stream)
            self.bar = tqdm(
                total=position.total, desc=position.stage, unit="tile", mininterval=1, delay=1, file=file, leave=False
            )
        self.bar.update(position.done - self.bar.n)
        if position.done == position.total:
            self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Progress:
    """Counts the tiles of one image, stage by stage.

    Args:
        watchers: called with every new Position.
    """

    def __init__(self, *watchers: Watcher) -> None:
        self.watchers = watchers
        self.position = Position("", 0, 0)
        self.forecast: Forecast | None = None  # set once the work is known
        self.began = time.monotonic()

    def start(self, stage: str, total: int = 1) -> None:
        """Begins a stage of `total` tiles."""
        self.position = Position(stage, 0, total)
        self.notify()

    def advance(self, count: int = 1) -> None:
        """`count` more tiles are done."""
        self.position = self.position._replace(done=self.position.done + count)
        self.notify()

    def finish(self) -> None:
        """Marks a stage that did not count its tiles as done."""
        if self.position.done < self.position.total:
            self.advance(self.position.total - self.position.done)

    def notify(self) -> None:
        if self.forecast is not None:
            stage, done, total = self.position[:3]
            progress, left = self.forecast.at(stage, done, total, time.monotonic() - self.began)
            self.position = Position(stage, done, total, progress, left)
        for watcher in self.watchers:
            watcher(self.position)
