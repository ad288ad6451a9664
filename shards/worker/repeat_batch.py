"""The batch of plans that repeat: the same sequences, each one token further, step after step.

Building a batch anew takes some thirty small array operations, whose code and data the weights
have pushed out of the CPU's caches since the step before; here only what differs is written, in
place.

Knows where tokens sit; knows nothing of who is in a slot, nor of how tokens are drawn.

Shape legend: T tokens (one of each sequence), S sequences, B blocks of a table, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.ops import FlatBatch, SamplingRows
from arriero.shards.kv.paging import cache_slots
from arriero.shards.protocol.step_plan import Int32

if TYPE_CHECKING:
    from arriero.shards.worker.rope_table import Rope


_SPARE_COLUMNS = 8
"""Columns of the block table beyond those needed, so that it is seldom gathered for want of one."""


class RepeatBatch:
    """One token of each sequence, and where it sits.

    Args:
        slots: [S] slot of each sequence.
        tokens_T: int32, of the first step.
        batch: of the first step, with max_query 1 and no `local` part; it is written over.
        block_size: tokens in a block.
        rope: cosines and sines.

    Attributes:
        slots: as given.
        tokens_T: the step's tokens, and then those drawn: whoever draws writes them to `tokens`.
        tokens: the same memory.
        batch: where they sit.
        rows: how the next tokens are drawn, where no sequence has anything unusual; else None.
    """

    def __init__(
        self, slots: Int32, tokens_T: Tensor, batch: FlatBatch, block_size: int, rope: Rope
    ) -> None:
        self.slots, self.tokens_T, self.batch = slots, tokens_T, batch
        self.tokens: Int32 = tokens_T.numpy()
        self.rows: SamplingRows | None = None
        self._block_size, self._rope = block_size, rope
        self._positions: Int32 = batch.positions_T.numpy()
        self._contexts: Int32 = batch.context_S.numpy()
        self._cache_slots: Int32 = batch.slots_T.numpy()
        self._table: Int32 = batch.block_table_SB.numpy()
        self._table_SB = batch.block_table_SB
        self._rope_2TD = rope.both_at(batch.positions_T)
        self._cos_TD, self._sin_TD = self._rope_2TD
        self._owner = np.arange(len(self._positions), dtype=np.int32)
        self._until_block = 0  # steps in which no sequence enters a block

    def advance(self, blocks: Int32, *, changed: bool) -> None:
        """Move on by a token.

        Args:
            blocks: [slots, blocks] every slot's block table.
            changed: a table among them has new blocks.
        """
        max_context = self.batch.max_context + 1
        columns = -(-max_context // self._block_size)
        if changed or columns > self._table.shape[1]:
            self._table = blocks[self.slots, : columns + _SPARE_COLUMNS]
            self._table_SB = torch.from_numpy(self._table)
            self._until_block = 0
        self._positions += 1
        self._contexts += 1
        if self._until_block:
            self._cache_slots += 1
            self._until_block -= 1
        else:
            self._cache_slots[:] = cache_slots(
                self._table, self._owner, self._positions, self._block_size
            )
            last = int((self._positions % self._block_size).max())
            self._until_block = self._block_size - 1 - last
        before = self.batch
        self._rope.both_at(before.positions_T, out=self._rope_2TD)
        self.batch = FlatBatch(
            positions_T=before.positions_T,
            query_start_S1=before.query_start_S1,
            context_S=before.context_S,
            block_table_SB=self._table_SB,
            slots_T=before.slots_T,
            cos_TD=self._cos_TD,
            sin_TD=self._sin_TD,
            max_query=1,
            max_context=max_context,
        )
        if self.rows is not None:
            self.rows.position_R.add_(1)
