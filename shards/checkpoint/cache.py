"""The cache folder of downloaded and converted models. Knows only environment variables."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder: $ARRIERO_CACHE, else arriero/ in $XDG_CACHE_HOME or ~/.cache."""
    if configured := os.environ.get("ARRIERO_CACHE"):
        return Path(configured).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "arriero"
