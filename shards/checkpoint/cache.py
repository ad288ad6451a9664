"""Where models that were fetched or made are kept. Knows environment variables alone."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where models are kept: $ARRIERO_CACHE, or arriero/ in $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("ARRIERO_CACHE"):
        return Path(named).absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "arriero"
