"""The folders and files whose tensors replace those of a model folder.

Knows paths; knows nothing of tensors, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arriero.shards.errors import InvalidRequest

MOST_SOURCES = 32
"""Most sources: with more, a start of a group would open too many files."""


def is_whole(source: str) -> bool:
    """Whether a source is a whole checkpoint, which makes the sources before it needless."""
    return (Path(source) / "config.json").is_file()


def with_source(sources: Sequence[str], path: str) -> tuple[str, ...]:
    """The sources with another one on top.

    Raises:
        InvalidRequest: the path is relative, is a URL, or there are too many sources.
    """
    if not Path(path).is_absolute():
        raise InvalidRequest(
            "path", f"`path`={path[:300]!r} is not absolute; give a path that every node has"
        )
    if is_whole(path):
        return (path,)
    joined = (*(source for source in sources if source != path), path)
    if len(joined) > MOST_SOURCES:
        raise InvalidRequest(
            "path", f"{len(joined)} deltas exceed {MOST_SOURCES}; push a whole checkpoint"
        )
    return joined
