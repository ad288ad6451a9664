"""The kernels compile for Hopper, products with its own instructions, within shared memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parents[1] / "src")
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_all.py")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [line.split() for line in done.stdout.splitlines()[:-1]]
    names = {line[0] for line in compiled}
    assert {"_prefill", "_decode_splits", "_matmul", "_grouped_matmul", "_narrow"} <= names
    assert len(names) >= 16
    for name in ("_prefill", "_decode_splits"):
        kinds = {tuple(line[2:]) for line in compiled if line[0] == name}
        assert kinds == {("wgmma",)}, "decode and prefill must sum by the same instructions"
