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

from arriero.shards.checkpoint.fit import ExpectedTensor, misfits
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

    A view stays valid as long as the program refers to it. The map is private: a write to a view
    changes only this process's copy of the page, not the file. Safe to share between threads.

    Attributes:
        path: the folder.
        stored: location of each tensor, by name in sorted order.
        ranged: remote weight files, fetched on demand; None if all files are local.
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
        """Read index and headers of a folder, for any model.

        Raises:
            CheckpointError: a file or tensor is missing or malformed; the message names the file
                and the tensor.
        """
        return TensorFolder(path, find_tensors(path))

    def with_own_maps(self) -> TensorFolder:
        """The same folder with separate maps, which are released with the returned object."""
        return TensorFolder(self.path, self.stored, self.ranged)

    def need(self, file: Path, start: int, stop: int) -> None:
        """Make bytes [start, stop) of a file of `files` local.

        Raises:
            CheckpointError: the bytes cannot be fetched.
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
        return tuple(sorted({tensor.file for tensor in self.stored.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of a tensor."""
        return self._find(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._find(name).dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor, as a view of the mapped file (a copy if the bytes are unaligned)."""
        stored = self._find(name)
        self.need(stored.file, stored.start, stored.stop)
        return self._view(stored)

    def copy(self, name: str) -> Tensor:
        """A tensor in memory of its own, read from the file.

        Faster than the map for small tensors far apart, around which the system reads ahead: 0.2 ms
        against 5 ms a tensor of 10 kB.
        """
        stored = self._find(name)
        self.need(stored.file, stored.start, stored.stop)
        try:
            with stored.file.open("rb", buffering=0) as stream:
                data = bytearray(os.pread(stream.fileno(), stored.nbytes, stored.start))
        except OSError as error:
            raise CheckpointError(f"{stored.file}: {explain_error(stored.file, error)}") from None
        if len(data) < stored.nbytes:
            raise CheckpointError(f"{stored.file}: ends within tensor {name!r}; fetch it again")
        values = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0)
        return values.view(stored.dtype).view(stored.shape)

    def _view(self, stored: StoredTensor) -> Tensor:
        data = self.data(stored.file)[stored.start : stored.stop]
        if stored.start % stored.dtype.itemsize:  # older writers did not pad the header
            data = data.clone()
        return data.view(stored.dtype).view(stored.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension, as a contiguous view."""
        return self._cut(name, 0, start, stop)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of the last dimension, as a strided view."""
        return self._cut(name, -1, start, stop)

    @cached_property
    def digest(self) -> str:
        """Identifier of the model: 32 hex digits of BLAKE2b.

        Covers the content of config.json, the name, dtype, shape and offset of each tensor, the
        size of each file, and a sample from the middle of each tensor. Equal files give an equal
        digest on all machines; the digest does not prove that each byte is right.
        """
        settings = read_json_object(self.path / "config.json")
        digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16)
        quant_file = side_file(self.path)
        if quant_file is not None and settings.get("quantization_config") is None:
            digest.update(json.dumps(read_json_object(quant_file), sort_keys=True).encode())
        for file in self.files:
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            tensors = [tensor for tensor in self.stored.values() if tensor.file == file]
            for tensor, sample in zip(tensors, self._samples(file, tensors), strict=True):
                entry = [tensor.name, str(tensor.dtype), tensor.shape, tensor.start]
                digest.update(json.dumps(entry).encode())
                digest.update(sample)
        return digest.hexdigest()

    def _samples(self, file: Path, tensors: Sequence[StoredTensor]) -> list[bytes]:
        """Bytes from the middle of each tensor of a file."""

        def bounds(tensor: StoredTensor) -> tuple[int, int]:
            middle = max(tensor.start, (tensor.start + tensor.stop - _SAMPLE_BYTES) // 2)
            return middle, min(tensor.stop, middle + _SAMPLE_BYTES)

        ranged = self.ranged
        if ranged is not None:  # fetch only the samples
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                return list(pool.map(lambda tensor: ranged.read(file, *bounds(tensor)), tensors))
        with file.open("rb") as stream:
            # samples are far apart: read-ahead would fetch megabytes for each
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            pairs = [bounds(tensor) for tensor in tensors]
            return [os.pread(stream.fileno(), stop - start, start) for start, stop in pairs]

    def check(
        self,
        expected: Mapping[str, tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...] | Mapping[str, tuple[torch.dtype, ...]] = FLOAT_DTYPES,
    ) -> None:
        """Compare names, shapes and dtypes with the expected tensors.

        An unexpected tensor is accepted if it cannot change the output (see `fit`).

        Args:
            expected: shape of each tensor, by name.
            dtypes: accepted dtypes of all tensors, or of each tensor by name.

        Raises:
            CheckpointError: lists the first missing, unexpected or wrong tensors with file and both
                shapes, and the number of further problems.
        """
        self._refuse(self.problems(expected, dtypes))

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            more = len(problems) - _MAX_LISTED
            listed = "; ".join(problems[:_MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")
            raise CheckpointError(
                f"{self.path}: does not match its config.json: {listed}; "
                "correct config.json, or fetch the checkpoint again"
            )

    def problems(
        self,
        expected: Mapping[str, tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...] | Mapping[str, tuple[torch.dtype, ...]] = FLOAT_DTYPES,
    ) -> list[str]:
        """All problems that `check` finds, one sentence for each tensor."""
        return misfits(
            self,
            {
                name: ExpectedTensor(
                    shape=tuple(shape), dtypes=dtypes if isinstance(dtypes, tuple) else dtypes[name]
                )
                for name, shape in expected.items()
            },
        )

    def _find(self, name: str) -> StoredTensor:
        stored = self.stored.get(name)
        if stored is None:
            raise CheckpointError(
                f"{self.path}: holds no tensor {name!r}; fetch the checkpoint again"
            )
        return stored

    def _cut(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        stored = self._find(name)
        shape = stored.shape
        if not shape or not 0 <= start <= stop <= shape[dim]:
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} of shape {list(shape)} has no range "
                f"{start}:{stop} in its {'first' if dim == 0 else 'last'} dimension"
            )
        if dim == 0 and shape[0]:
            row = stored.nbytes // shape[0]
            self.need(stored.file, stored.start + start * row, stored.start + stop * row)
        else:
            self.need(stored.file, stored.start, stored.stop)
        return self._view(stored).narrow(dim, start, stop - start)

    def data(self, file: Path) -> Tensor:
        """All bytes of a file of `files`, uint8, as a view of the map."""
        with self._lock:
            if file not in self._maps:
                mapped = _map_bytes(file)
                data = torch.frombuffer(mapped, dtype=torch.uint8)
                needed = max(tensor.stop for tensor in self.stored.values() if tensor.file == file)
                if data.numel() < needed:
                    raise CheckpointError(f"{file}: was cut after it was opened; fetch it again")
                self._maps[file] = mapped, data
            return self._maps[file][1]

    def release_pages(self) -> None:
        """Release the pages of the maps, which count as memory of this process.

        Views stay valid: a later read takes the bytes from the page cache. Writes to a view are
        lost.
        """
        with self._lock:
            maps = [mapped for mapped, _ in self._maps.values()]
        for mapped in maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def _map_bytes(file: Path) -> mmap.mmap:
    """Private map of a file without swap reservation.

    Torch takes a writable view without a warning, a stray write changes a private page instead of
    causing a protection fault, and the system reserves no swap for files larger than memory.
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
        reason = explain_error(file, error)
        if error.errno == errno.ENOMEM:
            reason = (
                f"cannot be mapped: {error}; allow more address space (`ulimit -v`, "
                "vm.overcommit_memory)"
            )
        raise CheckpointError(f"{file}: {reason}") from None
    except ValueError as error:  # an empty file
        raise CheckpointError(f"{file}: cannot be mapped: {error}") from None
