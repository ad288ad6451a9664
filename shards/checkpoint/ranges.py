"""Remote weight files, fetched in pieces when a reader needs them.

A local sparse file has the size of the remote file. A marks file beside it has a byte for each
piece: 1 if the piece is present. The processes of a node share both files, so that a node fetches
each piece once and stores only the pieces that its ranks read. Knows files and bytes; knows
nothing of tensors.
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

from arriero.shards.checkpoint.safetensors_limits import LENGTH_BYTES, MAX_HEADER_BYTES
from arriero.shards.errors import CheckpointError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PIECE_BYTES = 8 << 20
REQUESTS_AT_ONCE = 8
TRIES = 3
_PAUSE_S = 0.5
_KNOWN = "known.json"


class RangedFolder:
    """The safetensors files of a remote model. Safe to share between threads.

    Attributes:
        files: local files, by name.
    """

    def __init__(
        self,
        filesystem: AbstractFileSystem,
        root: str,
        folder: Path,
        known: Mapping[str, list[Any]],
        url: str,
    ) -> None:
        """Create empty sparse files, or reuse the files of an earlier process.

        Args:
            filesystem: remote file system; serves byte ranges.
            root: path of the model in the file system.
            folder: local folder for the files; cleared if it holds another version. The caller
                holds the lock of the folder.
            known: size and version of each file, by name.
            url: URL of the model, for errors.
        """
        self._fs, self._root, self._url = filesystem, root, url
        text = json.dumps(known, sort_keys=True)
        marker = folder / _KNOWN
        if not marker.is_file() or marker.read_text() != text:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name, (size, _) in known.items():
                _make_sparse(folder / name, size)
                _make_sparse(_marks_file(folder / name), 1 + -(-size // PIECE_BYTES))
            marker.write_text(text)
        self.files = {name: folder / name for name in known}
        self._sizes = {folder / name: int(size) for name, (size, _) in known.items()}
        self._data = {file: self._open(file) for file in self._sizes}
        self._locks = {file: self._open(_marks_file(file)) for file in self._sizes}
        # the first byte stands for the header, each other byte for a piece
        self._present = {file: mmap.mmap(fd, 0) for file, fd in self._locks.items()}
        self._changed = threading.Condition()
        self._in_progress: set[tuple[Path, int]] = set()

    def _open(self, file: Path) -> int:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def need(self, file: Path, start: int, stop: int) -> None:
        """Fetch bytes [start, stop) of a file of `files` unless present.

        Raises:
            CheckpointError: the bytes cannot be fetched.
        """
        present = self._present[file]
        for piece in range(start // PIECE_BYTES, -(-stop // PIECE_BYTES)):
            if not present[1 + piece]:
                self._fetch(file, piece)

    def need_headers(self) -> None:
        """Fetch the headers of all files unless present.

        Raises:
            CheckpointError: a header cannot be fetched.
        """
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(self._need_header, self._sizes))

    def _need_header(self, file: Path) -> None:
        present, size = self._present[file], self._sizes[file]
        if present[0]:
            return
        with self._exclusive(file, 0):
            if present[0]:  # another thread or process has fetched it
                return
            prefix = self.read(file, 0, min(LENGTH_BYTES, size))
            length = int.from_bytes(prefix, "little")
            rest = b""
            if length <= MAX_HEADER_BYTES:  # else the parser raises the error
                rest = self.read(file, len(prefix), min(LENGTH_BYTES + length, size))
            self._write(file, prefix + rest, 0)
            present[0] = 1

    def _fetch(self, file: Path, piece: int) -> None:
        present, start = self._present[file], piece * PIECE_BYTES
        with self._exclusive(file, 1 + piece):
            if present[1 + piece]:  # another thread or process has fetched it
                return
            data = self.read(file, start, min(start + PIECE_BYTES, self._sizes[file]))
            self._write(file, data, start)
            present[1 + piece] = 1

    def _write(self, file: Path, data: bytes, start: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                num_bytes = os.pwrite(self._data[file], rest, start)
                rest, start = rest[num_bytes:], start + num_bytes
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be written: {error.strerror}") from None

    @contextmanager
    def _exclusive(self, file: Path, mark: int) -> Iterator[None]:
        """Exclude other threads and other processes of this node from fetching this piece."""
        key = (file, mark)
        with self._changed:
            self._changed.wait_for(lambda: key not in self._in_progress)
            self._in_progress.add(key)
        try:
            fcntl.lockf(self._locks[file], fcntl.LOCK_EX, 1, mark)
            yield
        finally:
            fcntl.lockf(self._locks[file], fcntl.LOCK_UN, 1, mark)
            with self._changed:
                self._in_progress.discard(key)
                self._changed.notify_all()

    def read(self, file: Path, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the remote file, without storing them.

        Raises:
            CheckpointError: the bytes cannot be fetched.
        """
        if start == stop:
            return b""
        where = f"{self._url}/{file.name}: bytes {start}:{stop}"
        for tries_left in reversed(range(TRIES)):
            try:
                data: bytes = self._fs.cat_file(f"{self._root}/{file.name}", start=start, end=stop)
            except Exception as error:  # exceptions of file systems have no common base class
                if not tries_left:
                    raise CheckpointError(
                        f"{where} cannot be fetched: {error}; check the network "
                        "and the access rights"
                    ) from None
                time.sleep(_PAUSE_S)
                continue
            if len(data) == stop - start:
                return data
        raise CheckpointError(
            f"{where}: {len(data)} bytes came: the file was changed, or the server does not serve "
            "byte ranges; copy the whole model with `arriero models pull`"
        )


def _marks_file(file: Path) -> Path:
    return file.with_name(f"{file.name}.come")


def _make_sparse(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.truncate(size)
