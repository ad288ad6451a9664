"""Weights that lie elsewhere, fetched piece by piece as they are read.

A file here is as long as the one there, and has holes. A byte for each piece, in a file beside it,
tells whether the piece has come; the processes of a node share both, so that each piece comes once
a node, and a rank's node holds what its ranks read. Knows files and bytes; knows no tensors.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.shards.checkpoint.safetensors_header import MAX_HEADER_BYTES
from arriero.shards.errors import CheckpointError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PIECE_BYTES = 8 << 20
REQUESTS_AT_ONCE = 8
TRIES = 3
_PAUSE_S = 0.5
_KNOWN = "known.json"


class RangedFolder:
    """The safetensors files of one model elsewhere. Safe to share between threads.

    Attributes:
        files: the local files, by name.
    """

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        folder: Path,
        known: Mapping[str, list[Any]],
        where: str,
    ) -> None:
        """Make the files, all holes, or go on with those that an earlier process made.

        Args:
            filesystem: serves ranges.
            root: of the model in it.
            folder: to hold the files; emptied where it holds those of another version. The caller
                holds the lock on it.
            known: size and version of each file, by name.
            where: the URL, for errors.
        """
        self._fs, self._root, self._where = filesystem, root, where
        text = json.dumps(known, sort_keys=True)
        marker = folder / _KNOWN
        if not marker.is_file() or marker.read_text() != text:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, (size, _) in known.items():
                _make_holes(folder / name, size)
                _make_holes(_beside(folder / name), 1 + -(-size // PIECE_BYTES))
            marker.write_text(text)
        self.files = {name: folder / name for name in known}
        self._sizes = {folder / name: int(size) for name, (size, _) in known.items()}
        self._data = {file: self._opened(file) for file in self._sizes}
        self._locks = {file: self._opened(_beside(file)) for file in self._sizes}
        # the first byte is the header's, the others the pieces'
        self._come = {file: mmap.mmap(fd, 0) for file, fd in self._locks.items()}
        self._changed = threading.Condition()
        self._coming: set[tuple[Path, int]] = set()

    def _opened(self, file: Path) -> int:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def need(self, file: Path, start: int, stop: int) -> None:
        """Have bytes [start, stop) of one of `files` in it when this returns.

        Raises:
            CheckpointError: they cannot be fetched.
        """
        come = self._come[file]
        for piece in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)):
            if not come[1 + piece]:
                self._fetch(file, piece)

    def need_headers(self) -> None:
        """Have the headers in all files, and no more of them than that.

        Raises:
            CheckpointError: they cannot be fetched.
        """
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(self._need_header, self._sizes))

    def _need_header(self, file: Path) -> None:
        come, size = self._come[file], self._sizes[file]
        if come[0]:
            return
        with self._alone(file, 0):
            if come[0]:  # by another meanwhile
                return
            prefix = self.read(file, 0, min(8, size))
            length = int.from_bytes(prefix, "little")
            rest = b""
            if length <= MAX_HEADER_BYTES:  # else whoever parses it will say so
                rest = self.read(file, len(prefix), min(8 + length, size))
            self._write(file, prefix + rest, 0)
            come[0] = 1

    def _fetch(self, file: Path, piece: int) -> None:
        come, start = self._come[file], piece * PIECE_BYTES
        with self._alone(file, 1 + piece):
            if come[1 + piece]:  # by another meanwhile
                return
            data = self.read(file, start, min(start + PIECE_BYTES, self._sizes[file]))
            self._write(file, data, start)
            come[1 + piece] = 1

    def _write(self, file: Path, data: bytes, start: int) -> None:
        left = memoryview(data)
        try:
            while left:
                num_bytes = os.pwrite(self._data[file], left, start)
                left, start = left[num_bytes:], start + num_bytes
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written: {error.strerror}") from None

    @contextmanager
    def _alone(self, file: Path, mark: int) -> Iterator[None]:
        """No other thread here and no other process of the node fetches this piece meanwhile."""
        one = (file, mark)
        with self._changed:
            self._changed.wait_for(lambda: one not in self._coming)
            self._coming.add(one)
        try:
            fcntl.lockf(self._locks[file], fcntl.LOCK_EX, 1, mark)
            yield
        finally:
            fcntl.lockf(self._locks[file], fcntl.LOCK_UN, 1, mark)
            with self._changed:
                self._coming.discard(one)
                self._changed.notify_all()

    def read(self, file: Path, start: int, stop: int) -> bytes:
        """Bytes [start, stop) from there, not kept here.

        Raises:
            CheckpointError: they cannot be fetched.
        """
        if start == stop:
            return b""
        place = f"{self._where}/{file.name}: bytes {start}:{stop}"
        for left in reversed(range(TRIES)):
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{file.name}", start=start, end=stop)
            except Exception as error:  # what filesystems raise has no common base
                if not left:
                    raise CheckpointError(f"{place} cannot be fetched: {error}") from None
                time.sleep(_PAUSE_S)
                continue
            if len(data) == stop - start:
                return data
        raise CheckpointError(
            f"{place}: {len(data)} bytes came: the file was changed, or its server serves no "
            "ranges; copy it whole with `arriero models pull`"
        )


def _beside(file: Path) -> Path:
    return file.with_name(f"{file.name}.come")


def _make_holes(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)
