"""A checkpoint's files read into this node's page cache, so that a load finds them in memory.

Knows files and the machine's free memory; knows nothing of what is in the files.
"""

from __future__ import annotations

import os
from pathlib import Path

KEEP_FREE = 0.25
"""Of the memory that is available, so much is left to others."""


def warm(folder: Path) -> int:
    """Have the kernel read a folder's weights, as far as memory is free; gives their bytes.

    Nothing is copied out of the cache, and files that are in it already cost next to nothing. 0
    where they would take more than may be had: then none is read, since the first files would be
    pushed out by the last ones.

    Args:
        folder: a checkpoint on this node.
    """
    files = sorted(folder.glob("*.safetensors"))
    size = sum(one.stat().st_size for one in files)
    if size > (1 - KEEP_FREE) * _available():
        return 0
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)
    return size


def _available() -> int:
    """Bytes that processes may have without others being pushed out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
