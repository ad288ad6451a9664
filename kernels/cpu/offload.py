"""Packed weights that stay on disk, mapped: read ahead of use, let go after it.

Knows bytes and maps; refuses to know layers. The file has no name, so nothing is left behind when
its process ends. Pages that are not in use are clean, and the system takes them where memory is
short: a model larger than memory runs at the disk's pace.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor


class MappedRoom:
    """Zeroed bytes on a file without a name.

    Attributes:
        data: uint8, the bytes.
    """

    def __init__(self, num_bytes: int, folder: Path) -> None:
        """Make the file.

        Raises:
            OSError: it cannot be made, or the disk is full.
        """
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, max(num_bytes, 1))
            self._map = mmap.mmap(file.fileno(), max(num_bytes, 1))
        self.data: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]

    def written(self) -> None:
        """Write what was packed to the disk, and let go of it."""
        self._map.flush()
        self.behind()

    def ahead(self) -> None:
        """Begin to read; returns at once."""
        self._map.madvise(mmap.MADV_WILLNEED)

    def behind(self) -> None:
        """Let go; what is used again is read again."""
        self._map.madvise(mmap.MADV_DONTNEED)
