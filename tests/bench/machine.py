"""What this machine can do at most: memory reads and bf16 matrix products, by torch's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def best_s(run: Callable[[], object], repeats: int = 7) -> float:
    """The shortest of several runs: a limit is what an undisturbed run reaches."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def memory_rate(threads: int) -> float:
    """Bytes read a second, by summing 1 GiB that no cache holds."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 27, dtype=torch.int64)
    return data.nbytes / best_s(lambda: data.sum())


def matrix_rate(threads: int) -> float:
    """Operations a second of a bf16 product, 2 for each multiply and add."""
    torch.set_num_threads(threads)
    size = 2048
    a, b = (torch.randn(size, size).bfloat16() for _ in range(2))
    return 2 * size**3 / best_s(lambda: a @ b)
