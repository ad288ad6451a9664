"""Compile every kernel for GPUs that this machine lacks, and check the machine code.

    python tests/gpu/compile_kernels.py [--capability 80 90 100] [--only TEXT] [--processes N]

Prints a table: a line for each kernel, with the greatest registers, spills and shared memory, and
the tensor-core instructions. Exits with 1 when a binary breaks a limit (`aot/limits.py`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT / "src", ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from gpu.aot.limits import SAME_ROW_SUMS, all_broken  # noqa: E402  (the paths above come first)
from gpu.aot.table import markdown  # noqa: E402

CAPABILITIES = (80, 90, 100)
Row = dict[str, Any]


def main() -> int:
    """Run what the arguments ask for; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--capability", type=int, nargs="*", default=CAPABILITIES)
    parser.add_argument("--only", default="", help="only cases with this text in their name")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write each binary's row there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    chosen = parser.parse_args()
    started = time.monotonic()
    rows = compile_all(chosen.capability, chosen.only, chosen.processes or 1, keep=chosen.json)
    table = markdown(rows)
    print(table)
    if chosen.markdown is not None:
        chosen.markdown.write_text(table + "\n")
    failures = all_broken(rows)
    for text in failures:
        print(f"limit: {text}")
    print(
        f"{len(rows)} binaries, {len(failures)} broken limits, {time.monotonic() - started:.0f} s"
    )
    return 1 if failures else 0


def compile_all(
    capabilities: Sequence[int],
    only: str,
    processes: int,
    name: str = "absent",
    keep: Path | None = None,
) -> list[Row]:
    """Compile the cases with `only` in their name; a row for each binary or failure.

    Args:
        capabilities: 80 for compute capability 8.0.
        only: text in the names of the cases; "" for all.
        processes: number of processes.
        name: name of the device, for the tuned block sizes.
        keep: file for the rows so far, as JSON, written after each case.
    """
    rows: list[Row] = []
    if processes == 1:
        for case in case_names():
            for capability in capabilities if only in case else ():
                rows += compile_case(case, capability, name)
                if keep is not None:
                    keep.write_text(json.dumps(rows, indent=1))
        return rows
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        names = pool.submit(case_names).result()
        tasks = [
            pool.submit(compile_case, case, capability, name)
            for case in names
            if only in case
            for capability in capabilities
        ]
        for task in as_completed(tasks):
            rows += task.result()
            if keep is not None:
                keep.write_text(json.dumps(rows, indent=1))
    return sorted(rows, key=lambda row: (row["capability"], row["kernel"], row["case"]))


def case_names() -> list[str]:
    """Names of all cases; in a process that may import the kernels."""
    from gpu.aot.absent_gpu import AbsentGpu
    from triton.runtime import driver

    driver.set_active(AbsentGpu())
    from gpu.aot.cases import cases

    return list(cases())


def compile_case(case: str, capability: int, name: str) -> list[Row]:
    """Compile the launches of a case, and read the machine code."""
    from gpu.aot.absent_gpu import AbsentGpu, Compiled, compiles_only
    from gpu.aot.binary import inspect
    from gpu.aot.cases import cases
    from gpu.aot.row_sums import row_sums

    binaries: list[Compiled] = []
    with compiles_only(AbsentGpu(capability), name, binaries.append, lambda: case):
        cases()[case]()
    rows: list[Row] = []
    for binary in binaries:
        row = {
            "case": case,
            "kernel": binary.kernel,
            "capability": capability,
            "seconds": round(binary.seconds, 2),
        }
        row |= {"error": binary.error} if binary.error else inspect(binary.binary)
        if binary.kernel in SAME_ROW_SUMS and not binary.error:
            row["row_sums"] = row_sums(binary.binary.asm["ttgir"])
        rows.append(row)
    return rows


if __name__ == "__main__":
    sys.exit(main())
