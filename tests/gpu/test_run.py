"""The GPU script: through all of it in tiny shapes here; the real thing where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import items
from gpu.report import Report

RUN = Path(__file__).with_name("run.py")
BARE = """
import importlib.abc, runpy, sys

ABSENT = {absent!r}

class Refusal(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refusal())
{then}
"""
ABSENT = {
    "ray", "zmq", "pydantic", "grpc", "google", "fastapi", "starlette", "uvicorn", "typer", "rich",
    "click", "transformers", "huggingface_hub", "fsspec", "yaml", "jinja2", "prometheus_client",
    "opentelemetry", "PIL", "gguf", "httpx", "llguidance", "aiohttp", "requests", "msgspec",
    "msgpack",
}  # fmt: skip
"""Of what the product depends on, all that a typical GPU machine lacks."""


OF_TRANSFORMERS = {
    "transformers", "huggingface_hub", "fsspec", "yaml", "requests", "httpx", "jinja2", "PIL",
    "click", "typer", "rich",
}  # fmt: skip
"""What the bench beside transformers imports."""


def bare(
    then: str, folder: Path, absent: AbstractSet[str] = ABSENT, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `then` in a Python without these packages."""
    keep = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, "-c", BARE.format(absent=absent, then=then)],
        cwd=folder,
        env=keep,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def run(
    *arguments: str, out: Path, absent: AbstractSet[str] = frozenset()
) -> dict[str, dict[str, Any]]:
    # away from the tree and with no path to it: it needs nothing but its own place
    done = bare(script("--out", str(out), *arguments), out.parent, absent, timeout_s=590)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, dict[str, Any]] = json.loads(out.read_text())
    return report


@pytest.mark.timeout(600)
def test_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = run("--dry-run", out=tmp_path / "report.json", absent=ABSENT - OF_TRANSFORMERS)
    for part in ("compiles", "checks", "benches", "tuning"):
        for name, one in report[part].items():
            assert "error" not in one and "skipped" not in one, (name, one)
    assert len(report["checks"]) >= 39 and len(report["benches"]) == 9
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    assert set(tuned) == {"attention", "product_by_rows"}


def test_every_check_bench_and_tuner_is_an_item(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    listing = """
import json
from gpu import benches, benches_formats, checks, checks_sizes, engine_checks, items
from gpu import halves, rank_sums, tune
made = [*checks.NEAR, *checks.SAME, *checks_sizes.NEAR, *checks_sizes.SAME, *engine_checks.SAME]
made += [*halves.SAME, *rank_sums.SAME, *rank_sums.BENCHES]
made += [*benches.BENCHES, *benches_formats.BENCHES, *tune.TUNERS]
print(json.dumps([made, [n for item in items.ITEMS for n in item.names if n != "kernels"]]))
print(sum(i.estimate_s / (6 if i.kind == "check" else 1) for i in items.ITEMS))
"""
    paths = [str(RUN.parents[1]), str(RUN.parents[2] / "src")]
    done = bare(f"sys.path[:0] = {paths!r}\n{listing}", tmp_path)  # nothing beyond is imported
    assert done.returncode == 0, done.stderr
    names, seconds = done.stdout.splitlines()
    made, listed = json.loads(names)
    assert sorted(made) == sorted(listed)
    assert float(seconds) < 540, "the estimates fit the budget"


def test_a_child_that_fails_leaves_its_reason(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    report = Report(tmp_path / "report.json", time.monotonic() + 100, dry=False)
    report.run_child(items.Item(kind="check", names=("none such",), estimate_s=1, limit_s=90))
    assert "error" in report.checks["none such"]
    report.run_child(items.Item(kind="check", names=("slow",), estimate_s=1, limit_s=0.01))
    assert report.checks["slow"] == {"error": "killed after 0 s"}
    report.run_child(items.Item(kind="check", names=("long",), estimate_s=900, limit_s=900))
    assert "900 s needed" in report.checks["long"]["skipped"]
    written = json.loads((tmp_path / "report.json").read_text())
    assert list(written["checks"]) == ["none such", "slow", "long"], "written after each item"
    assert list(report.failed) == ["none such", "slow", "long"]


def test_a_child_that_crashes_poisons_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = tmp_path / "crash.py"
    crash.write_text(
        "import os, pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        'out.write_text(\'{"name": "before", "ok": true}\\n\')\n'
        "if 'crash' in sys.argv: os.abort()\n"
    )
    monkeypatch.setattr("gpu.report.RUN", crash)
    report = Report(tmp_path / "report.json", time.monotonic() + 100, dry=False)
    names = ("before", "crash", "after")
    report.run_child(items.Item(kind="check", names=names, estimate_s=1, limit_s=60))
    report.run_child(items.Item(kind="bench", names=("before",), estimate_s=1, limit_s=60))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["checks"]["before"] == {"ok": True}, "results before the crash are kept"
    for name in ("crash", "after"):
        assert written["checks"][name]["error"].startswith("ended with status -6")
    assert written["benches"] == {"before": {"ok": True}}, "the next child runs"


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


def script(*arguments: str) -> str:
    return (
        f"sys.argv = [{str(RUN)!r}, *{arguments!r}]\n"
        f"runpy.run_path({str(RUN)!r}, run_name='__main__')"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_line(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = bare(script(), tmp_path)
    assert done.returncode == 2 and not done.stdout
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("run.py: torch finds no CUDA device here; --dry-run"), done.stderr
    assert len(lines) == 1, done.stderr


def test_without_a_package_it_says_so_in_a_line(tmp_path: Path) -> None:
    done = bare(script("--only", "checks"), tmp_path, ABSENT | {"triton"})
    assert done.returncode == 2
    assert done.stderr.strip().endswith("triton cannot be imported here"), done.stderr


def test_all_of_it_runs_on_little(tmp_path: Path) -> None:
    """Checks and benches, and the CUDA runner with the whole engine, import nothing beyond."""
    pytest.importorskip("triton")
    done = bare(script("--dry-run", "--only", "checks", "--budget", "0"), tmp_path)
    assert "out of time" in done.stdout, done.stderr
    source = RUN.resolve().parents[2] / "src"
    modules = (
        "worker.cuda.runner",
        "engine.engine",
        "leader.local_executor",
        "layout.resolve",
        "models.model_slice",
        "models.llama.slice",
        "models.llama4.slice",
    )
    then = f"sys.path.insert(0, {str(source)!r})\n" + "".join(
        f"import arriero.shards.{name}\n" for name in modules
    )
    done = bare(then, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_checks_on_the_gpu(tmp_path: Path) -> None:
    run("--only", "checks", out=tmp_path / "report.json")
