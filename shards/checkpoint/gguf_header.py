"""Parser of GGUF headers; treats the file as hostile input.

The format (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian: magic,
version, counts, typed key-value pairs, tensor infos, then the tensors' bytes, aligned. A model in
several files has a header in each, names `…-00001-of-00003.gguf`, and its metadata in the first.
The reader of the gguf package never ends on some truncated files; only the package's tables and
dequantization are used.

Knows bytes and block sizes; knows nothing of the meaning of keys and names.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import explain_binary, explain_error, head_of

MAX_METADATA_BYTES = 256 * 1024 * 1024
"""Limit for all keys, values and tensor infos; large vocabularies take about ten megabytes."""

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
_MAX_FILES = 9999
_AGAIN = "fetch the file again"
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """Location of a tensor; `shape` is row-major, [out, in]; blocks run along the columns."""

    name: str
    type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    stop: int
    data: npt.NDArray[np.uint8]
    """All bytes of the file, mapped read-only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufFile:
    """A parsed file, or all files of one model.

    Attributes:
        path: the file; for a model in several files, the first file.
        metadata: values by key; arrays are lists.
        tensors: by name, in file order.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def rows(self, tensor: GgufTensor, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows [start, stop) dequantized, shape [stop - start, in] (a vector counts as one row)."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[tensor.type]
        row_bytes = tensor.shape[-1] // block * block_bytes
        first = tensor.start + start * row_bytes
        stored = tensor.data[first : tensor.start + stop * row_bytes].reshape(-1, row_bytes)
        dequantized: npt.NDArray[np.float32] = gguf.dequantize(stored, tensor.type)
        return dequantized


def read_gguf(path: Path) -> GgufFile:
    """Parse and check the header of a file, or of all files of a model, and map the bytes.

    Args:
        path: the file, or any file of a model in several files of one folder.

    Raises:
        CheckpointError: not GGUF, truncated, an invalid entry, or a file of the model is missing.
    """
    first = _read_file(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= _MAX_FILES:
        raise CheckpointError(
            f"{path}: split.count={str(count)[:100]} is not a number of files"
            f" from 0 to {_MAX_FILES}; fetch the file again"
        )
    if count <= 1:
        return first
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path}: is one part of several (split.count={count}): the file names must end in "
            f"-00001-of-{count:05d}.gguf and so on; put all files in one folder"
        )
    files = [
        path.with_name(f"{match['stem']}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)
    ]
    parts = [first if file == path else _read_file(file) for file in files]
    tensors: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise CheckpointError(
                    f"{part.path}: tensor {name[:200]!r} is in two files; fetch the files again"
                )
            tensors[name] = tensor
    stated = parts[0].metadata.get("split.tensors.count", len(tensors))
    if stated != len(tensors):
        raise CheckpointError(
            f"{files[0]}: split.tensors.count={stated}, but the {count} files have {len(tensors)} "
            "tensors; fetch the files again"
        )
    return GgufFile(path=files[0], metadata=parts[0].metadata, tensors=tensors)


def _read_file(path: Path) -> GgufFile:
    try:
        head, size = head_of(path)
        if not head.startswith(b"GGUF"):
            reason = explain_binary(head, size)
            if reason is None and head[4:8] == b"\0\0\0\0":
                reason = "is not a GGUF file; it may be a safetensors file, which needs no import"
            raise CheckpointError(
                f"{path}: {reason or 'is not a GGUF file (it does not begin with GGUF); ' + _AGAIN}"
            )
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: {explain_error(path, error)}") from None
    cursor = _Cursor(path, mapped)
    cursor.take(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        is_big_endian = version in (2 << 24, 3 << 24)
        raise CheckpointError(
            f"{path}: "
            + ("is big-endian; " if is_big_endian else f"GGUF version {version} is not supported; ")
            + "supported: 2, 3, little-endian"
        )
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.string()
        if key in metadata:
            raise CheckpointError(f"{path}: key {key[:200]!r} appears twice; {_AGAIN}")
        metadata[key] = cursor.value()
    infos = [_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise CheckpointError(
            f"{path}: general.alignment={alignment!r} is not a number of bytes "
            f"from 1 to {2**20}; {_AGAIN}"
        )
    data_start = -(-cursor.position // alignment) * alignment
    data = np.frombuffer(mapped, dtype=np.uint8)
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise CheckpointError(f"{path}: tensor {name[:200]!r} appears twice; {_AGAIN}")
        tensors[name] = _tensor(path, name, shape, kind, data_start + offset, data)
    return GgufFile(path=path, metadata=metadata, tensors=tensors)


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string()
    num_dims = cursor.scalar("I")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise CheckpointError(
            f"{cursor.path}: tensor {name[:200]!r}: {num_dims} dimensions, but 1 to "
            f"{_MAX_DIMS} are possible; {_AGAIN}"
        )
    dims = [cursor.scalar("Q") for _ in range(num_dims)]
    return name, tuple(reversed(dims)), cursor.scalar("I"), cursor.scalar("Q")


def _tensor(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    kind: int,
    start: int,
    data: npt.NDArray[np.uint8],
) -> GgufTensor:
    where = f"{path}: tensor {name[:200]!r}"
    try:
        type_ = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
    except (ValueError, KeyError):
        raise CheckpointError(
            f"{where}: tensor type {kind} is unknown; convert the original checkpoint"
        ) from None
    if shape[-1] % block:
        raise CheckpointError(
            f"{where}: shape {list(shape)} does not divide into {type_.name} blocks of {block}; "
            f"{_AGAIN}"
        )
    stop = start + math.prod(shape) // block * block_bytes
    if stop > data.size:
        raise CheckpointError(
            f"{where}: {type_.name} {list(shape)} ends at byte {stop:,}, but the file has "
            f"{data.size:,} bytes: truncated; {_AGAIN}"
        )
    return GgufTensor(name=name, type=type_, shape=shape, start=start, stop=stop, data=data)


class _Cursor:
    """Reads the mapped header from start to end; checks each read against the end."""

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
            raise CheckpointError(
                f"{self.path}: a string is not UTF-8: {error}; {_AGAIN}"
            ) from None

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
            raise CheckpointError(f"{self.path}: value type {kind} is unknown or nested; {_AGAIN}")
        return code
