"""Read-ahead of weight files while a slice loads, and release of pages after use.

Knows the bytes that a rank reads and their order; knows nothing of their meaning. Read-ahead keeps
several requests to the disk (or the remote store) in flight, from several files. Released pages no
longer count as memory of this process. The page cache of the system keeps the bytes, so that the
ranks of a node read each byte from the disk once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from arriero.shards.checkpoint.formats.stored import TensorSpec, byte_ranges, reads
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.layout.parts import AnyPart

AHEAD_BYTES = 512 << 20
"""Limit of read-ahead in bytes; a larger matrix is read while it is packed."""
CHUNK_BYTES = 8 << 20
READERS = 4
_BUFFER_BYTES = 256 << 10  # fits in the cache of a core
_GAP = 32 << 10  # bytes; ranges with a smaller gap are read together
_RELEASE_INTERVAL_S = 0.02


Range = tuple[Path, int, int]
"""File, first byte, byte after the last."""


def ranges_read(
    folder: TensorFolder, specs: Iterable[TensorSpec], part: AnyPart
) -> Iterator[Range]:
    """The byte ranges that a rank reads, in the order of `due`; near ranges are joined."""
    last: Range | None = None
    for tensor in specs:
        stored = folder.stored.get(tensor.name)
        if stored is None:
            assert tensor.optional, f"{tensor.name}: the folder check refuses a missing tensor"
            continue
        if prod(stored.shape) == 1:  # a scale for a whole matrix, with any number of dimensions
            last = yield from _joined(last, stored.file, stored.start, stored.stop)
            continue
        for box in reads(tensor, part):
            for start, stop in byte_ranges(stored.shape, stored.dtype.itemsize, box, stored.start):
                last = yield from _joined(last, stored.file, start, stop)
    if last is not None:
        yield last


def _joined(last: Range | None, file: Path, start: int, stop: int) -> Generator[Range, None, Range]:
    """Yields `last` if the next range is far away; returns the current range."""
    if last is not None and last[0] == file and 0 <= start - last[2] < _GAP:
        return file, last[1], stop
    if last is not None:
        yield last
    return file, start, stop


class Pager:
    """Reads ahead and releases pages in own threads, from `start` to `close`."""

    def __init__(self, folder: TensorFolder, ranges: Iterable[Range]) -> None:
        """Prepare; no thread starts.

        Args:
            folder: folder of this rank; the pager releases pages of its maps at intervals.
            ranges: byte ranges from `ranges_read`, in the order of use.
        """
        self._folder, self._ranges = folder, ranges
        self._used = 0
        self._closing = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def used(self, num_bytes: int) -> None:
        """Report the number of bytes packed so far."""
        with self._changed:
            self._used = num_bytes
            self._changed.notify()

    def start(self) -> None:
        """Start read-ahead and page release."""
        for work in (self._read_ahead, self._release_pages):
            thread = threading.Thread(target=work, name="pager", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Stop; returns when the threads have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _read_ahead(self) -> None:
        files = {file: os.open(file, os.O_RDONLY) for file in self._folder.files}
        requested = 0
        try:
            with ThreadPoolExecutor(READERS) as pool:
                for file, start, stop in self._ranges:
                    for at in range(start, stop, CHUNK_BYTES):
                        if not self._wait_for_room(requested):
                            return
                        size = min(CHUNK_BYTES, stop - at)
                        requested += size
                        if self._folder.ranged is not None:
                            pool.submit(self._fetch, file, at, at + size)
                        elif not _in_memory(files[file], at, at + size):
                            pool.submit(self._fill_cache, files[file], at, at + size)
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def _fetch(self, file: Path, start: int, stop: int) -> None:
        """Fetch a range of a remote file; an error is raised again where the range is packed."""
        if not self._closing:
            self._folder.need(file, start, stop)

    def _fill_cache(self, descriptor: int, start: int, stop: int) -> None:
        """Read a range and drop the bytes.

        Linux fills the page cache in large pages on a read, but in single pages on `fadvise`.
        """
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while start < stop and not self._closing:
            num_bytes = os.preadv(descriptor, [buffer[: stop - start]], start)
            if num_bytes == 0:
                return  # the file was truncated; packing raises the error
            start += num_bytes

    def _wait_for_room(self, requested: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or requested - self._used < AHEAD_BYTES)
            return not self._closing

    def _release_pages(self) -> None:
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, _RELEASE_INTERVAL_S)
            self._folder.release_pages()


def _in_memory(descriptor: int, start: int, stop: int) -> bool:
    """Whether the page cache holds both ends of a range; a read of cached bytes is expensive."""
    try:
        return all(
            os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
            for at in (start, stop - 1)
        )
    except OSError:  # the read would block, or the file system cannot answer
        return False
