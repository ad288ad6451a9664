"""How much arriero's own processes say on stderr, which Ray keeps as their logs.

Knows the standard library's logging; knows nothing of who says what.
"""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def set_log_level(level: str) -> None:
    """Say what is of this level or above it: "debug", "info", "warning" or "error"."""
    log = logging.getLogger("arriero")
    log.setLevel(level.upper())
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        log.addHandler(handler)
