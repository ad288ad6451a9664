"""When ranks divide a sum: two exchanges of parts in place of one of everything. Needs no torch.

Knows sizes; knows nothing of processes.
"""

from __future__ import annotations

DIVIDED_SUM_NBYTES = 512 << 10
"""Bytes of rows from which more than two ranks divide a sum: below, a second exchange costs more
than the bytes that it saves (8 ranks on NVLink: about 0.8 MB; 3 over loopback: about 0.3 MB)."""


def divides_sum(tp: int, num_rows: int, row_nbytes: int) -> bool:
    """Whether `Mesh.reduce` of `tp` ranks divides the sum of so many rows."""
    return tp > 2 and num_rows >= tp and num_rows * row_nbytes >= DIVIDED_SUM_NBYTES
