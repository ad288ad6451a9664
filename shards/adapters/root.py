"""The folder in which a group's adapters lie, and whether an adapter's files have changed.

Knows paths and the state of files; knows nothing of contents. Needs no torch.
"""

from __future__ import annotations

import os
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


def signature(path: str) -> tuple[tuple[int, int, int], ...]:
    """Inode, size and time of the last change of an adapter's files; equal while unchanged.

    Raises:
        CheckpointError: a file is missing.
    """
    try:
        stats = [os.stat(Path(path) / name) for name in ADAPTER_FILES]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: the files of the adapter are unreadable: {error}") from None
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
