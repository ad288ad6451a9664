"""Packed matrices of the CPU backend in a file, so that a later start reads what this one packed.

The file holds the bytes of all tensors, then a JSON index and the index's length. Weights are read
into memory on large pages, which the kernels walk faster than the pages of a mapped file. A thread
writes the file while the slice starts; the file gets its name once it is whole. Knows bytes; knows
nothing of checkpoints, keys and of the file's place.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from arriero.kernels.cpu.library import Matrix
from arriero.kernels.cpu.structs import linear_of, packed_of, vocab_of
from arriero.kernels.cpu.weights import Packed, large_zeros
from arriero.kernels.packed_file import PackedFile
from arriero.kernels.packed_weights import Linear, Vocab

_log = logging.getLogger(__name__)
_TAIL = struct.Struct("<Q8s")
_MAGIC = b"ARRPACK1"
_POINTERS = [name for name, kind in Matrix._fields_ if kind is ctypes.c_void_p]
_STALE_S = 3600.0
"""Age in seconds after which an unfinished file belongs to a process that ended."""


class CpuPackedFile(PackedFile):
    """A file that is read, or written if it does not exist; see `PackedFile`."""

    def __init__(self, path: Path) -> None:
        """Open the file; a damaged one is deleted and written again."""
        self._path = path
        self._file: BufferedReader | None = None
        self._index: dict[str, Any] = {}
        self._writer: _Writer | None = None
        try:
            self._file = path.open("rb")
            self._index = _read_index(self._file)
            os.utime(path)  # the time of the last use
        except FileNotFoundError:
            self._writer = _Writer(path)
        except (OSError, ValueError) as error:
            _log.warning("packed weights in %s are damaged (%s) and are packed again", path, error)
            self._close_file()
            with contextlib.suppress(OSError):
                path.unlink()
            self._writer = _Writer(path)
        self.complete = self._writer is None

    def linear(self, key: str, make: Callable[[], Linear]) -> Linear:
        """See `PackedFile.linear`."""
        packed = self._read(key)
        if packed is not None:
            return linear_of(packed)
        linear = make()
        if linear.inputs is None:
            self._keep(key, linear.packed)
        return linear

    def vocab(self, key: str, first_row: int, make: Callable[[], Vocab]) -> Vocab:
        """See `PackedFile.vocab`."""
        packed = self._read(key)
        if packed is not None:
            return vocab_of(packed, first_row)
        vocab = make()
        self._keep(key, vocab.packed)
        return vocab

    def close(self, *, whole: bool) -> None:
        """See `PackedFile.close`."""
        self._close_file()
        if self._writer is not None:
            self._writer.finish(whole=whole)

    def join(self, timeout_s: float) -> bool:
        """Wait until the file is written; false after `timeout_s` seconds."""
        return self._writer is None or self._writer.join(timeout_s)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _keep(self, key: str, packed: object) -> None:
        matrix = packed_of(packed)
        if self._writer is not None and matrix.mapping is None:
            self._writer.put(key, matrix)

    def _read(self, key: str) -> Packed | None:
        entry = self._index.get(key)
        if entry is None or self._file is None:
            return None
        tensors = tuple(_read_tensor(self._file, tensor) for tensor in entry["tensors"])
        matrix = Matrix(**entry["numbers"])
        for name, number in entry["pointers"].items():
            setattr(matrix, name, tensors[number].data_ptr())
        return Packed(struct=matrix, tensors=tensors)


def _read_index(file: BufferedReader) -> dict[str, Any]:
    """The index of a whole file.

    Raises:
        ValueError: the file is cut off or of another format.
    """
    size = file.seek(0, os.SEEK_END)
    if size < _TAIL.size:
        raise ValueError(f"{size} bytes")
    file.seek(size - _TAIL.size)
    length, magic = _TAIL.unpack(file.read(_TAIL.size))
    if magic != _MAGIC or length > size - _TAIL.size:
        raise ValueError("no index at the end")
    file.seek(size - _TAIL.size - length)
    index = json.loads(file.read(length))
    if not isinstance(index, dict) or index.pop("size", None) != size - _TAIL.size - length:
        raise ValueError("index of another file")
    return index


def _read_tensor(file: BufferedReader, entry: dict[str, Any]) -> Tensor:
    data = large_zeros(entry["nbytes"])
    file.seek(entry["offset"])
    if file.readinto(data.numpy().data) != entry["nbytes"]:
        raise OSError(f"{file.name}: {entry['nbytes']} bytes at {entry['offset']} are missing")
    tensor: Tensor = data.view(getattr(torch, entry["dtype"])).view(entry["shape"])
    return tensor


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


class _Writer:
    """Writes matrices in a thread, in the order in which they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._queue: queue.SimpleQueue[tuple[str, Packed] | bool] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="packed-weights", daemon=True)
        self._thread.start()

    def put(self, key: str, packed: Packed) -> None:
        self._queue.put((key, packed))

    def finish(self, *, whole: bool) -> None:
        self._queue.put(whole)

    def join(self, timeout_s: float) -> bool:
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.unfinished")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            _delete_stale(self._path.parent)
            with unfinished.open("wb") as file:
                whole = self._write(file)
            if whole:
                unfinished.replace(self._path)
        except OSError as error:
            _log.warning("packed weights are not kept in %s: %s", self._path, error)
        finally:
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _write(self, file: BinaryIO) -> bool:
        """Write all matrices and the index; false when the load failed."""
        index: dict[str, Any] = {}
        while not isinstance(item := self._queue.get(), bool):
            key, packed = item
            addresses = {tensor.data_ptr(): n for n, tensor in enumerate(packed.tensors)}
            tensors = []
            for tensor in packed.tensors:
                tensors.append(
                    {
                        "offset": file.tell(),
                        "nbytes": tensor.nbytes,
                        "dtype": str(tensor.dtype).removeprefix("torch."),
                        "shape": list(tensor.shape),
                    }
                )
                file.write(_bytes_of(tensor))
            fields = {name: getattr(packed.struct, name) for name, _ in Matrix._fields_}
            pointers = {name: fields.pop(name) for name in _POINTERS}
            index[key] = {
                "numbers": fields,
                "pointers": {
                    name: addresses[address]
                    for name, address in pointers.items()
                    if address is not None
                },
                "tensors": tensors,
            }
        if not item:
            return False
        index["size"] = file.tell()
        written = json.dumps(index).encode()
        file.write(written)
        file.write(_TAIL.pack(len(written), _MAGIC))
        return True


def _delete_stale(folder: Path) -> None:
    """Delete what processes left that ended while they wrote."""
    for path in folder.glob("*.unfinished"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink()
