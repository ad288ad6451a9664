"""How many CPUs this process may use. Knows nothing of the threads that use them."""

from __future__ import annotations

import os


def available_threads() -> int:
    """Number of CPUs of this process, or OMP_NUM_THREADS if lower."""
    try:
        cpus = len(os.sched_getaffinity(0))
    except AttributeError:
        cpus = os.cpu_count() or 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cpus, int(limit)) if limit.isdecimal() and int(limit) > 0 else cpus
