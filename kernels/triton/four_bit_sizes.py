"""How four-bit weights lie in memory: panels of rows, blocks of columns, two columns in a byte.

A panel has the blocks of eight rows one after the other, so that the bytes which the threads of a
warp copy are adjacent. Byte j of a block has column j of the block in the low four bits, and the
column half a block further in the high four bits, so that kernels read both parts of the inputs in
order. Where groups are small, the low bits belong to one group and the high bits to the next: a
matrix instruction then multiplies columns of a single group.

Knows sizes; knows nothing of tensors. Needs no torch.
"""

from __future__ import annotations

PANEL = 8
"""Rows of a panel; the last panel is padded."""
SMALL_GROUP = 64
"""Columns of the largest group that shares its bytes with the next group."""
STEP = 128
"""Columns of a kernel's step, if blocks have fewer."""


def block_columns(in_features: int, group_size: int) -> int:
    """Columns of a block: a group, or two small groups if their number is even.

    Args:
        in_features: columns of a row.
        group_size: columns that share a scale, at most `in_features`.
    """
    num_groups = -(-in_features // group_size)
    return group_size * (2 if group_size <= SMALL_GROUP and num_groups % 2 == 0 else 1)


def data_shape(
    out_features: int, in_features: int, group_size: int
) -> tuple[int, int, int, int]:
    """Panels, blocks of a row, rows of a panel and bytes of a block, as the bytes lie in memory."""
    columns = block_columns(in_features, group_size)
    return (
        -(-out_features // PANEL),
        -(-in_features // columns),
        PANEL,
        -(-columns // 2),
    )
