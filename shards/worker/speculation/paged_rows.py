"""Block tables of the slots, for a drafter that computes rows at positions of its own choice.

A drafter's KV cache has the blocks of the target's under the same ids, in layers of its own: the
scheduler shares, frees and pre-empts both at once. Knows plans and positions; knows nothing of the
layers that use the batches.

Shape legend: T tokens, S sequences.
"""

from __future__ import annotations

import numpy as np
import torch

from arriero.kernels.flat_batch import FlatBatch
from arriero.shards.collectives.host_copy import to_device
from arriero.shards.kv.paging import cache_slots
from arriero.shards.protocol.step_plan import Int32, StepPlan
from arriero.shards.worker.rope_table import Rope


class PagedRows:
    """The block tables of all slots."""

    def __init__(
        self,
        *,
        max_sequences: int,
        max_blocks: int,
        block_size: int,
        rope: Rope,
        device: torch.device,
    ) -> None:
        """Make empty tables.

        Args:
            max_sequences: number of slots.
            max_blocks: most blocks of a sequence.
            block_size: tokens in a block.
            rope: rotary table of the drafter.
            device: device of the batches.
        """
        self._blocks = np.zeros((max_sequences, max_blocks), np.int32)
        self._num_blocks = np.zeros(max_sequences, np.int32)
        self._block_size, self._rope, self._device = block_size, rope, device

    def apply(self, plan: StepPlan) -> None:
        """Apply a plan's new sequences and new blocks."""
        for new in plan.new:
            self._num_blocks[new.slot] = 0
        self._blocks[plan.block_slots, plan.block_index] = plan.block_ids
        np.maximum.at(self._num_blocks, plan.block_slots, plan.block_index + 1)

    def room(self, slot: int) -> int:
        """Number of a slot's positions that have a block."""
        return int(self._num_blocks[slot]) * self._block_size

    @property
    def num_positions(self) -> int:
        """Positions of all slots."""
        return self._blocks.size * self._block_size

    def padding(self, num_rows: int) -> tuple[Int32, Int32, Int32]:
        """Slots, starts and counts of rows that fill slots from their first position on."""
        each = self._blocks.shape[1] * self._block_size
        num_slots = -(-num_rows // each)
        counts = np.full(num_slots, each, np.int32)
        counts[-1] = num_rows - (num_slots - 1) * each
        return np.arange(num_slots, dtype=np.int32), np.zeros(num_slots, np.int32), counts

    def last_rows(self) -> tuple[Int32, Int32, Int32]:
        """Slot, start and count of the last two positions of the first slot; see `padding`."""
        each = self._blocks.shape[1] * self._block_size
        count = np.full(1, min(2, each), np.int32)
        return np.zeros(1, np.int32), each - count, count

    def batch(self, slots: Int32, starts: Int32, counts: Int32) -> FlatBatch:
        """The batch of rows `starts` to `starts + counts` of each slot; all have blocks."""
        contexts = starts + counts
        query_start = np.zeros(len(slots) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        owner = np.repeat(np.arange(len(slots), dtype=np.int32), counts)
        positions = np.arange(len(owner), dtype=np.int32) + (starts - query_start[:-1])[owner]
        max_context = int(contexts.max())
        table = self._blocks[slots, : -(-max_context // self._block_size)]
        positions_T = to_device(positions, self._device)
        cos_TD, sin_TD = self._rope.at(positions_T)
        return FlatBatch(
            positions_T=positions_T,
            query_start_S1=to_device(query_start, self._device),
            context_S=to_device(contexts, self._device),
            block_table_SB=to_device(table, self._device),
            slots_T=to_device(cache_slots(table, owner, positions, self._block_size), self._device),
            cos_TD=cos_TD,
            sin_TD=sin_TD,
            max_query=int(counts.max()),
            max_context=max_context,
        )
