"""Where keys and values lie in a paged cache, and which blocks of it a token sees.

Knows block tables and positions, nothing else.

Shape legend: T tokens, S sequences, B blocks of a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arriero.kernels.attention_mask import AttentionMaskSpec
from arriero.shards.protocol.step_plan import Int32


def cache_slots(table_SB: Int32, owner_T: Int32, positions_T: Int32, block_size: int) -> Int32:
    """Where each token's key and value go: block id * block size + offset, int32 [T].

    Args:
        table_SB: block ids of each sequence.
        owner_T: row of the table.
        positions_T: in the sequence.
        block_size: tokens in a block.
    """
    block, offset = np.divmod(positions_T, block_size)
    found: Int32 = table_SB[owner_T, block] * block_size + offset
    return found


@dataclass(frozen=True, slots=True)
class SeenBlocks:
    """Which blocks of its sequence a token sees, counted from the sequence's first.

    Of a token in block b these are the blocks of the first keys (sinks), if there are any, and
    those from `first(b)` on: b's first token sees as far back as any of its tokens. What lies
    between can be given back once a sequence has come to b.

    Attributes:
        visible: which keys a token sees; a chunk's size is a multiple of `block_size`.
        block_size: tokens in a block.
    """

    visible: AttentionMaskSpec
    block_size: int

    @property
    def sinks(self) -> int:
        """Blocks of the first keys, which are always seen."""
        return -(-self.visible.sinks // self.block_size)

    @property
    def span(self) -> int:
        """Most blocks from `first` of a token's block to that block; 0 where there is no bound."""
        if self.visible.window:
            return -(-(self.visible.window - 1) // self.block_size) + 1
        return self.visible.chunk_size // self.block_size

    def first(self, block: int) -> int:
        """The first block that tokens of block number `block` see, sinks aside."""
        return self.visible.first(block * self.block_size) // self.block_size

    def numbers(self, end: int) -> list[int]:
        """Of the blocks before number `end`, those that a token in block `end` sees."""
        first = self.first(end)
        return [*range(min(self.sinks, first)), *range(first, end)]

    def most(self, num_tokens: int, step: int = 1) -> int:
        """Most blocks that a sequence holds at once: sinks, span, and what a step adds.

        Args:
            num_tokens: of the sequence.
            step: tokens of it in one step, at most.
        """
        blocks = -(-num_tokens // self.block_size)
        if not self.span:
            return blocks
        return min(blocks, self.sinks + self.span + -(-(step - 1) // self.block_size))
