"""One line of progress at most once a second: rewritten in place on a terminal, one after the other in a log."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm


class Lines:
    """A text stream for tqdm that turns its carriage returns into lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, words: str) -> None:
        words = words.replace("\r", "").strip()
        if words:
            self.stream.write(words + "\n")

    def flush(self) -> None:
        self.stream.flush()


class Progress:
    """Counts tiles within the stages of one picture.

    Args:
        stream: where to write; None: nowhere.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream
        self.bar: tqdm | None = None

    @classmethod
    def to_stderr(cls) -> Progress:
        return cls(sys.stderr)

    def start(self, stage: str, total: int) -> None:
        """Begins a stage of `total` tiles, and ends the one before."""
        self.close()
        if self.stream is not None:
            file = self.stream if self.stream.isatty() else Lines(self.stream)
            self.bar = tqdm(total=total, desc=stage, unit="tile", mininterval=1, delay=1, file=file, leave=False)

    def advance(self, count: int = 1) -> None:
        """`count` more tiles are done."""
        if self.bar is not None:
            self.bar.update(count)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
