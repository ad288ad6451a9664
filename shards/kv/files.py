"""Blocks in files: a folder of a node's disk, or of a store that all nodes reach.

A file appears whole or not at all, is checked when it is read, and holds one piece of one block
(see `pieces`), so what one layout wrote another reads. What is wrong is a miss: the file is
removed and the block computed again. Knows files; which of them there may be is the leader's.
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
"""A half-written file this old is nobody's."""


class Folder(Protocol):
    """Where files are; every method may raise OSError."""

    def names(self) -> Iterator[tuple[str, int]]:
        """(path inside the folder, bytes) of each file, the oldest first."""

    def write(self, name: str, parts: list[memoryview]) -> None:
        """Make a file, in one move; one that is there already may stay."""

    def read(self, name: str) -> Bytes:
        """A file's bytes."""

    def remove(self, name: str) -> None:
        """Remove a file; safe when it is gone."""


class LocalFolder:
    """A folder of this node, for its owner's eyes: blocks tell what prompts said.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def names(self) -> Iterator[tuple[str, int]]:
        """See `Folder`; removes what a process that died left half-written."""
        found = []
        for folder, _, files in os.walk(self._path):
            for name in files:
                full = os.path.join(folder, name)
                try:
                    about = os.stat(full)
                except FileNotFoundError:
                    continue
                if name.endswith(".part"):
                    if time.time() - about.st_mtime > _ABANDONED_S:
                        self.remove(os.path.relpath(full, self._path))
                    continue
                found.append((about.st_mtime_ns, os.path.relpath(full, self._path), about.st_size))
        for _, name, size in sorted(found):
            yield name, size

    def write(self, name: str, parts: list[memoryview]) -> None:
        """See `Folder`."""
        path = self._path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
        try:
            with part.open("wb", buffering=0) as stream:
                for one in parts:
                    view = one
                    while len(view):  # an unbuffered write may be short
                        view = view[stream.write(view) :]
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> Bytes:
        """See `Folder`."""
        return np.fromfile(self._path / name, dtype=np.uint8)

    def remove(self, name: str) -> None:
        """See `Folder`."""
        (self._path / name).unlink(missing_ok=True)


class SharedFolder:
    """A folder of any store that fsspec knows."""

    def __init__(self, url: str) -> None:
        import fsspec

        self._fs: Any
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def names(self) -> Iterator[tuple[str, int]]:
        """See `Folder`; in the store's own order."""
        try:
            found: dict[str, dict[str, Any]] = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return
        for path, about in found.items():
            yield path[len(self._root) :].lstrip("/"), int(about.get("size") or 0)

    def write(self, name: str, parts: list[memoryview]) -> None:
        """See `Folder`; stores that cannot make a file in one move are kept safe by its checksum.

        Where such a store has renames, the file is made under another name first.
        """
        path = f"{self._root}/{name}"
        part = f"{path}.{uuid.uuid4().hex[:8]}.part"
        data = b"".join(one for one in parts)
        local = "file" in self._fs.protocol or self._fs.protocol == "file"
        if local:
            self._fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(part, data)
            self._fs.mv(part, path)
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
        folder: where the files are; of one model and one form of block.
        form: of blocks.
        piece: what this rank holds of each.
        writes: False where another rank holds the same piece and writes it.
    """

    def __init__(self, folder: Folder, form: BlockForm, piece: BlockShard, *, writes: bool) -> None:
        self._folder, self._form, self._piece, self._writes = folder, form, piece, writes
        self._pieces: dict[bytes, list[BlockShard]] = {}

    def scan(self) -> list[tuple[bytes, bool]]:
        """Keys that there are files of, oldest first; each with whether our piece is there."""
        found: dict[bytes, list[BlockShard]] = {}
        for path, size in self._folder.names():
            parsed = parse_name(path.rsplit("/", 1)[-1])
            if parsed is None:
                continue
            key, piece = parsed
            pieces = found.pop(key, [])  # the newest file gives the key's place
            if size == self._form.file_bytes(piece):
                pieces.append(piece)
            found[key] = pieces
        self._pieces |= found
        covers: dict[tuple[BlockShard, ...], bool] = {}
        listed = []
        for key, pieces in found.items():
            kind = tuple(pieces)
            if kind not in covers:
                covers[kind] = self._piece.covered_by(pieces)
            listed.append((key, covers[kind]))
        return listed

    def put(self, key: bytes, data: Tensor) -> None:
        """Write our piece of a block.

        Raises:
            OSError: it cannot be written.
        """
        if self._writes:
            parts = self._form.pack(key, self._piece, data)
            self._folder.write(_path(key, self._piece), parts)
        pieces = self._pieces.setdefault(key, [])
        if self._piece not in pieces:
            pieces.insert(0, self._piece)

    def get(self, key: bytes, into: Tensor) -> None:
        """Fill our piece of a block from all files that overlap it.

        Raises:
            BadBlock: not every byte of it is there and right; what is wrong is removed.
        """
        used: list[BlockShard] = []
        for piece in self._pieces.get(key, [self._piece]):
            if self._piece.covered_by(used):
                break
            part = piece.overlap(self._piece)
            if part is None:
                continue
            path = _path(key, piece)
            try:
                data = self._form.unpack(key, piece, self._folder.read(path))
            except FileNotFoundError:
                raise BadBlock(f"{path} is gone") from None
            except (BadBlock, OSError, ValueError) as error:
                log.warning("block file %s: %s; it will be computed again", path, error)
                with contextlib.suppress(OSError):
                    self._folder.remove(path)
                raise BadBlock(f"{path}: {error}") from None
            ours, theirs = part.within(self._piece), part.within(piece)
            into[ours[0], :, ours[1]] = data[theirs[0], :, theirs[1]]
            used.append(piece)
        if not self._piece.covered_by(used):
            raise BadBlock(f"block {key.hex()} is not here whole")

    def drop(self, key: bytes) -> None:
        """Remove a block's files, whoever wrote them."""
        for piece in {*self._pieces.pop(key, []), self._piece}:
            with contextlib.suppress(OSError):
                self._folder.remove(_path(key, piece))


def _path(key: bytes, piece: BlockShard) -> str:
    name = piece.file_name(key)
    return f"{name[:_FAN]}/{name}"


def empty(form: BlockForm, piece: BlockShard, count: int) -> Tensor:
    """Room for a piece of `count` blocks, [count, L, 2, K, P, D]."""
    return torch.empty((count, *form.shape(piece)), dtype=form.dtype)
