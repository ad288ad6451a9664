"""Limits that every binary keeps: no spill in a main loop, shared memory, tensor cores.

Knows limits of GPUs; knows nothing of how the figures were read.
"""

from __future__ import annotations

from typing import Any

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Largest shared memory of a program, by capability (CUDA C++ Programming Guide, table of
technical specifications)."""
PRODUCTS = {"_matmul", "_grouped_matmul", "_prefill", "_decode_splits"}
"""Kernels whose time is matrix products."""
ATTENTION = {"_prefill", "_decode_splits"}
NORMS = {"_rms_norm", "_symmetric_sum"}
SAME_ROW_SUMS = ATTENTION | NORMS
"""Kernels whose sums of a row must have the same order wherever a case launches several of them."""
ATTENTION_INSTRUCTIONS = {80: "mma", 90: "wgmma", 100: "tcgen05"}
"""Decode and prefill must sum by the same instructions, so that both give the same bits."""
FAST = "fast"
"""First word of the cases whose decode may have other bits than a prefill; these have `mma`."""
FP8_CAPABILITY = 89
"""Least capability with float8 conversions."""


def all_broken(rows: list[dict[str, Any]]) -> list[str]:
    """The limits that the binaries break, each alone and in company, as texts."""
    return [text for row in rows for text in broken(row)] + unlike(rows)


def unlike(rows: list[dict[str, Any]]) -> list[str]:
    """Cases whose kernels sum a row in different orders, as texts.

    In attention, tokens would depend on whether a prompt came in one piece; of norms, on whether
    the norm was fused with the sum over ranks.
    """
    orders: dict[tuple[int, str], dict[str, set[str]]] = {}
    for row in rows:
        if row.get("row_sums"):
            kernels = orders.setdefault((row["capability"], row["case"]), {})
            kernels.setdefault(row["kernel"], set()).add(str(row["row_sums"]))
    return [
        f"sm_{capability} ({case}): {'norms' if kernels.keys() <= NORMS else 'decode and prefill'} "
        f"sum a row in different orders: {kernels}"
        for (capability, case), kernels in orders.items()
        if len(set[str]().union(*kernels.values())) > 1
    ]


def broken(row: dict[str, Any]) -> list[str]:
    """The limits that a binary breaks, as texts."""
    at = f"sm_{row['capability']} {row['kernel']} ({row['case']})"
    if "error" in row:
        if row["capability"] < FP8_CAPABILITY and "fp8e4nv not supported" in row["error"]:
            return []  # refused before a model loads: shards/worker/cuda/capability.py
        return [f"{at}: no binary: {row['error']}"]
    texts = []
    if row["loop_spills"]:
        texts.append(f"{at}: {row['loop_spills']} spills in a main loop")
    most = SHARED_BYTES[row["capability"]]
    if row["shared"] > most:
        texts.append(f"{at}: {row['shared']} bytes of shared memory exceed {most}")
    if row["kernel"] in PRODUCTS and not (row["wgmma"] or row["mma"] or row["tcgen05"]):
        texts.append(f"{at}: a product without tensor cores")
    wanted = ATTENTION_INSTRUCTIONS[row["capability"]]
    if row["case"].startswith(FAST):
        wanted = "mma"
    if row["kernel"] in ATTENTION and not row[wanted]:
        texts.append(f"{at}: attention without {wanted}")
    return texts
