"""The compiled kernels as one Markdown table: a line for each kernel and capability.

Knows rows of figures; knows nothing of compilers.
"""

from __future__ import annotations

from typing import Any

MATRIX = ("wgmma", "mma", "tcgen05")
HEAD = (
    "| capability | kernel | binaries | registers | spills (main loop) | stack, bytes "
    "| shared, KiB | tensor cores | 16-byte loads |"
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table; `rows` have the fields of `binary.inspect`, or "error"."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["capability"], row["kernel"]), []).append(row)
    lines = [HEAD, "|" + "---|" * HEAD.count(" | ") + "---|"]
    lines += [_line(*key, group) for key, group in sorted(groups.items())]
    return "\n".join(lines)


def _line(capability: int, kernel: str, rows: list[dict[str, Any]]) -> str:
    good = [row for row in rows if "error" not in row]
    refused = len(rows) - len(good)
    count = f"{len(good)}" + (f", {refused} refused" if refused else "")
    if not good:
        return f"| {capability / 10} | `{kernel}` | {count} | | | | | | |"
    kinds = "+".join(kind for kind in MATRIX if any(row[kind] for row in good)) or "none"
    wide, loads = (sum(row[name] for row in good) for name in ("wide_loads", "loads"))
    cells = (
        f"{capability / 10}",
        f"`{kernel}`",
        count,
        _range(good, "registers"),
        f"{max(row['spills'] for row in good)} ({max(row['loop_spills'] for row in good)})",
        f"{max(row['stack'] for row in good)}",
        f"{max(row['shared'] for row in good) / 1024:.0f}",
        kinds,
        f"{100 * wide // max(loads, 1)} %",
    )
    return "| " + " | ".join(cells) + " |"


def _range(rows: list[dict[str, Any]], name: str) -> str:
    low, high = min(row[name] for row in rows), max(row[name] for row in rows)
    return f"{low}" if low == high else f"{low} to {high}"
