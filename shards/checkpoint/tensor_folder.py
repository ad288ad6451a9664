"""Tensors of a folder of safetensors files, as views of mapped memory.

Knows headers and bytes; knows nothing of models.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from arriero.shards.checkpoint.fit import Wanted, misfits
from arriero.shards.checkpoint.ranges import REQUESTS_AT_ONCE, RangedFolder
from arriero.shards.checkpoint.safetensors_header import StoredTensor
from arriero.shards.checkpoint.shard_files import find_tensors
from arriero.shards.checkpoint.side_files import side_file
from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import explain_error
from arriero.shards.files.json_file import read_json_object

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# Linux's value: Python's mmap module does not name it before 3.13
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

_SAMPLE_BYTES = 1024

_MAX_LISTED = 5


class TensorFolder:
    """The tensors of a model folder. Headers are read at once; tensors are views of mapped files.

    Views stay valid for as long as they are referenced. The map is private: writing to a view
    changes that process's copy of the page and never the file. Safe to share between threads.

    Attributes:
        path: the folder.
        stored: where each tensor lies, by name in sorted order.
        ranged: what fetches the files' bytes as they are read; None where they are all here.
    """

    def __init__(
        self,
        path: Path,
        stored: Mapping[str, StoredTensor],
        ranged: RangedFolder | None = None,
    ) -> None:
        self.path, self.ranged = path, ranged
        self.stored = dict(sorted(stored.items()))
        self._maps: dict[Path, tuple[mmap.mmap, Tensor]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, path: Path) -> TensorFolder:
        """Read index and headers of a folder, whatever model it holds.

        Raises:
            CheckpointError: something is missing or malformed; the message names the file and
                the tensor.
        """
        return TensorFolder(path, find_tensors(path))

    def unmapped(self) -> TensorFolder:
        """The same folder with maps of its own, which are gone when it is."""
        return TensorFolder(self.path, self.stored, self.ranged)

    def need(self, file: Path, start: int, stop: int) -> None:
        """Have bytes [start, stop) of one of `files` on this machine.

        Raises:
            CheckpointError: they cannot be fetched.
        """
        if self.ranged is not None:
            self.ranged.need(file, start, stop)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(self.stored)

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted."""
        return tuple(sorted({one.file for one in self.stored.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor as stored."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor as stored."""
        return self._find(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor, as a view of the mapped file (a copy where the file leaves it unaligned)."""
        found = self._find(name)
        self.need(found.file, found.start, found.stop)
        return self._view(found)

    def _view(self, found: StoredTensor) -> Tensor:
        data = self.data(found.file)[found.start : found.stop]
        if found.start % found.dtype.itemsize:  # older writers did not pad the header
            data = data.clone()
        return data.view(found.dtype).view(found.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension, as a contiguous view."""
        return self._cut(name, 0, start, stop)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of the last dimension, as a strided view."""
        return self._cut(name, -1, start, stop)

    @cached_property
    def digest(self) -> str:
        """Names this model: 32 hex digits of BLAKE2b.

        Covers config.json (whatever its layout), every tensor's name, dtype, shape and place,
        every file's size, and a sample from the middle of every tensor. The same for the same
        files on any machine; it does not prove that every byte is right.
        """
        settings = read_json_object(self.path / "config.json")
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        beside = side_file(self.path)
        if beside is not None and settings.get("quantization_config") is None:
            digest.update(json.dumps(read_json_object(beside), sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            tensors = [one for one in self.stored.values() if one.file == file]
            for one, sample in zip(tensors, self._samples(file, tensors), strict=True):
                place = [one.name, str(one.dtype), one.shape, one.start]
                digest.update(json.dumps(place).encode())
                digest.update(sample)
        return digest.hexdigest()

    def _samples(self, file: Path, tensors: Sequence[StoredTensor]) -> list[bytes]:
        """Bytes from the middle of each of a file's tensors."""

        def bounds(one: StoredTensor) -> tuple[int, int]:
            middle = max(one.start, (one.start + one.stop - _SAMPLE_BYTES) // 2)
            return middle, min(one.stop, middle + _SAMPLE_BYTES)

        ranged = self.ranged
        if ranged is not None:  # no more of them than that
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                return list(pool.map(lambda one: ranged.read(file, *bounds(one)), tensors))
        with file.open("rb") as stream:
            # samples are far apart: read-ahead would fetch megabytes for each
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            pairs = [bounds(one) for one in tensors]
            return [os.pread(stream.fileno(), stop - start, start) for start, stop in pairs]

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...] | Mapping[str, tuple[torch.dtype, ...]] = FLOAT_DTYPES,
    ) -> None:
        """Compare names, shapes and dtypes with what is due.

        What nothing reads is let pass, where it cannot change an answer (see `fit`).

        Args:
            expected: shape of each tensor by name.
            dtypes: those that a tensor may have, or those by its name.

        Raises:
            CheckpointError: lists the first few tensors that are missing, too many, of another
                shape or of another dtype, with file and both shapes, and counts the rest.
        """
        self._refuse(self.problems(expected, dtypes))

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            more = len(problems) - _MAX_LISTED
            listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
            raise CheckpointError(f"{self.path}: does not hold what its config says: {listed}")

    def problems(
        self,
        expected: Mapping[str, tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...] | Mapping[str, tuple[torch.dtype, ...]] = FLOAT_DTYPES,
    ) -> list[str]:
        """All that `check` would complain of, one sentence a tensor."""
        return misfits(
            self,
            {
                name: Wanted(
                    shape=tuple(shape), dtypes=dtypes if isinstance(dtypes, tuple) else dtypes[name]
                )
                for name, shape in expected.items()
            },
        )

    def _find(self, name: str) -> StoredTensor:
        found = self.stored.get(name)
        if found is None:
            raise CheckpointError(f"{self.path}: holds no tensor {name!r}")
        return found

    def _cut(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        found = self._find(name)
        shape = found.shape
        if not shape or not 0 <= start <= stop <= shape[dim]:
            raise CheckpointError(
                f"{found.file}: tensor {name!r} of shape {list(shape)} has no range "
                f"{start}:{stop} in its {'first' if dim == 0 else 'last'} dimension"
            )
        if dim == 0 and shape[0]:
            row = found.nbytes // shape[0]
            self.need(found.file, found.start + start * row, found.start + stop * row)
        else:
            self.need(found.file, found.start, found.stop)
        return self._view(found).narrow(dim, start, stop - start)

    def data(self, file: Path) -> Tensor:
        """All bytes of one of `files`, uint8, as a view of its map."""
        with self._lock:
            if file not in self._maps:
                mapped = _map_bytes(file)
                data = torch.frombuffer(mapped, dtype=torch.uint8)
                needed = max(one.stop for one in self.stored.values() if one.file == file)
                if data.numel() < needed:
                    raise CheckpointError(f"{file}: was cut after it was opened; fetch it again")
                self._maps[file] = mapped, data
            return self._maps[file][1]

    def give_back(self) -> None:
        """Let go of the maps' pages: they count as this process's memory until then.

        Views stay valid, and what is read again comes from the page cache. What was written to a
        view is lost.
        """
        with self._lock:
            maps = [mapped for mapped, _ in self._maps.values()]
        for mapped in maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _map_bytes(file: Path) -> mmap.mmap:
    """A file's map.

    Private and without reserve: a writable view is what torch takes without a warning, a stray
    write hits a private page rather than a protection fault, and no swap is set aside for files
    larger than memory.
    """
    try:
        with file.open("rb") as stream:
            return mmap.mmap(
                stream.fileno(),
                0,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except OSError as error:
        because = explain_error(file, error)
        if error.errno == errno.ENOMEM:
            because = (
                f"cannot be mapped: {error}; allow more address space (`ulimit -v`, "
                "vm.overcommit_memory)"
            )
        raise CheckpointError(f"{file}: {because}") from None
    except ValueError as error:  # an empty file
        raise CheckpointError(f"{file}: cannot be mapped: {error}") from None
