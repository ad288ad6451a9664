"""Programs with packages that do not fit into our environment, each in an environment of its own.

The environments are made under build/clients at the first run; a test whose packages cannot be
installed is skipped with the reason.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BUILD = Path(__file__).parents[2] / "build" / "clients"
INSTALL_S = 600


def install(command: list[str], folder: Path) -> None:
    """Run a command that installs packages into `folder`, unless an earlier run has done so."""
    done = folder / ".installed"
    words = " ".join(command)
    if done.exists() and done.read_text() == words:
        return
    made = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
    )
    if made.returncode:
        pytest.skip(f"{words} failed: {made.stderr[-300:]}")
    done.write_text(words)


def python_with(name: str, *packages: str) -> list[str]:
    """The command of a Python that has `packages`."""
    folder = BUILD / name
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install([str(python), "-m", "pip", "install", "-q", *packages], folder)
    return [str(python)]


def node_with(*packages: str) -> list[str]:
    """The command of a Node.js that has `packages`."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    folder = BUILD / "node"
    folder.mkdir(parents=True, exist_ok=True)
    install(["npm", "install", "--silent", "--no-fund", "--no-audit", *packages], folder)
    return ["node"]


async def run(command: list[str], timeout_s: float = 180) -> Any:  # noqa: ANN401
    """The JSON in the last line that a command prints."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        printed, errors = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        process.kill()
        raise
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(printed.decode().splitlines()[-1])
