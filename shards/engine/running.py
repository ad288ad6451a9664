"""Sequences in slots: how they enter, get room and leave, and who leaves first when room is short.

Knows slots, the blocks of their sequences and the changes that the next plan reports to the slices.
Knows nothing of token budgets: which sequences take part in a step is decided elsewhere.
"""

from __future__ import annotations

from operator import attrgetter

import numpy as np

from arriero.shards.engine.adapter_residency import NO_ADAPTER, AdapterResidency
from arriero.shards.engine.decode_slots import DecodeSlots
from arriero.shards.engine.draft import PlanDraft
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.shared_blocks import SharedBlocks
from arriero.shards.engine.slots import SlotTable
from arriero.shards.engine.types import EngineConfig
from arriero.shards.engine.waiting import WaitingQueue
from arriero.shards.protocol.step_plan import Int32

by_rank = attrgetter("rank")
"""Key of a sort by order of precedence."""


class RunningSequences:
    """Sequences in slots, and the draft of the plan that tells the slices of every change.

    Args:
        config: limits.
        blocks: blocks of sequences.
        waiting: where pre-empted sequences go.
        adapters: adapters in slots of the device.

    Attributes:
        slots: numbers of each slot.
        draft: changes of slots and block tables since the last plan.
        decoding: slots whose known tokens are all computed or in flight.
        prefilling: all other sequences in slots, by rank.
        num_preemptions: sequences pre-empted so far.
    """

    def __init__(
        self,
        config: EngineConfig,
        blocks: SequenceBlocks,
        waiting: WaitingQueue,
        adapters: AdapterResidency,
    ) -> None:
        self._config, self._blocks, self._waiting = config, blocks, waiting
        self._adapters = adapters
        self.slots = SlotTable(config.max_sequences)
        self.draft = PlanDraft(config.max_sequences)
        self.decoding = DecodeSlots(config, self.slots)
        self.prefilling: list[Sequence] = []
        self.num_preemptions = 0
        # With a window, every layer has the window: its blocks are the only blocks of the slices.
        windowed = config.attention_window > 0
        self._add_local = self.draft.add_blocks if windowed else self.draft.add_local
        self._pass_every = config.block_size if windowed else config.attention_chunk

    @property
    def count(self) -> int:
        """Sequences in slots."""
        return self._config.max_sequences - self.slots.num_free

    def enter(self, sequence: Sequence, shared: SharedBlocks, adapter: int = NO_ADAPTER) -> int:
        """Put a sequence into a free slot, with blocks for all its tokens.

        Args:
            sequence: sequence without a slot; the pools have room for its blocks.
            shared: existing blocks of its first tokens.
            adapter: slot of the sequence's adapter.

        Returns:
            Number of tokens in the shared blocks.
        """
        config, blocks = self._config, self._blocks
        table = blocks.open(sequence, shared)
        num_shared = len(shared.blocks) * config.block_size
        capacity = blocks.count(sequence) * config.block_size
        slot = self.slots.enter(sequence, scheduled=num_shared, capacity=capacity)
        if sequence.adapter:
            self._adapters.enter(sequence.adapter, adapter)
        self.draft.enter(sequence.to_new(config, adapter), table)
        self._add_local(slot, blocks.indexed(shared))
        return num_shared

    def release(self, sequence: Sequence) -> None:
        """Take a sequence out of its slot and free its blocks."""
        slot = sequence.slot
        self.draft.free(slot)
        self.slots.leave(sequence)
        self._blocks.close(sequence)
        if sequence.adapter:
            self._adapters.leave(sequence.adapter)
        if slot in self.decoding:
            self.decoding.remove(slot)
        else:
            self.prefilling.remove(sequence)

    def grow(self, sequence: Sequence) -> None:
        """Add a block to a sequence, for its next token; each pool has an available block."""
        slot = sequence.slot
        self.draft.add_blocks(slot, self._blocks.grow(sequence))
        self.slots.capacity[slot] += self._config.block_size
        self.extend_local(sequence, int(self.slots.scheduled[slot]) + 1)

    def reach(self, sequence: Sequence, end: int) -> int:
        """Get room for drafted tokens up to `end`, as far as no other sequence needs the blocks.

        Returns the end of the room, at least that of the sequence's next token.
        """
        slot, size = sequence.slot, self._config.block_size
        end = self._blocks.spare_reach(sequence, end, self.count)
        while self.slots.capacity[slot] < end:
            self.draft.add_blocks(slot, self._blocks.grow(sequence))
            self.slots.capacity[slot] += size
        self.extend_local(sequence, end)
        return end

    def extend_local(self, sequence: Sequence, end: int) -> None:
        """Add missing blocks of chunked or windowed attention for tokens up to `end`."""
        self._add_local(sequence.slot, self._blocks.extend_local(sequence, end))

    def pass_blocks(self, slots: Int32, starts: Int32) -> None:
        """Free blocks that sequences no longer see: of a past chunk, or behind a window.

        Args:
            slots: slots that take part in the next plan.
            starts: position of the next token of each slot.
        """
        size, table = self._pass_every, self.slots
        if not size:
            return
        passed = starts // size
        for row in np.flatnonzero(passed != table.passed[slots]):
            self._blocks.pass_to(table.sequences[slots[row]], int(starts[row]))
        table.passed[slots] = passed

    def reclaim(self) -> None:
        """Free some blocks: those of the newest anchor, else those of the last sequence."""
        if self._blocks.num_anchors:
            self._blocks.drop_latest_prompt()
            return
        last = self.last()
        assert last is not None, "a sequence in a slot needs the blocks"
        self.preempt(last)

    def last(self) -> Sequence | None:
        """The sequence in a slot that is last in rank; None without any."""
        return max(self.decoding.sequences + self.prefilling, key=by_rank, default=None)

    def preempt(self, victim: Sequence) -> None:
        """Send a sequence back to the queue; later it computes prompt and output again."""
        self.release(victim)
        victim.prompt_rows.clear()
        self._waiting.add(victim)
        self.num_preemptions += 1

    def preempt_all(self) -> None:
        """Send every sequence back to the queue, with no key of a block."""
        for victim in self.decoding.sequences + self.prefilling:
            self.preempt(victim)
            victim.keys.clear()
            victim.num_stored = 0
