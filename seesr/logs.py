"""Logs with one line per event, as text or, with LOG_FORMAT=json, as JSON."""

from __future__ import annotations

import json
import logging


class JsonLines(logging.Formatter):
    """{"time", "level", "logger", "message"}, or the values themselves where an event was logged as a dict."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        values = record.args if isinstance(record.args, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps({**line, **values}, default=str)


class OneLine(logging.Formatter):
    """Formats a record as one line of text; a traceback is folded into it."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", " | ")


def configure(log_format: str, level: int = logging.INFO) -> None:
    """Sends all logs to standard error, as text ("console") or JSON ("json")."""
    handler = logging.StreamHandler()
    lines = OneLine("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else lines)
    logging.basicConfig(level=level, handlers=[handler], force=True)
