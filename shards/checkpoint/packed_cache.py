"""Where the packed weights of a rank are kept between starts, and how much disk they take.

A file belongs to a checkpoint's digest, a part of the model, a form of the weights and a build of
the kernels: whatever changes the packed bytes changes the name. Knows names and sizes; knows
nothing of the content.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from arriero.kernels.ops import Ops
from arriero.kernels.packed_file import PackedFile
from arriero.shards.checkpoint.cache import cache_folder
from arriero.shards.checkpoint.tensor_folder import TensorFolder
from arriero.shards.layout.parts import AnyPart

_SUFFIX = ".packed"


def packed_folder() -> Path:
    """The folder of all files."""
    return cache_folder() / "packed"


def open_packed(
    checkpoint: TensorFolder, part: AnyPart, ops: Ops, form: str, max_bytes: int
) -> PackedFile | None:
    """The file for the weights of a rank; None for a backend that keeps none.

    Files that were not used for the longest time are deleted first, until a rank's weights fit.

    Args:
        checkpoint: the checkpoint.
        part: the rank's part.
        ops: the backend.
        form: dtype and quantization of the packed weights.
        max_bytes: most bytes of all files on this machine; 0 keeps none.
    """
    if not max_bytes or not ops.packed_build:
        return None
    changed = " ".join(str(file.stat().st_mtime_ns) for file in checkpoint.files)
    words = "\n".join((checkpoint.digest, changed, repr(part), form, ops.name, ops.packed_build))
    name = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
    path = packed_folder() / f"{name}{_SUFFIX}"
    if not path.exists():
        # packed weights are at most a little larger than the checkpoint: int4 has more scales
        whole = sum(file.stat().st_size for file in checkpoint.files)
        if whole > max_bytes:
            return None
        _make_room(max_bytes - whole)
    return ops.packed_file(path)


def _make_room(max_bytes: int) -> None:
    """Delete the files that were not used for the longest time, until `max_bytes` remain."""
    files = []
    for path in packed_folder().glob(f"*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            files.append((stat.st_mtime, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            return
        with contextlib.suppress(OSError):
            path.unlink()
        total -= size
