"""The log level of arriero's own processes; Ray stores their stderr as log files.

Knows the standard library's logging; knows nothing of the modules that log.
"""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_log_level(level: str) -> None:
    """Log messages of this level and above: "debug", "info", "warning" or "error"."""
    log = logging.getLogger("arriero")
    log.setLevel(level.upper())
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        log.addHandler(handler)
