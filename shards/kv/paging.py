"""Positions of keys and values in a paged cache, and the blocks that a token sees.

Knows block tables and positions, nothing else.

Shape legend: T tokens, S sequences, B blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.protocol.step_plan import Int32


def cache_slots(table_SB: Int32, owner_T: Int32, positions_T: Int32, block_size: int) -> Int32:
    """Cache slot of each token's key and value: block id * block size + offset, int32 [T].

    Args:
        table_SB: block ids of each sequence.
        owner_T: table row of each token.
        positions_T: position of each token in its sequence.
        block_size: tokens in a block.
    """
    block, offset = np.divmod(positions_T, block_size)
    slots_T: Int32 = table_SB[owner_T, block] * block_size + offset
    return slots_T


@dataclass(frozen=True, slots=True)
class SeenBlocks:
    """Blocks of a sequence that a token sees, by number from the sequence's first block.

    A token in block b sees the blocks of the sinks, if any, and the blocks from `first(b)` on: b's
    first token sees as far back as any of its tokens. Blocks between can be freed once a sequence
    has reached b.

    Attributes:
        visible: keys that a token sees; the chunk size is a multiple of `block_size`.
        block_size: tokens in a block.
    """

    visible: AttentionMaskSpec
    block_size: int

    @property
    def sinks(self) -> int:
        """Blocks of the sinks, which every token sees."""
        return -(-self.visible.sinks // self.block_size)

    @property
    def span(self) -> int:
        """Most blocks from `first` of a token's block to that block; 0 for no bound."""
        if self.visible.window:
            return -(-(self.visible.window - 1) // self.block_size) + 1
        return self.visible.chunk_size // self.block_size

    def first(self, block: int) -> int:
        """First block that tokens of block number `block` see, sinks aside."""
        return self.visible.first(block * self.block_size) // self.block_size

    def numbers(self, end: int) -> list[int]:
        """Numbers of the blocks before number `end` that a token in block `end` sees."""
        first = self.first(end)
        return [*range(min(self.sinks, first)), *range(first, end)]

    def most(self, num_tokens: int, step: int = 1) -> int:
        """Most blocks of a sequence at the same time: sinks, span, and the blocks of a step.

        Args:
            num_tokens: tokens of the sequence.
            step: most tokens of the sequence in one step.
        """
        blocks = -(-num_tokens // self.block_size)
        if not self.span:
            return blocks
        return min(blocks, self.sinks + self.span + -(-(step - 1) // self.block_size))
