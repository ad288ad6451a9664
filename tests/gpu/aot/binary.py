"""What a compiled kernel is made of: registers, spills, shared memory, instructions.

Reads the machine code by the disassembler in Triton's package. Knows instructions; knows nothing of
kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
PATTERNS = {
    "wgmma": r"\b(?:HGMMA|QGMMA|IGMMA)\b",
    "mma": r"\b(?:HMMA|QMMA|IMMA|OMMA)\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "spills": r"\b(?:LDL|STL)\b",
    "loads": r"\bLDG\b|\bLDGSTS\b",
    "wide_loads": r"\b(?:LDG|LDGSTS)\.[\w.]*128\b",
    "float64": r"\bD(?:FMA|MUL|ADD)\b",
}
"""Groups of machine instructions."""
VERSION = 3
"""Of the figures in the cache; to be raised when `_read` changes."""
MATRIX = ("wgmma", "mma", "tcgen05")
_MATRIX = re.compile("|".join(PATTERNS[name] for name in MATRIX))
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*)")
_LABEL = re.compile(r"^\s*(\.L_x?_?\w+):")
_BRANCH = re.compile(r"\bBRA\b.*?`\((\.L_\w+)\)")


def inspect(kernel: Any) -> dict[str, Any]:  # noqa: ANN401
    """Registers of a thread, bytes of stack and shared memory, and counts of instructions.

    `loop_spills` counts loads and stores of the stack in main loops: the innermost loops with
    matrix instructions, or all innermost loops of a kernel without. `loop_instructions` counts the
    instructions of the longest; `loop_code` and `loop_matrix` are all instructions and the matrix
    instructions of the main loop with most of the latter. Figures are kept beside the binary in
    Triton's cache: disassembly takes as long as a compile.
    """
    kept = Path(triton.knobs.cache.dir) / f"figures-{VERSION}" / f"{kernel.hash}.json"
    if kept.exists():
        figures: dict[str, Any] = json.loads(kept.read_text())
        return figures
    figures = _read(kernel)
    kept.parent.mkdir(parents=True, exist_ok=True)
    written = kept.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(figures))
    written.rename(kept)
    return figures


def _read(kernel: Any) -> dict[str, Any]:  # noqa: ANN401
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
        sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", file.name], text=True)
    meta = kernel.metadata
    return {
        "registers": _usage("REG", usage),
        "stack": _usage("STACK", usage),
        "shared": meta.shared,
        "warps": meta.num_warps,
        "stages": meta.num_stages,
        "loop_spills": loop_spills(sass),
        "loop_instructions": max(map(len, main_loops(sass)), default=0),
        **loop_code(sass),
        **{name: len(re.findall(pattern, sass)) for name, pattern in PATTERNS.items()},
    }


def _usage(name: str, text: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", text)
    assert match is not None, f"cuobjdump gives no {name}: {text!r}"
    return int(match[1])


def loop_spills(sass: str) -> int:
    """Loads and stores of the stack in main loops; see `inspect`."""
    spill = re.compile(PATTERNS["spills"])
    return sum(bool(spill.search(line)) for body in main_loops(sass) for line in body)


def loop_code(sass: str) -> dict[str, int]:
    """Instructions of the main loop with most matrix instructions; see `inspect`."""
    counts = [(sum(map(_is_matrix, body)), len(body)) for body in main_loops(sass)]
    matrix, size = max(counts, default=(0, 0))
    return {"loop_code": size, "loop_matrix": matrix}


def main_loops(sass: str) -> list[list[str]]:
    """Innermost loops with matrix instructions, or all innermost loops of a kernel without."""
    code, loops = _code_and_loops(sass)
    innermost = [
        loop
        for loop in loops
        if not any(loop[0] <= other[0] and other[1] <= loop[1] for other in loops - {loop})
    ]
    bodies = [code[first : last + 1] for first, last in innermost]
    return [body for body in bodies if any(map(_is_matrix, body))] or bodies


def _is_matrix(line: str) -> bool:
    return bool(_MATRIX.search(line))


def _code_and_loops(sass: str) -> tuple[list[str], set[tuple[int, int]]]:
    """Instructions in order, and loops as index ranges: a backward branch closes a loop."""
    code: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label[1]] = len(code)
            continue
        instruction = _INSTRUCTION.search(line)
        if instruction is None:
            continue
        branch = _BRANCH.search(instruction[2])
        if branch:
            branches.append((len(code), branch[1]))
        code.append(instruction[2])
    loops = {(labels[to], at) for at, to in branches if to in labels and labels[to] < at}
    # a wait for a barrier is a loop of a few instructions, and no main loop
    return code, {(first, last) for first, last in loops if last - first > 8}
