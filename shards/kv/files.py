"""Blocks in files: in a folder of a node's disk, or of a store that all nodes reach.

A file appears whole or not at all, is checked on reading, and has one shard of one block (see
`block_shards`), so files of one layout serve another. A bad file is a miss: the file is removed and
the block computed again. Knows files; the leader decides which files exist.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from arriero.shards.kv.block_shards import BadBlock, BlockForm, BlockShard, Bytes, parse_name

log = logging.getLogger(__name__)

_FAN = 2
"""Hex digits of a key that name its sub-folder."""
_ABANDONED_S = 600.0
"""Age in seconds after which a half-written file is removed."""


class Folder(Protocol):
    """A folder of files; every method may raise OSError."""

    def names(self) -> Iterator[tuple[str, int]]:
        """(path inside the folder, bytes) of each file, the oldest first."""

    def write(self, name: str, parts: list[memoryview]) -> None:
        """Create a file atomically; an existing file may stay."""

    def read(self, name: str) -> Bytes:
        """Bytes of a file."""

    def remove(self, name: str) -> None:
        """Remove a file; safe when there is no such file."""


class LocalFolder:
    """A folder of this node, readable by the owner alone: blocks reveal the text of prompts.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def names(self) -> Iterator[tuple[str, int]]:
        """See `Folder`; removes half-written files of dead processes."""
        listed = []
        for folder, _, names in os.walk(self._path):
            for name in names:
                full = os.path.join(folder, name)
                try:
                    status = os.stat(full)
                except FileNotFoundError:
                    continue
                path = os.path.relpath(full, self._path)
                if name.endswith(".part"):
                    if time.time() - status.st_mtime > _ABANDONED_S:
                        self.remove(path)
                    continue
                listed.append((status.st_mtime_ns, path, status.st_size))
        for _, path, size in sorted(listed):
            yield path, size

    def write(self, name: str, parts: list[memoryview]) -> None:
        """See `Folder`."""
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with temporary.open("wb", buffering=0) as stream:
                for view in parts:
                    while len(view):  # an unbuffered write may be short
                        view = view[stream.write(view) :]
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> Bytes:
        """See `Folder`."""
        return np.fromfile(self._path / name, dtype=np.uint8)

    def remove(self, name: str) -> None:
        """See `Folder`."""
        (self._path / name).unlink(missing_ok=True)


class SharedFolder:
    """A folder in any store supported by fsspec."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._fs: Any
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def names(self) -> Iterator[tuple[str, int]]:
        """See `Folder`; in the store's own order."""
        try:
            files: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return
        for path, status in files.items():
            yield path[len(self._root) :].lstrip("/"), int(status.get("size") or 0)

    def write(self, name: str, parts: list[memoryview]) -> None:
        """See `Folder`; in stores without atomic creation the checksum protects the reader.

        In a store with renames, the file is created under another name first.
        """
        path = f"{self._root}/{name}"
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.temporary"
        data = b"".join(parts)
        local = "file" in self._fs.protocol or self._fs.protocol == "file"
        if local:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(temporary, data)
            self._fs.mv(temporary, path)
        else:
            self._fs.pipe_file(path, data)

    def read(self, name: str) -> Bytes:
        """See `Folder`."""
        return np.frombuffer(bytearray(self._fs.cat_file(f"{self._root}/{name}")), dtype=np.uint8)

    def remove(self, name: str) -> None:
        """See `Folder`."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")


class BlockFiles:
    """One rank's view of the blocks in a folder.

    Args:
        folder: folder of the files, for one model and one format of block.
        form: format of the blocks.
        shard: this rank's shard of each block.
        writes: False if another rank with the same shard writes the files.
    """

    def __init__(self, folder: Folder, form: BlockForm, shard: BlockShard, *, writes: bool) -> None:
        self._folder, self._form, self._shard, self._writes = folder, form, shard, writes
        self._shards: dict[bytes, list[BlockShard]] = {}

    def scan(self) -> list[tuple[bytes, bool]]:
        """Keys with files, oldest first; each with whether the rank's shard is complete."""
        shards_of: dict[bytes, list[BlockShard]] = {}
        for path, size in self._folder.names():
            parsed = parse_name(path.rsplit("/", 1)[-1])
            if parsed is None:
                continue
            key, shard = parsed
            shards = shards_of.pop(key, [])  # the newest file decides the key's position
            if size == self._form.file_bytes(shard):
                shards.append(shard)
            shards_of[key] = shards
        self._shards |= shards_of
        covers: dict[tuple[BlockShard, ...], bool] = {}
        listed = []
        for key, shards in shards_of.items():
            combination = tuple(shards)
            if combination not in covers:
                covers[combination] = self._shard.covered_by(shards)
            listed.append((key, covers[combination]))
        return listed

    def put(self, key: bytes, data: Tensor) -> None:
        """Write the rank's shard of a block.

        Raises:
            OSError: the file cannot be written.
        """
        if self._writes:
            parts = self._form.pack(key, self._shard, data)
            self._folder.write(_path(key, self._shard), parts)
        shards = self._shards.setdefault(key, [])
        if self._shard not in shards:
            shards.insert(0, self._shard)

    def get(self, key: bytes, into: Tensor) -> None:
        """Fill the rank's shard of a block from all files that overlap the shard.

        Raises:
            BadBlock: some bytes are missing or wrong; wrong files are removed.
        """
        used: list[BlockShard] = []
        for shard in self._shards.get(key, [self._shard]):
            if self._shard.covered_by(used):
                break
            overlap = shard.overlap(self._shard)
            if overlap is None:
                continue
            path = _path(key, shard)
            try:
                data = self._form.unpack(key, shard, self._folder.read(path))
            except FileNotFoundError:
                raise BadBlock(f"{path} is missing") from None
            except (BadBlock, OSError, ValueError) as error:
                log.warning("block file %s: %s; the block is computed again", path, error)
                with contextlib.suppress(OSError):
                    self._folder.remove(path)
                raise BadBlock(f"{path}: {error}") from None
            ours, theirs = overlap.within(self._shard), overlap.within(shard)
            into[ours[0], :, ours[1]] = data[theirs[0], :, theirs[1]]
            used.append(shard)
        if not self._shard.covered_by(used):
            raise BadBlock(f"block {key.hex()} is incomplete")

    def drop(self, key: bytes) -> None:
        """Remove a block's files of all ranks."""
        for shard in {*self._shards.pop(key, []), self._shard}:
            with contextlib.suppress(OSError):
                self._folder.remove(_path(key, shard))


def _path(key: bytes, shard: BlockShard) -> str:
    name = shard.file_name(key)
    return f"{name[:_FAN]}/{name}"


def empty(form: BlockForm, shard: BlockShard, count: int) -> Tensor:
    """Memory for a shard of `count` blocks, [count, L, 2, K, P, D]."""
    return torch.empty((count, *form.shape(shard)), dtype=form.dtype)
