"""Packed weights in mapped files on disk: read ahead of use, released after use.

Knows bytes and maps; knows nothing of layers. The file has no name, so that the system deletes the
file when the process ends. Pages out of use are clean, and the system takes them when memory is
short: a model larger than memory runs at the speed of the disk.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class MappedBytes:
    """Zero bytes in a mapped file without a name.

    Attributes:
        data: the bytes, uint8.
    """

    def __init__(self, num_bytes: int, folder: Path) -> None:
        """Make the file.

        Raises:
            OSError: the file cannot be made, or the disk is full.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
            self._map = mmap.mmap(file.fileno(), max(num_bytes, 1))
        self.data: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]

    def flush(self) -> None:
        """Write the packed bytes to disk, then release the memory."""
        self._map.flush()
        self.release()

    def prefetch(self) -> None:
        """Start to read from disk; returns at once."""
        self._map.madvise(mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Release the memory; a later use reads from disk again."""
        self._map.madvise(mmap.MADV_DONTNEED)
