"""Files of tensors that a trainer sends: written into memory of the node, one file for all slices.

The first slice of a node that creates a file writes it; the others only check that the tensors
come. Folders of versions before are deleted. Knows files; knows nothing of networks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from arriero.shards.checkpoint.fit import KV_SCALES, misfit
from arriero.shards.checkpoint.index import INDEX_FILE
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import (
    DTYPE_NAMES,
    StoredTensor,
    make_header,
    read_header,
)
from arriero.shards.errors import CheckpointError
from arriero.shards.protocol.trainer import AnnouncedTensor

_MOST_LISTED = 5
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPE_NAMES}


def refuse_announced(base: Checkpoint, tensors: Sequence[AnnouncedTensor]) -> int:
    """Compare announced tensors with the model that serves; gives their bytes.

    Raises:
        CheckpointError: a name is unknown or twice, a shape is another, or a dtype does not
            convert; the message names the tensor.
    """
    problems, total = [], 0
    seen: set[str] = set()
    for tensor in tensors:
        where = f"tensor {tensor.name[:200]!r}"
        if tensor.dtype.removeprefix("torch.") not in _DTYPES:
            problems.append(f"{where}: dtype {tensor.dtype[:50]!r} is unknown")
            continue
        dtype = _dtype(tensor)
        if tensor.name in seen:
            problems.append(f"{where}: is announced twice")
        elif tensor.name not in base.stored:
            problems.append(f"{where}: is no tensor of the model")
        elif problem := _misfit(base, tensor, dtype):
            problems.append(problem)
        seen.add(tensor.name)
        total += _nbytes(tensor)
    if not tensors:
        problems.append("no tensor is announced")
    if problems:
        more = len(problems) - _MOST_LISTED
        listed = "; ".join(problems[:_MOST_LISTED]) + (f"; and {more} more" if more > 0 else "")
        raise CheckpointError(f"the announced weights do not fit: {listed}")
    return total


def _misfit(base: Checkpoint, tensor: AnnouncedTensor, dtype: torch.dtype) -> str | None:
    stored = base.stored[tensor.name]
    wanted = base.expected.get(tensor.name)
    if wanted is not None:
        announced = StoredTensor(
            name=tensor.name,
            file=Path("announced"),
            dtype=dtype,
            shape=tensor.shape,
            start=0,
            stop=_nbytes(tensor),
        )
        return misfit(announced, wanted)
    if (stored.shape, stored.dtype) != (tensor.shape, dtype):
        return (
            f"tensor {tensor.name[:200]!r}: has shape {list(tensor.shape)} and dtype {dtype}, but "
            f"{list(stored.shape)} and {stored.dtype} are stored"
        )
    return None


def _nbytes(tensor: AnnouncedTensor) -> int:
    return math.prod(tensor.shape) * _dtype(tensor).itemsize


def _dtype(tensor: AnnouncedTensor) -> torch.dtype:
    return _DTYPES[tensor.dtype.removeprefix("torch.")]


def prepare(file: Path, sources: Sequence[str], nbytes: int) -> None:
    """Make the folder of a file, delete those of versions before, and look for free memory.

    Args:
        file: `ROOT/MODEL/VERSION/NAME`; the folder MODEL holds one folder for each version.
        sources: what the groups shall serve now, which is kept.
        nbytes: bytes that will come.

    Raises:
        CheckpointError: ROOT belongs to another user, or the memory does not suffice.
    """
    version = file.parent
    root, model = version.parent.parent, version.parent
    root.mkdir(mode=0o700, exist_ok=True)
    state = root.lstat()
    if root.is_symlink() or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise CheckpointError(f"{root}: must be a folder of this user alone; delete it")
    model.mkdir(mode=0o700, exist_ok=True)
    keep = {version.name, *(Path(source).name for source in sources)}
    for folder in list(model.iterdir()):
        if folder.name not in keep:
            shutil.rmtree(folder, ignore_errors=True)
    version.mkdir(mode=0o700, exist_ok=True)
    free = shutil.disk_usage(root).free
    if nbytes > free and not file.exists():
        raise CheckpointError(
            f"{root}: {nbytes:,} bytes will come, but {free:,} are free; a node keeps the tensors "
            "of two versions: give it more memory, or send fewer tensors"
        )


class SpoolWriter:
    """Takes the tensors of one file in their order.

    Args:
        file: gets the tensors.
        tensors: what will come.
    """

    def __init__(self, file: Path, tensors: Sequence[AnnouncedTensor]) -> None:
        self._file, self._part = file, file.with_name(f"{file.name}.part")
        self._stream: BinaryIO | None = None
        try:
            descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:  # another slice of this node writes
            return
        self._stream = os.fdopen(descriptor, "wb")
        self._stream.write(make_header({t.name: (_dtype(t), t.shape) for t in tensors}))

    @property
    def writes(self) -> bool:
        """Whether this slice writes the file, not another slice of the node."""
        return self._stream is not None

    def add(self, data_B: Tensor) -> None:
        """Add the bytes of the next tensor.

        Raises:
            CheckpointError: the memory does not suffice.
        """
        if self._stream is None:
            return
        try:
            self._stream.write(data_B.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{self._file}: {error.strerror}") from None

    def finish(self) -> None:
        """Give the file its name: every tensor has come.

        Raises:
            CheckpointError: the memory does not suffice.
        """
        if self._stream is None:
            return
        try:
            self._stream.close()
            self._part.rename(self._file)
        except OSError as error:
            raise CheckpointError(f"{self._file}: {error.strerror}") from None

    def discard(self) -> None:
        """Delete what has come so far."""
        if self._stream is not None:
            self._stream.close()
            shutil.rmtree(self._file.parent, ignore_errors=True)


def nbytes_of(tensors: Sequence[AnnouncedTensor]) -> list[int]:
    """Bytes of each tensor."""
    return [_nbytes(tensor) for tensor in tensors]


def complete(
    file: Path, base: Checkpoint, tensors: Sequence[AnnouncedTensor], *, writes: bool
) -> bool:
    """Whether the folder holds every tensor of the model; then it becomes a whole checkpoint.

    Scales of the KV cache may be missing: those of the model folder stay in use.

    Args:
        file: the file that came last; another slice may still be giving it its name.
        base: the weights that serve.
        tensors: of the file.
        writes: whether this slice writes the files of the node.
    """
    file_of_tensor = {tensor.name: file.name for tensor in tensors}
    for other in file.parent.glob("*.safetensors"):
        if other != file:
            file_of_tensor.update(dict.fromkeys(read_header(other), other.name))
    needed = {name for name in base.stored if not name.endswith(KV_SCALES)}
    if not set(file_of_tensor) >= needed:
        return False
    if writes:
        index = json.dumps({"metadata": {}, "weight_map": file_of_tensor})
        file.with_name(INDEX_FILE).write_text(index)
        shutil.copyfile(base.path / "config.json", file.with_name("config.json"))
    return True
