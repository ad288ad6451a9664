"""Slots that decode, and the choice of those that take part in the next step.

Knows slots, positions and the token budget; knows nothing of blocks, requests or plans.
"""

from __future__ import annotations

import numpy as np

from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.slots import SlotTable
from arriero.shards.engine.types import EngineConfig
from arriero.shards.protocol.step_plan import Int32, int32


class DecodeSlots:
    """Slots whose known tokens are all computed or in flight, in order of their first decode.

    Args:
        config: limits.
        table: numbers of each slot.
    """

    def __init__(self, config: EngineConfig, table: SlotTable) -> None:
        self._config, self._table = config, table
        self._slots: dict[int, None] = {}
        self._array: Int32 | None = None  # `_slots` as an array, while unchanged

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def add(self, slot: int) -> None:
        """Start decoding a slot."""
        self._slots[slot] = None
        self._array = None

    def remove(self, slot: int) -> None:
        """Stop decoding a slot."""
        del self._slots[slot]
        self._array = None

    @property
    def all(self) -> Int32:
        """All slots that decode."""
        if self._array is None:
            self._array = int32(list(self._slots))
        return self._array

    @property
    def sequences(self) -> list[Sequence]:
        """Sequences in these slots."""
        sequences: list[Sequence] = self._table.sequences[list(self._slots)].tolist()
        return sequences

    def ready(self, *, hold_background: bool = False) -> Int32:
        """Slots that may take a step; if not all fit, those that waited longest.

        With `hold_background`, the slots of background sequences are left out. Returns the same
        array object as long as all slots are ready and no slot was added or removed.
        """
        slots = self.all
        table, config = self._table, self._config
        drafts = config.speculation.enabled
        most = config.max_batch_tokens
        scheduled = table.scheduled[slots]
        ready = scheduled < table.limit[slots] - 1
        if config.num_stages > 1:
            most = min(most, -(-len(slots) // config.num_stages))
            ready &= scheduled < table.known[slots]
        elif drafts:
            ready &= ~table.waits[slots] | (scheduled < table.known[slots])
        if hold_background:
            ready &= ~table.background[slots]
        if not ready.all():
            slots = slots[ready]
        if len(slots) > most:
            slots = slots[np.argsort(table.last_step[slots], kind="stable")[:most]]
        return slots
