"""Pages of the files while a slice loads: read ahead of use, given back after it.

Knows which bytes a rank reads and in which order; knows nothing of what they mean. Reading ahead
keeps several requests on their way to the disk (or to where the files lie), from several files;
giving back keeps what has been packed from counting as this process's memory. The system's page
cache holds what was read, so that the ranks of a node read each byte from the disk once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

from arriero.shards.checkpoint.formats.stored import TensorDue, byte_ranges, reads
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.layout.parts import AnyPart

AHEAD_BYTES = 512 << 20
"""Read ahead of what is being packed, at most; a product larger than it is read as it is used."""
CHUNK_BYTES = 8 << 20
READERS = 4
_BUFFER_BYTES = 256 << 10  # stays in a core's cache
_GAP = 32 << 10  # bytes: ranges nearer than this are read as one
_GIVE_BACK_S = 0.02


Range = tuple[Path, int, int]
"""File, first byte, end."""


def ranges_read(folder: TensorFolder, due: Iterable[TensorDue], part: AnyPart) -> Iterator[Range]:
    """What a rank reads, in the order of `due`, ranges that lie near each other joined."""
    last: Range | None = None
    for tensor in due:
        stored = folder.stored.get(tensor.name)
        if stored is None:
            assert tensor.optional, f"{tensor.name}: the folder was checked to hold it"
            continue
        if prod(stored.shape) == 1:  # a scale of a whole matrix, of any number of dimensions
            last = yield from _joined(last, stored.file, stored.start, stored.stop)
            continue
        for box in reads(tensor, part):
            for start, stop in byte_ranges(stored.shape, stored.dtype.itemsize, box, stored.start):
                last = yield from _joined(last, stored.file, start, stop)
    if last is not None:
        yield last


def _joined(last: Range | None, file: Path, start: int, stop: int) -> Generator[Range, None, Range]:
    """The range to go on with: the last one made longer, or a new one, the last being given out."""
    if last is not None and last[0] == file and 0 <= start - last[2] < _GAP:
        return file, last[1], stop
    if last is not None:
        yield last
    return file, start, stop


class Pager:
    """Works from `start` to `close`, in threads of its own."""

    def __init__(self, folder: TensorFolder, ranges: Iterable[Range]) -> None:
        """Prepare.

        Args:
            folder: the rank's own, whose maps are emptied now and then.
            ranges: from `ranges_read`, in the order of use.
        """
        self._folder, self._ranges = folder, ranges
        self._used = 0
        self._closing = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def used(self, num_bytes: int) -> None:
        """Tell how many bytes have been packed so far."""
        with self._changed:
            self._used = num_bytes
            self._changed.notify()

    def start(self) -> None:
        """Begin reading ahead and giving back."""
        for work in (self._read_ahead, self._give_back):
            thread = threading.Thread(target=work, name="pager", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Stop; returns once its threads are gone."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _read_ahead(self) -> None:
        files = {file: os.open(file, os.O_RDONLY) for file in self._folder.files}
        asked = 0
        try:
            with ThreadPoolExecutor(READERS) as pool:
                for file, start, stop in self._ranges:
                    for at in range(start, stop, CHUNK_BYTES):
                        if not self._wait_for_room(asked):
                            return
                        size = min(CHUNK_BYTES, stop - at)
                        asked += size
                        if self._folder.ranged is not None:
                            pool.submit(self._fetch, file, at, at + size)
                        elif not _in_memory(files[file], at, at + size):
                            pool.submit(self._fill_cache, files[file], at, at + size)
        finally:
            for descriptor in files.values():
                os.close(descriptor)

    def _fetch(self, file: Path, start: int, stop: int) -> None:
        """Of files that lie elsewhere; what fails here fails again for whoever packs it."""
        if not self._closing:
            self._folder.need(file, start, stop)

    def _fill_cache(self, descriptor: int, start: int, stop: int) -> None:
        """Read a range and drop what comes.

        Of what is read, Linux fills its cache in large pages; of what it is advised to read, in
        single ones.
        """
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        while start < stop and not self._closing:
            num_bytes = os.preadv(descriptor, [buffer[: stop - start]], start)
            if num_bytes == 0:
                return  # the file was cut; whoever packs it will say so
            start += num_bytes

    def _wait_for_room(self, asked: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or asked - self._used < AHEAD_BYTES)
            return not self._closing

    def _give_back(self) -> None:
        while not self._closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing, _GIVE_BACK_S)
            self._folder.give_back()


def _in_memory(descriptor: int, start: int, stop: int) -> bool:
    """Whether the system's page cache holds both ends: asking it to read what it holds is dear."""
    try:
        return all(
            os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) == 1
            for at in (start, stop - 1)
        )
    except OSError:  # it would have to wait, or cannot tell
        return False
