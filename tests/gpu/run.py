"""Checks and benches of the engine on a GPU: `python tests/gpu/run.py [--out FILE]`.

Needs this source tree, torch, triton and numpy; transformers for one bench. Ends within
its time (`--budget`): what does not fit is reported as skipped. Exits with 1 when a check fails,
and with 2 when nothing can run here.

`--dry-run` goes through all of it in tiny shapes, interpreted on CPU; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "numpy")


def main(arguments: list[str] | None = None) -> int:
    """Run what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="write the JSON there; else print it")
    parser.add_argument("--only", choices=("checks", "benches"), help="one half alone")
    parser.add_argument("--budget", type=float, default=500, help="seconds (500)")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on CPU")
    chosen = parser.parse_args(arguments)
    for folder in (ROOT / "src", ROOT / "tests"):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    if chosen.dry_run:
        from support import triton_interpreter

        triton_interpreter.install()
    why = unfit(dry=chosen.dry_run)
    if why:
        print(f"{parser.prog}: {why}", file=sys.stderr)
        return 2
    report = run(chosen.only, time.monotonic() + chosen.budget, dry=chosen.dry_run)
    text = json.dumps(report, indent=2)
    if chosen.out is None:
        print(text)
    else:
        chosen.out.write_text(text + "\n")
    failed = [name for name, one in report.get("checks", {}).items() if not one.get("ok")]
    for name in failed:
        print(f"failed: {name}: {report['checks'][name]}", file=sys.stderr)
    return 1 if failed else 0


def unfit(*, dry: bool) -> str | None:
    """Why nothing can run here, or None."""
    missing = [name for name in PACKAGES if not _is_here(name)]
    if missing:
        return f"needs {', '.join(PACKAGES)}; {', '.join(missing)} cannot be imported here"
    import torch

    if not dry and not torch.cuda.is_available():
        return "torch finds no CUDA device here; --dry-run goes through all of it on CPU"
    return None


def _is_here(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def run(only: str | None, deadline: float, *, dry: bool) -> dict[str, Any]:
    """Everything asked for, as JSON has it."""
    import torch
    import triton
    from gpu.benches import BENCHES, measure
    from gpu.checks import NEAR, SAME, Check, Where

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), torch.bfloat16
    if dry:
        device, dtype = torch.device("cpu"), torch.float32
    at = Where(device, dtype, dry)
    began = time.monotonic()
    report: dict[str, Any] = {
        "gpu": "none: interpreted" if dry else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cpus": os.cpu_count(),
    }
    if only != "benches":
        limits = dict.fromkeys(NEAR, at.limit) | dict.fromkeys(SAME, 0.0)
        report["checks"] = {}
        for name, check in (NEAR | SAME).items():

            def judged(name: str = name, check: Check = check) -> dict[str, Any]:
                value, limit = check(at), limits[name]
                return {"value": value, "limit": limit, "ok": value <= limit}

            report["checks"][name] = guarded(judged, deadline)
    if only != "checks":
        machine = measure(at)
        report["copy_GB_per_s"] = machine.bytes_per_s / 1e9
        report["matrix_TFLOP_per_s"] = machine.flops_per_s / 1e12
        report["benches"] = {}
        for name, bench in BENCHES.items():
            report["benches"][name] = guarded(lambda bench=bench: bench(at, machine), deadline)
    report["seconds"] = time.monotonic() - began
    return report


def guarded(work: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """What `work` gives; or why it gave nothing."""
    if time.monotonic() > deadline:
        return {"skipped": "out of time"}
    began = time.monotonic()
    try:
        result = work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:2000], "at": traceback.format_exc(-4)}
    return result | {"took_s": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
