"""Which sums go over memory that the ranks share, and in which form. Needs no torch.

Knows sizes; knows nothing of processes.
"""

from __future__ import annotations

from arriero.kernels.symmetric_memory import block_nbytes, holds

BUFFER_NBYTES = 16 << 20
"""Bytes of a buffer for parts; a rank has two. Larger sums, of prompts, stay with NCCL: there the
bytes take the time, and NCCL's rate is known. Holds 512 rows of the 405B in bfloat16."""
BARRIER_NBYTES = 1 << 20
"""Bytes that a rank receives over NVLink in the time that ranks need to meet once more: about 3 us
at 337 GB/s (450 GB/s of an H100, 0.75 of it). Both are estimates; nothing here was measured."""


def in_symmetric_memory(num_rows: int, row_nbytes: int) -> bool:
    """Whether the buffers hold the rows of a sum."""
    return holds(BUFFER_NBYTES, num_rows, row_nbytes)


def divides_rows(tp: int, num_rows: int, row_nbytes: int) -> bool:
    """Whether each rank sums a part of the rows (two-shot) in place of all of them (one-shot).

    A rank then receives 2 (tp - 1) / tp times the rows in place of tp - 1 times, and meets the
    others twice. Two ranks would save nothing.
    """
    saved = (tp - 1) - 2 * (tp - 1) / tp
    return saved * num_rows * row_nbytes >= BARRIER_NBYTES


def symmetric_nbytes() -> int:
    """Bytes of device memory of a rank."""
    return block_nbytes(BUFFER_NBYTES)
