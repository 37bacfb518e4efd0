"""Log lines as text and as JSON."""

from __future__ import annotations

import json
import logging

import pytest

from seesr import logs


@pytest.mark.parametrize("kind", ["json", "console"])
def test_every_event_is_one_line(kind: str, capsys: pytest.CaptureFixture) -> None:
    root = logging.getLogger()
    level, before = root.level, root.handlers[:]
    root.handlers = []
    try:
        logs.configure(kind)
        log = logging.getLogger("test")
        log.info("two\nlines %d", 5)
        log.info("%s", {"seed": 5, "seconds": {"decode": 0.5}})
        try:
            raise ValueError("bad")
        except ValueError:
            log.exception("it failed")
    finally:
        root.handlers, root.level = before, level
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    if kind == "json":
        first, second, third = (json.loads(line) for line in lines)
        assert first["message"] == "two\nlines 5" and first["level"] == "INFO" and first["time"]
        assert second["seed"] == 5 and second["seconds"] == {"decode": 0.5}
        assert "ValueError: bad" in third["error"]


def test_only_events_of_the_level_and_above_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    level, before = root.level, root.handlers[:]
    root.handlers = []
    try:
        logs.configure("json", logging.WARNING)
        logging.getLogger("test").info("quiet")
        logging.getLogger("test").warning("%s at %s", "two", 5)
        logging.getLogger("test").warning("%(event)s", {"event": "ended", "job": "a"})
    finally:
        root.handlers, root.level = before, level
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert first["message"] == "two at 5" and first["logger"] == "test" and "error" not in first
    assert (second["event"], second["job"], second["level"]) == ("ended", "a", "WARNING") and "message" not in second
