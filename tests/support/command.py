"""The command line on a deployment of a test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def arriero(
    *args: str,
    folder: Path,
    check: bool = True,
    timeout_s: float = 180,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `arriero`, its state in `folder`, with `environment` beside this process's."""
    try:
        return subprocess.run(
            [sys.executable, "-m", "arriero.cluster.cli", *args],
            env=os.environ
            | {"ARRIERO_STATE": str(folder), "OMP_NUM_THREADS": "1"}
            | dict(environment or {}),
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout_s,
        )
    except subprocess.CalledProcessError as error:
        error.add_note(f"{error.stdout}{error.stderr}")
        raise
