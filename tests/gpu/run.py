"""A complete verdict on a GPU in one call: `python tests/gpu/run.py [--out FILE]`.

Compiles all kernels at once, then checks, benches and tunes. Each item is a child process, so that
an illegal access poisons nothing else. The JSON is written after each item; tuned blocks go to
`tuned.json` beside it. Ends within `--budget`: an item that does not fit is skipped, with its
reason. Exits with 1 when a compile or a check fails, and with 2 when nothing can run here.

Needs this source tree, torch, triton and numpy; transformers for one bench.

`--dry-run` goes through all of it in tiny shapes on a simulated device, in this process, and prints
what the real call does with estimated times; its own times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "src", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu.items import BENCHES, CHECKS, COMPILE, ITEMS, TUNERS, Item  # noqa: E402
from gpu.report import Report  # noqa: E402

PACKAGES = ("torch", "triton", "numpy")
AT_ONCE = 6
"""Checks at the same time: they are small, and most of their time is imports."""


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the JSON there; else print it")
    parser.add_argument("--only", choices=("checks", "benches", "tuning"), help="one part alone")
    parser.add_argument("--budget", type=float, default=540, help="seconds (540)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on a simulated device")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.dry_run:
        from support import triton_interpreter

        triton_interpreter.install()
    if chosen.child:
        from gpu.child import run_names

        kind, *names = chosen.child
        run_names(kind, tuple(names), chosen.out, dry=chosen.dry_run)
        return 0
    why = unfit(dry=chosen.dry_run)
    if why:
        print(f"{parser.prog}: {why}", file=sys.stderr)
        return 2
    report = Report(chosen.out, time.monotonic() + chosen.budget, dry=chosen.dry_run)
    run(report, chosen.only)
    report.finish()
    for name, result in report.failed.items():
        print(f"failed: {name}: {result}", file=sys.stderr)
    return 1 if report.failed else 0


def unfit(*, dry: bool) -> str | None:
    """Why nothing can run here, or None."""
    missing = [name for name in PACKAGES if not _is_here(name)]
    if missing:
        return f"needs {', '.join(PACKAGES)}; {', '.join(missing)} cannot be imported here"
    import torch

    if not dry and not torch.cuda.is_available():
        return "torch finds no CUDA device here; --dry-run goes through all of it without one"
    return None


def _is_here(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def run(report: Report, only: str | None) -> None:
    """Run all items, or one part: checks at the same time, all others alone."""
    if report.dry:
        for item in _of(ITEMS, only):
            report.run_here(item)
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TRITON_CACHE_DIR", folder)
        report.run_child(COMPILE)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(report.run_child, _of(CHECKS, only)))
        for item in (*_of(BENCHES, only), *_of(TUNERS, only)):
            report.run_child(item)


def _of(items: tuple[Item, ...], only: str | None) -> list[Item]:
    kinds = {"checks": "check", "benches": "bench", "tuning": "tune"}
    return [item for item in items if only is None or item.kind == kinds[only]]


if __name__ == "__main__":
    sys.exit(main())
