"""The GPU script: through all of it in tiny shapes here; the real thing where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).with_name("run.py")


def run(*arguments: str, out: Path) -> dict[str, dict[str, dict[str, object]]]:
    # away from the tree and with no path to it: it needs nothing but its own place
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")
    }
    done = subprocess.run(
        [sys.executable, str(RUN), "--out", str(out), *arguments],
        cwd=out.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, dict[str, dict[str, object]]] = json.loads(out.read_text())
    return report


def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = run("--dry-run", out=tmp_path / "report.json")
    for half in ("checks", "benches"):
        for name, one in report[half].items():
            assert "error" not in one and "skipped" not in one, (name, one)
    assert len(report["checks"]) >= 17 and len(report["benches"]) == 4


def test_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    out = tmp_path / "report.json"
    done = subprocess.run(
        [sys.executable, str(RUN), "--dry-run", "--only", "checks", "--budget", "0"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=out.parent,
    )
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert all(one == {"skipped": "out of time"} for one in report["checks"].values())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_checks_on_the_gpu(tmp_path: Path) -> None:
    run("--only", "checks", out=tmp_path / "report.json")
