"""Appends to a file that survive the loss of the process and of the machine.

Knows bytes; knows nothing of lines' contents.
"""

from __future__ import annotations

import asyncio
import os
from typing import BinaryIO


class AppendFile:
    """A file that lines are appended to.

    Args:
        file: opened for writing, at its end.

    Attributes:
        num_bytes: bytes that were appended.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending: list[bytes] = []
        self._writing = asyncio.Lock()
        self._error: OSError | None = None
        self.num_bytes = 0

    async def append(self, line: bytes) -> None:
        """Append a line; returns once the line is on the disk.

        Lines that come while others are written share a flush.

        Raises:
            OSError: the line, or an earlier one, could not be written; the file takes no more, as
                it may end in part of a line.
        """
        self._pending.append(line)
        async with self._writing:
            if self._pending:
                data, self._pending = b"".join(self._pending), []
                self.num_bytes += len(data)
                # a cancelled caller must not free the lock while the thread writes
                await _whole(asyncio.create_task(asyncio.to_thread(self._write, data)))
            if self._error is not None:
                raise self._error

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._error = error


async def _whole(task: asyncio.Task[None]) -> None:
    """Wait for the end of a task, also when the caller is cancelled."""
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
