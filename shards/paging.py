"""Where keys and values lie in a paged cache; knows block tables and positions, nothing else.

Shape legend: T tokens, S sequences, B blocks of a table.
"""

from __future__ import annotations

import numpy as np

from arriero.shards.plan import Int32


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
