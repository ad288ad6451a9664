"""The line protocol of the benchmark: a cell comes in on stdin, its figures go out on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

Run = Callable[[list[list[int]], int], None]


def prompts(requests: int, length: int) -> list[list[int]]:
    """The same token ids for every engine."""
    return [[(7 * i + 13 * j) % 40000 + 100 for j in range(length)] for i in range(requests)]


def answer_cells(run: Run) -> None:
    """Run each cell asked for: `run(prompts, output_tokens)` must generate all of it, greedily."""
    out = sys.stdout
    sys.stdout = sys.stderr
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        cell = json.loads(line)
        batch = prompts(cell["requests"], cell["prompt"])
        started = time.perf_counter()
        run(batch, cell["output"])
        elapsed = time.perf_counter() - started
        rate = cell["requests"] * cell["output"] / elapsed
        print(json.dumps({**cell, "output_tok_s": rate}), file=out, flush=True)
