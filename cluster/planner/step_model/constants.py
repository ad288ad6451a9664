"""Efficiencies and latencies of the estimate, each with its source; and measured values instead.

`tests/gpu/run.py` measures some of them on a GPU (`make gpu-bench`); its JSON replaces the values
here. Knows numbers and their sources; knows nothing of models and steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arriero.cluster.planner.catalog import Device
from arriero.shards.errors import SpecError

KERNELS = "TensorRT-LLM's kernels on H200, AIConfigurator 0.12.0; ours not measured"
LIBRARY = "cuBLAS on H200, AIConfigurator 0.12.0"
NCCL = "NCCL on 8 x H200, AIConfigurator 0.12.0"
ASSUMED = "assumed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Constant:
    """A number of the estimate.

    Attributes:
        value: a share of the device's rate, or seconds.
        unit: "share" or "s".
        source: where the value comes from.
    """

    value: float
    unit: str
    source: str


def _share(value: float, source: str) -> Constant:
    return Constant(value=value, unit="share", source=source)


def _seconds(value: float, source: str) -> Constant:
    return Constant(value=value, unit="s", source=source)


CONSTANTS: Mapping[str, Constant] = {
    "product, memory": _share(0.85, LIBRARY),
    "product, matrix": _share(0.77, LIBRARY),
    "product, kernel": _seconds(1.5e-6, LIBRARY),
    "float8 product, memory": _share(0.7, ASSUMED),
    "float8 product, matrix": _share(0.6, ASSUMED),
    "float8 product, kernel": _seconds(2e-6, ASSUMED),
    "triton product, memory": _share(0.7, ASSUMED),
    "triton product, matrix": _share(0.5, ASSUMED),
    "triton product, kernel": _seconds(2e-6, ASSUMED),
    "attention, memory": _share(0.55, KERNELS),
    "attention, matrix": _share(0.45, KERNELS),
    "attention, kernel": _seconds(8e-6, KERNELS),
    "rows, memory": _share(0.8, KERNELS),
    "rows, matrix": _share(0.5, ASSUMED),
    "rows, kernel": _seconds(2e-6, ASSUMED),
    "sampling, memory": _share(0.5, ASSUMED),
    "sampling, matrix": _share(0.5, ASSUMED),
    "sampling, kernel": _seconds(5e-6, ASSUMED),
    "link": _share(0.75, NCCL),
    "network": _share(0.8, ASSUMED),
    "launch outside graphs": _seconds(8e-6, ASSUMED),
    "wait of the host": _seconds(20e-6, ASSUMED),
    "all_reduce": _seconds(7e-6, NCCL),
    "all_gather": _seconds(13e-6, NCCL),
    "all_to_all": _seconds(10e-6, NCCL),
    "meeting": _seconds(3e-6, ASSUMED),
    "broadcast": _seconds(15e-6, ASSUMED),
    "send": _seconds(10e-6, ASSUMED),
    "recv": _seconds(10e-6, ASSUMED),
    "message across machines": _seconds(15e-6, ASSUMED),
}
"""Shares of the device's data sheet; least seconds of a kernel in a graph, of a launch outside of
graphs, of a collective of a few bytes, and of a wait of ranks for each other within a kernel."""

MEASURED: Mapping[str, tuple[str, str]] = {
    "product, memory": ("products by kind", "dense, 1 rows"),
    "product, matrix": ("products by kind", "dense, 4096 rows"),
    "float8 product, memory": ("products by kind", "fp8 inputs, 1 rows"),
    "float8 product, matrix": ("products by kind", "fp8 inputs, 4096 rows"),
    "triton product, memory": ("products by kind", "fp8, 1 rows"),
    "triton product, matrix": ("products by kind", "fp8, 4096 rows"),
    "attention, memory": ("attention by cache", "Llama-3.1-8B, 64 x 4096, bfloat16"),
    "sampling, memory": ("sampling", "greedy"),
}
"""Constants that a bench measures: its name in the report, and the name of the case."""

SLICES = ("slices over a fake group", "a Maverick MoE layer at EP8, batch 1")
"""Bench and case of eager layers over ranks that do not exist: launches take the time."""
SLICE_LAUNCHES = 178
"""Launches of that case: 8 layers with experts, 22 each; a copy of the rows, the last sum."""


def with_bench(
    constants: Mapping[str, Constant], file: Path, device: Device
) -> Mapping[str, Constant]:
    """The constants, with measured values where the report of `tests/gpu/run.py` has them.

    The report gives shares of rates that it measures too; here they become shares of the data
    sheet's rates.

    Args:
        constants: values to replace.
        file: JSON of `tests/gpu/run.py`.
        device: the measured device.

    Raises:
        SpecError: the file is not a report of a GPU.
    """
    try:
        report = json.loads(file.read_text())
        benches = report["benches"]
        dry = report["dry_run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(
            f"`bench`={file}: not a report of tests/gpu/run.py ({error}); give the JSON of "
            "`make gpu-bench`"
        ) from None
    if dry:
        raise SpecError(
            f"`bench`={file}: a dry run measures nothing; give the JSON of `make gpu-bench`"
        )
    measured = dict(constants)
    for name, (bench, case) in MEASURED.items():
        share = _measured_share(benches.get(bench, {}), case, name.endswith("matrix"), device)
        if share is not None:
            measured[name] = _share(share, f"{file.name}, {bench}: {case}")
    bench, case = SLICES
    slices = benches.get(bench, {}).get("results", {}).get(case)
    if slices is not None:
        seconds = slices["eager_ms"] / 1e3 / SLICE_LAUNCHES
        measured["launch outside graphs"] = _seconds(seconds, f"{file.name}, {bench}: {case}")
    return measured


def _measured_share(
    bench: Mapping[str, Any], case: str, matrix: bool, device: Device
) -> float | None:
    """Share of the data sheet's rate; None where the report has no such figure."""
    result = bench.get("results", {}).get(case)
    machine = bench.get("machine")
    if result is None or machine is None or not result.get("share"):
        return None
    rate = machine["flops_per_s"] / device.matrix_rate
    if not matrix:
        rate = machine["bytes_per_s"] / device.bandwidth
    return float(result["share"] * rate)
