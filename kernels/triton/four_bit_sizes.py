"""How four-bit weights lie in memory: panels of rows, blocks of columns, four columns in a word.

A panel has the blocks of eight rows one after the other, so that the bytes which the threads of a
warp copy are adjacent. A block has four planes of columns: 16-bit word j of a block has column j of
plane p in its bits 4 p .. 4 p + 3, so that a kernel masks two columns of a plane at once, and reads
the inputs of a plane in order. A plane has columns of a single group: its sum has a single scale.

Knows sizes; knows nothing of tensors. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

PANEL = 8
"""Rows of a panel; the last panel is padded."""
PLANES = 4
"""Columns of a word."""
MOST_COLUMNS = 128
"""Columns of the largest block of several groups."""


@dataclass(frozen=True, slots=True)
class FourBitForm:
    """The blocks of a row.

    Attributes:
        groups: groups of a block: 1, 2 or 4. Blocks are whole: the groups of a row divide by it.
        words: words of a block, which are the columns of a plane.
        blocks: blocks of a row; the columns past the last are padded.
    """

    groups: int
    words: int
    blocks: int

    @property
    def planes(self) -> int:
        """Planes of a group."""
        return PLANES // self.groups

    def data_shape(self, out_features: int) -> tuple[int, int, int, int]:
        """Panels, blocks of a row, rows of a panel and words of a block, as they lie in memory."""
        return -(-out_features // PANEL), self.blocks, PANEL, self.words


def four_bit_form(in_features: int, group_size: int) -> FourBitForm:
    """The blocks of rows of `in_features` columns, of which `group_size` share a scale."""
    num_groups = -(-in_features // group_size)
    groups = PLANES
    while groups > 1 and (num_groups % groups or groups * group_size > MOST_COLUMNS):
        groups //= 2
    planes = PLANES // groups
    return FourBitForm(groups, -(-group_size // planes), num_groups // groups)
