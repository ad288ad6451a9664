"""The block tables of all slots on the device, kept by differences.

A step uploads the blocks that sequences gained, a few words, in place of whole tables: 8 MB for 256
sequences of 131,072 tokens. Knows slots and blocks; knows nothing of steps.

Shape legend: S slots, B blocks of a table, N rows of a batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from arriero.shards.collectives.host_copy import to_device
from arriero.shards.protocol.step_plan import StepPlan


class DeviceBlockTable:
    """Block tables [S, B], with a slot for the padding rows of graphs.

    Args:
        num_slots: slots, the padding slot included.
        max_blocks: largest number of blocks of a sequence.
        scratch_slot: slot of the padding rows.
        scratch_block: the only block of the padding rows.
        device: device of the tables.
    """

    def __init__(
        self,
        num_slots: int,
        max_blocks: int,
        scratch_slot: int,
        scratch_block: int,
        device: torch.device,
    ) -> None:
        self._device = device
        self._blocks_SB = torch.zeros(num_slots, max_blocks, dtype=torch.int32, device=device)
        self._blocks_SB[scratch_slot, 0] = scratch_block

    def apply(self, plan: StepPlan) -> None:
        """Add the new blocks of a plan; does not wait for the device."""
        if not len(plan.block_ids):
            return
        new = np.stack((plan.block_slots, plan.block_index, plan.block_ids)).astype(np.int64)
        slot_N, index_N, block_N = to_device(new, self._device)
        self._blocks_SB.index_put_((slot_N, index_N), block_N.int())

    def rows(self, slot_N: Tensor, num_blocks: int | None = None) -> Tensor:
        """The tables of slots, int32 [N, B]; `num_blocks` columns, or all."""
        table = self._blocks_SB if num_blocks is None else self._blocks_SB[:, :num_blocks]
        return table.index_select(0, slot_N)
