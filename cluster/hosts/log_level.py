"""Level and form of the logs of arriero's own processes; Ray stores their stderr as log files.

Knows the standard library's logging; knows nothing of the modules that log.
"""

from __future__ import annotations

import logging
import sys

from arriero.router.observability.log_lines import formatter


def set_log_level(level: str, log_format: str = "text") -> None:
    """Log messages of a level and above, in a form.

    Args:
        level: "debug", "info", "warning" or "error".
        log_format: "text", or "json" for a line of JSON each.
    """
    log = logging.getLogger("arriero")
    log.setLevel(level.upper())
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.stderr))
    for handler in log.handlers:
        handler.setFormatter(formatter(log_format))
