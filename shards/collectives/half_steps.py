"""Which steps go through the layers in two halves, whose sums hide behind products. Needs no torch.

Knows sizes; knows nothing of processes.
"""

from __future__ import annotations

from arriero.shards.collectives.symmetric_sizes import BUFFER_NBYTES

LEAST_ROWS = 768
"""Least rows of a step in two halves. Each half reads all weights, so that a half needs enough rows
for products to be bound by the matrix rate: about 300 on an H100, fewer on an H200, in bfloat16 and
float8 alike (989 TFLOP/s over 3.35 TB/s, 1,979 over 3.35)."""
LEAST_ROUTED_ROWS = 4096
"""The same with routed experts, of which each half reads most. By `arriero.cluster.planner`'s step
model, Maverick and Scout lose time below 3,000 rows on an H200, and below 4,000 on an H100."""
LEAST_NBYTES = BUFFER_NBYTES + 1
"""Least bytes of a sum of all rows. Smaller sums go over symmetric memory, in one launch with the
norm; a half of this size travels for 44 us (337 GB/s, 1.75 times the rows), and two messages more
cost 23 us (a small all-to-all and all-gather). Estimates; nothing here was measured."""
ROWS_MULTIPLE = 128
"""The first half has a multiple of these rows: tiles of products are full, and rows are aligned."""


def first_half(tp: int, num_rows: int, row_nbytes: int, *, routed: bool) -> int:
    """Rows of the first half of a step of `tp` ranks; 0: the step stays whole.

    Args:
        tp: tensor-parallel ranks.
        num_rows: rows of the step.
        row_nbytes: bytes of a row of a sum.
        routed: whether some layers have routed experts.
    """
    least = LEAST_ROUTED_ROWS if routed else LEAST_ROWS
    if tp == 1 or num_rows < least or num_rows * row_nbytes < LEAST_NBYTES:
        return 0
    return num_rows // 2 // ROWS_MULTIPLE * ROWS_MULTIPLE
