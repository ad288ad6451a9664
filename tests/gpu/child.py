"""One child of `run.py`: runs the names it is given, and writes a line of JSON for each.

Knows the registries of checks, benches and tuners; knows nothing of time budgets.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

Result = dict[str, Any]
ON_CPU = ("against transformers",)
"""Names that a dry run leaves on the CPU: the simulated device is not for models of others."""


def run_names(kind: str, names: tuple[str, ...], out: Path, *, dry: bool) -> None:
    """Run names of a kind; `out` gets {"name": ..., ...} lines as results come."""
    with out.open("a") as file:
        for name in names:
            started = time.monotonic()
            try:
                with device(dry=dry and name not in ON_CPU):
                    result = WORK[kind](name, dry)
            except Exception as error:  # each name has a result, whatever the others do
                result = {
                    "error": f"{type(error).__name__}: {error}"[:2000],
                    "at": traceback.format_exc(-6),
                }
            result["took_s"] = round(time.monotonic() - started, 1)
            file.write(json.dumps({"name": name} | result) + "\n")
            file.flush()


@contextmanager
def device(*, dry: bool) -> Iterator[None]:
    """The CUDA device; in a dry run the simulated one."""
    import torch

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    context: Any = nullcontext()
    if dry:
        from support.fake_cuda import simulated

        context = simulated()
    with context:
        yield


def where(dry: bool) -> Any:  # noqa: ANN401
    """The device, and bfloat16; in a dry run tiny float32, which the interpreter computes."""
    import torch
    from gpu.checks import Where

    return Where(torch.device("cuda", 0), torch.float32 if dry else torch.bfloat16, dry)


def check(name: str, dry: bool) -> Result:
    """A value and its limit."""
    from gpu import checks, checks_sizes, engine_checks, halves, rank_sums

    at = where(dry)
    near = checks.NEAR | checks_sizes.NEAR
    same = checks.SAME | checks_sizes.SAME | halves.SAME
    limit = at.limit if name in near else 0.0
    try:
        value = (near | same | engine_checks.SAME | rank_sums.SAME)[name](at)
    except rank_sums.Skipped as reason:
        return {"ok": True, "skipped": str(reason)}
    return {"value": value, "limit": limit, "ok": value <= limit}


def bench(name: str, dry: bool) -> Result:
    """Times, as shares of what the machine was measured to do in this process."""
    import torch
    from gpu import benches, benches_formats, rank_sums

    at = where(dry)
    if dry and name in ON_CPU:
        at = replace(at, device=torch.device("cpu"))
    machine = benches.measure(at)
    every_bench = benches.BENCHES | benches_formats.BENCHES | rank_sums.BENCHES
    try:
        result = every_bench[name](at, machine)
    except rank_sums.Skipped as reason:
        return {"skipped": str(reason)}
    return {"machine": asdict(machine), "results": result}


def tune(name: str, dry: bool) -> Result:
    """Entries of tuned.json."""
    from gpu import tune as tuners

    at = where(dry)
    return {"entries": tuners.TUNERS[name](at, _no_machine())}


def compile_kernels(name: str, dry: bool) -> Result:
    """Compile all cases for this GPU, which fills Triton's cache; in a dry run only their names."""
    import os

    import torch
    from gpu import compile_kernels as compiles
    from gpu.aot.limits import all_broken

    if dry:
        return {"ok": True, "binaries": 0}
    major, minor = torch.cuda.get_device_capability()
    rows = compiles.compile_all(
        [10 * major + minor], "", os.cpu_count() or 1, torch.cuda.get_device_name()
    )
    texts = all_broken(rows)
    return {"ok": not texts, "binaries": len(rows), "broken": texts}


def _no_machine() -> Any:  # noqa: ANN401
    """Tuners compare times with times."""
    return None


WORK: dict[str, Callable[[str, bool], Result]] = {
    "check": check,
    "bench": bench,
    "tune": tune,
    "compile": compile_kernels,
}
