"""The header of a GGUF file, parsed as hostile input.

The format (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian: magic,
version, counts, typed key-value pairs, tensor infos, then the tensors' bytes, aligned. The gguf
package's own reader loops without end on some truncated files, so only its tables and its
dequantization are used.

Knows bytes and block sizes; knows nothing of what keys and names mean.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from arriero.shards.errors import CheckpointError

MAX_METADATA_BYTES = 256 * 1024 * 1024
"""All keys, values and tensor infos; the largest vocabularies take some ten megabytes."""

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Where a tensor lies. `shape` is row-major, [out, in]; blocks run along the last dimension."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """A parsed file.

    Attributes:
        path: the file.
        metadata: values by key; arrays are lists.
        tensors: by name, in file order.
        data: the file's bytes, mapped read-only.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: npt.NDArray[np.uint8]

    def rows(self, tensor: GgufTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) dequantized, shape [stop - start, in] (a vector counts as one row)."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
        row_bytes = tensor.shape[-1] // block * block_bytes
        first = tensor.start + start * row_bytes
        stored = self.data[first : tensor.start + stop * row_bytes].reshape(-1, row_bytes)
        made: npt.NDArray[np.float32] = gguf.dequantize(stored, tensor.type)
        return made


def read_gguf(path: Path) -> GgufFile:
    """Parse and check a file's header and map its bytes.

    Raises:
        CheckpointError: not GGUF, truncated, or an entry that cannot be.
    """
    try:
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    cursor = _Cursor(path, mapped)
    if cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{path}: is not a GGUF file (it does not begin with GGUF)")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; supported: 2, 3")
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path}: key {key[:200]!r} is there twice")
        metadata[key] = cursor.value()
    infos = [_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise CheckpointError(f"{path}: general.alignment={alignment!r} is not a number of bytes")
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name[:200]!r} is there twice")
        tensors[name] = _tensor(path, name, shape, kind, data_start + offset, len(mapped))
    data = np.frombuffer(mapped, dtype=np.uint8)
    return GgufFile(path=path, metadata=metadata, tensors=tensors, data=data)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise CheckpointError(
            f"{cursor.path}: tensor {name[:200]!r}: {num_dims} dimensions; at most {_MAX_DIMS}"
        )
    dims = [cursor.scalar("Q") for _ in range(num_dims)]
    return name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")


def _tensor(
    path: Path, name: str, shape: tuple[int, ...], kind: int, start: int, size: int
) -> GgufTensor:
    where = f"{path}: tensor {name[:200]!r}"
    try:
        type_ = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    except (ValueError, KeyError):
        raise CheckpointError(f"{where}: tensor type {kind} is unknown") from None
    if shape[-1] % block:
        raise CheckpointError(
            f"{where}: shape {list(shape)} does not divide into {type_.name} blocks of {block}"
        )
    stop = start + math.prod(shape) // block * block_bytes
    if stop > size:
        raise CheckpointError(
            f"{where}: {type_.name} {list(shape)} ends at byte {stop}, but the file has {size}: "
            "truncated; fetch it again"
        )
    return GgufTensor(name=name, type=type_, shape=shape, start=start, stop=stop)


class _Cursor:
    """Reads forward through the mapped header; every read is checked against the end."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path = path
        self.position = 0
        self._mapped = mapped
        self._end = min(len(mapped), MAX_METADATA_BYTES)

    def take(self, count: int) -> bytes:
        stop = self.position + count
        if stop > self._end:
            raise CheckpointError(
                f"{self.path}: header runs past byte {self._end}, the end of the file or the limit "
                f"of {MAX_METADATA_BYTES}: truncated or damaged; fetch it again"
            )
        data = self._mapped[self.position : stop]
        self.position = stop
        return data

    def scalar(self, kind: str) -> Any:  # noqa: ANN401
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def string(self) -> str:
        data = self.take(self.scalar("Q"))
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: a string is not UTF-8: {error}") from None

    def value(self) -> Any:  # noqa: ANN401
        kind = self.scalar("I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self._scalar_kind(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self._scalar_kind(kind)
        data = self.take(count * struct.calcsize(code))
        return np.frombuffer(data, dtype=np.dtype(code).newbyteorder("<")).tolist()

    def _scalar_kind(self, kind: int) -> str:
        code = _SCALARS.get(kind)
        if code is None:
            raise CheckpointError(f"{self.path}: value type {kind} is unknown or nested")
        return code
