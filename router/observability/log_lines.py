"""The lines of a process's log: as text for people, or as JSON for a log store.

Each line has the id of the request that the current task serves. Knows records and request ids;
knows nothing of files and of the modules that log.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextvars import ContextVar

_request_id: ContextVar[str] = ContextVar("log_request_id", default="")


def set_request_id(request_id: str) -> None:
    """Note the request that the current task serves, with all tasks that it starts."""
    _request_id.set(request_id)


def formatter(kind: str) -> logging.Formatter:
    """The formatter for "text" or "json"."""
    return JsonFormatter() if kind == "json" else TextFormatter()


class TextFormatter(logging.Formatter):
    """A line of text: time, level, logger, message, and the request's id in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback."""
        line, request_id = super().formatMessage(record), _id_of(record)
        return f"{line} [{request_id}]" if request_id and request_id not in line else line


class JsonFormatter(logging.Formatter):
    """A line of JSON with time (UTC), level, logger, pid and message.

    Where known also `request_id` and `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "pid": os.getpid(),
            "message": record.getMessage(),
        }
        if request_id := _id_of(record):
            line["request_id"] = request_id
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _id_of(record: logging.LogRecord) -> str:
    """The request's id: the record's own, from `extra`, else that of the current task."""
    return str(getattr(record, "request_id", "")) or _request_id.get()
