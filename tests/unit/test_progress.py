"""Watchers of an image: calls, deadlines, and progress bars in terminals and logs."""

from __future__ import annotations

import io

import pytest

from seesr.runtime import progress
from seesr.runtime.progress import Bar, Deadline, DeadlineExceeded, LineStream, Position, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_change_reaches_every_listener() -> None:
    first: list[Position] = []
    second: list[Position] = []
    progress = Progress(first.append, second.append)
    assert progress.position == Position("", 0, 0)
    progress.start("read")
    progress.finish()
    progress.finish()  # done already
    progress.start("denoise", 5)
    progress.advance()
    progress.advance(2)
    progress.finish()
    steps = [("read", 0, 1), ("read", 1, 1)] + [("denoise", done, 5) for done in (0, 1, 3, 5)]
    assert first == second == [Position(*step) for step in steps]
    assert str(progress.position) == "denoise, 5 of 5"


def test_a_deadline_ends_the_work_after_it_and_not_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    deadline = Deadline(2.5)
    for now[0] in (100.0, 102.4, 102.5):
        deadline(Position("denoise", 3, 7))
    now[0] = 102.6
    with pytest.raises(DeadlineExceeded) as error:
        deadline(Position("denoise", 3, 7))
    assert str(error.value) == "the deadline of 2.5 s has passed (denoise, 3 of 7); allow more time"


def test_carriage_returns_become_lines() -> None:
    stream = io.StringIO()
    lines = LineStream(stream)
    for message in ("\rhalf", "  ", "\r", "\rwhole  ", "\n"):
        lines.write(message)
    lines.flush()
    assert stream.getvalue() == "half\nwhole\n"


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_a_bar_shows_a_long_stage_with_its_name_and_count(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> None:
    created: list[dict] = []

    class Shown(progress.tqdm):
        def __init__(self, **options: object) -> None:
            created.append(options)
            super().__init__(**{**options, "delay": 0, "mininterval": 0})

    monkeypatch.setattr(progress, "tqdm", Shown)
    bar = Bar(stream)
    bar(Position("read", 0, 1))
    bar(Position("read", 1, 1))
    for done in (0, 2, 2, 1, 3):  # a second try of a stage begins again
        bar(Position("denoise", done, 4))
    shown = [(options["desc"], options["total"]) for options in created]
    assert shown == [("read", 1), ("denoise", 4), ("denoise", 4)] and bar.bar is not None and bar.bar.n == 3
    assert all((options["delay"], options["mininterval"], options["leave"]) == (1, 1, False) for options in created)
    bar(Position("denoise", 4, 4))
    assert bar.bar is None
    message = stream.getvalue()
    assert "denoise:  50%" in message and "2/4" in message
    assert ("\r" in message) == stream.isatty()
    bar.close()


def test_a_short_stage_shows_nothing() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    for done in range(4):
        bar(Position("denoise", done, 3))
    assert stream.getvalue() == "" and bar.bar is None
