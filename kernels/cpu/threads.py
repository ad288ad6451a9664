"""How many threads this process may compute with. Knows nothing of the threads themselves."""

from __future__ import annotations

import os

from arriero.kernels.cpu import topology


def available_threads() -> int:
    """Number of cores of this process, or OMP_NUM_THREADS if lower; hyperthreads count once."""
    cores = len(topology.cores())
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(limit)) if limit.isdecimal() and int(limit) > 0 else cores
