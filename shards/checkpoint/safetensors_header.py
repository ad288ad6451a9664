"""Parser and writer of safetensors headers; treats a file as hostile input.

The format (huggingface.co/docs/safetensors): eight bytes of little-endian header length, the
header as a JSON object from tensor name to dtype, shape and offsets, then the tensors' bytes.

Knows the header of a file; knows nothing of folders, models and memory maps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from arriero.shards.checkpoint.safetensors_limits import LENGTH_BYTES, MAX_HEADER_BYTES
from arriero.shards.errors import CheckpointError
from arriero.shards.files.bad_file import explain_binary, explain_error, head_of
from arriero.shards.files.json_file import parse_json_object

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_MAX_DIMS = 16
_AGAIN = "fetch the file again"
_NO_HEADER = f"the header is empty: not a safetensors file, or damaged; {_AGAIN}"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Location of a tensor: bytes [start, stop) of `file`, row-major."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Read and check the header of a file; tensors are not read.

    Raises:
        CheckpointError: unreadable, truncated, header over the limit, or an entry with invalid
            dtype, shape or offsets; the message names file and tensor.
    """
    try:
        head, size = head_of(file)
        length = int.from_bytes(head[:LENGTH_BYTES], "little")
        _check_length(file, head, size, length)
        with file.open("rb") as stream:
            stream.seek(LENGTH_BYTES)
            header = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {explain_error(file, error)}") from None
    if length == 0:
        raise CheckpointError(f"{file}: {explain_binary(head, size) or _NO_HEADER}")
    entries = parse_json_object(header, f"{file} (header)", unique_keys="tensor")
    entries.pop("__metadata__", None)
    data_start = LENGTH_BYTES + length
    _refuse_truncated(file, entries, data_start, size)
    tensors = {name: _entry(file, name, entry, data_start, size) for name, entry in entries.items()}
    _refuse_overlap(file, tensors)
    return tensors


def _check_length(file: Path, head: bytes, size: int, length: int) -> None:
    """Refuse an impossible header length; the first bytes often show the real kind of file."""
    reason = explain_binary(head, size)
    hint = f"; the file {reason}" if reason else ""
    if size < LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: {size} bytes are too few for a safetensors file; {_AGAIN}{hint}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{file}: {reason}"
            if reason
            else f"{file}: header of {length} bytes exceeds the limit of {MAX_HEADER_BYTES}; "
            f"not a safetensors file, or damaged: {_AGAIN}"
        )
    if length > size - LENGTH_BYTES:
        raise CheckpointError(
            f"{file}: truncated: header of {length} bytes, but {size - LENGTH_BYTES} "
            f"follow; {_AGAIN}{hint}"
        )


def _refuse_truncated(file: Path, entries: dict[str, Any], data_start: int, size: int) -> None:
    """Compare the file size with the size that the header requires, before any tensor check."""
    ends = [
        entry["data_offsets"][1]
        for entry in entries.values()
        if isinstance(entry, dict)
        and _sizes(entry.get("data_offsets"))
        and len(entry["data_offsets"]) == 2
    ]
    needed = data_start + max(ends, default=0)
    if needed > size:
        raise CheckpointError(
            f"{file}: truncated: the file has {size:,} bytes, but the header requires {needed:,} "
            f"({needed - size:,} are missing); {_AGAIN}"
        )


def _entry(file: Path, name: str, entry: Any, data_start: int, size: int) -> StoredTensor:  # noqa: ANN401
    where = f"{file}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise CheckpointError(
            f"{where}: the header entry lacks dtype, shape or data_offsets; {_AGAIN}"
        )
    label, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(label) if isinstance(label, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype {str(label)[:50]!r} is unknown; known: {', '.join(DTYPES)}"
        )
    if not _sizes(shape) or len(shape) > _MAX_DIMS:
        raise CheckpointError(
            f"{where}: shape {str(shape)[:200]} is not a list of at most "
            f"{_MAX_DIMS} sizes; {_AGAIN}"
        )
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets {str(offsets)[:200]} are not a range of bytes; {_AGAIN}"
        )
    start, stop = data_start + offsets[0], data_start + offsets[1]
    assert stop <= size, "a truncated file is refused earlier"
    nbytes = math.prod(shape) * dtype.itemsize
    if stop - start != nbytes:
        raise CheckpointError(
            f"{where}: shape {list(shape)} of {label} takes {nbytes} bytes, but {stop - start} are "
            f"stored; {_AGAIN}"
        )
    return StoredTensor(
        name=name, file=file, dtype=dtype, shape=tuple(shape), start=start, stop=stop
    )


def _sizes(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63 for size in value
    )


def _refuse_overlap(file: Path, tensors: dict[str, StoredTensor]) -> None:
    ordered = sorted(
        (tensor for tensor in tensors.values() if tensor.nbytes), key=lambda tensor: tensor.start
    )
    for before, after in pairwise(ordered):
        if after.start < before.stop:
            raise CheckpointError(
                f"{file}: tensors {before.name[:200]!r} and {after.name[:200]!r} overlap at byte "
                f"{after.start}; {_AGAIN}"
            )


def make_header(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """Length and header of a file with these tensors in this order, without gaps."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, stop],
        }
        start = stop
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)  # aligns the tensors
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
