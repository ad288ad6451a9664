"""The folder in which a group's adapters lie, and whether an adapter's files have changed.

Knows paths and the state of files; knows nothing of contents. Needs no torch.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from arriero.shards.adapters.peft_config import CONFIG_FILE
from arriero.shards.errors import CheckpointError

ADAPTER_FILES = (CONFIG_FILE, "adapter_model.safetensors")
"""The files of an adapter: settings and weights."""


def check_root(path: Path, root: str) -> None:
    """Refuse a path outside of the folder of adapters, links followed.

    Args:
        path: folder of an adapter.
        root: folder of all adapters; "" for no limit.

    Raises:
        CheckpointError: names the path and the folder.
    """
    if not root:
        return
    allowed = os.path.realpath(root)
    for place in (path, *(path / name for name in ADAPTER_FILES)):
        real = os.path.realpath(place)
        if real == allowed or os.path.commonpath((allowed, real)) != allowed:
            raise CheckpointError(
                f"`path`={str(place)[:300]!r} is outside of `adapter_root`={root!r}; put the "
                "adapter into that folder"
            )


def check_regular(path: Path) -> None:
    """Refuse pipes and devices, whose bytes may never end; a missing file is found later.

    Raises:
        CheckpointError: names the file.
    """
    for file in (path / name for name in ADAPTER_FILES):
        if file.exists() and not stat.S_ISREG(file.stat().st_mode):
            raise CheckpointError(f"{file}: is no regular file; copy the files of the adapter")


def signature(path: str) -> tuple[tuple[int, int, int], ...]:
    """Inode, size and time of the last change of an adapter's files; equal while unchanged.

    Raises:
        CheckpointError: a file is missing.
    """
    try:
        stats = [os.stat(Path(path) / name) for name in ADAPTER_FILES]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the files of the adapter are unreadable: {error}") from None
    return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in stats)
