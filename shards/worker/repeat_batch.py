"""The batch of repeated plans: the same rows in each step, each sequence one token further.

A new batch takes some thirty small array operations; the weights have pushed their code and data
out of the CPU's caches since the last step. A repeated batch writes only the differences, in place.

Knows positions and block tables; knows nothing of sequences or sampling.

Shape legend: T tokens (one per sequence), S sequences, B blocks of a table, D head dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from arriero.kernels.flat_batch import FlatBatch
from arriero.kernels.sampling_rows import SamplingRows
from arriero.shards.kv.paging import cache_slots
from arriero.shards.protocol.step_plan import Int32

if TYPE_CHECKING:
    from arriero.shards.worker.rope_table import Rope


_SPARE_COLUMNS = 8
"""Spare columns of the block table, so that a new gather is rare."""


class RepeatBatch:
    """One token per sequence, with positions and block tables.

    Args:
        slots: [S] slot of each sequence.
        tokens_T: int32, tokens of the first step.
        batch: batch of the first step, with max_query 1 and without `local`; is overwritten.
        block_size: tokens in a block.
        rope: cosines and sines.

    Attributes:
        slots: [S] slot of each sequence.
        tokens_T: tokens of the step.
        tokens: the same memory as an array; after sampling, the caller writes the drawn tokens.
        batch: positions and block tables of the step.
        rows: sampling parameters; None when a sequence has unusual parameters.
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
        self._until_block = 0  # steps before a sequence enters a new block

    def advance(self, blocks: Int32, *, changed: bool) -> None:
        """Advance each sequence by a token.

        Args:
            blocks: [slots, blocks] block tables of all slots.
            changed: a table has new blocks.
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
            adapters=before.adapters,
        )
        if self.rows is not None:
            self.rows.position_R.add_(1)
