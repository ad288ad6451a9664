"""Reads a checkpoint's files into the page cache of this node, so that a load is fast.

Knows files and free memory; knows nothing of file contents.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

KEEP_FREE = 0.25
"""Share of the available memory that stays free for other processes."""


def warm(folder: Path) -> int:
    """Let the kernel read a folder's weights into the page cache.

    No bytes are copied to the process, and cached files cost almost nothing.

    Args:
        folder: a checkpoint on this node.

    Returns:
        Bytes of the weights; 0 if free memory is too small. Then no file is read, because the last
        files would evict the first files.
    """
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    if size > (1 - KEEP_FREE) * _available():
        return 0
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)
    return size


def drop_pages(files: Iterable[Path]) -> None:
    """Let the kernel forget cached pages of files, as far as no process maps them."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _available() -> int:
    """Bytes that processes can allocate without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
