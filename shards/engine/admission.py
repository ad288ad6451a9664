"""Admission: which waiting sequences get a slot, and how much of their prompts the cache had.

A sequence enters when every pool has blocks for all its known tokens, and a block to spare for each
sequence in a slot. Strictly by rank: a sequence without room holds back all behind it. A sequence
whose adapter is in no slot yet holds back nobody. An interactive sequence without room takes the
slots and blocks of background sequences, the last in rank first.

Knows the queue, blocks and slots; knows nothing of decodes or plans.
"""

from __future__ import annotations

from collections import defaultdict

from arriero.shards.engine.adapter_residency import NO_ADAPTER, AdapterResidency
from arriero.shards.engine.cache_report import TenantUse
from arriero.shards.engine.draft import Chunk
from arriero.shards.engine.prefills import Prefills
from arriero.shards.engine.running import RunningSequences
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.engine.shared_blocks import SharedBlocks
from arriero.shards.engine.waiting import WaitingQueue

LOOK_AHEAD = 256
"""Sequences at the head of the queue whose adapters are loaded, and that may go first meanwhile."""


class Admission:
    """Moves sequences from the queue into slots.

    Args:
        waiting: the queue.
        running: sequences in slots.
        prefills: cuts the first chunk of each admitted sequence.
        blocks: blocks of sequences.
        adapters: adapters in slots of the device.

    Attributes:
        prompt_tokens: prompt tokens of all requests admitted so far.
        cached_tokens: prompt tokens that the prefix cache had at that time.
        by_tenant: both numbers, by tenant.
    """

    def __init__(
        self,
        waiting: WaitingQueue,
        running: RunningSequences,
        prefills: Prefills,
        blocks: SequenceBlocks,
        adapters: AdapterResidency,
    ) -> None:
        self._waiting, self._running = waiting, running
        self._prefills, self._blocks = prefills, blocks
        self._adapters = adapters
        self._refused: tuple[int, ...] = ()  # state at the last refusal
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.by_tenant: dict[str, TenantUse] = defaultdict(TenantUse)

    def admit(self, budget: int, *, hold_background: bool = False) -> list[Chunk]:
        """Give slots to waiting sequences; their first chunks, at most `budget` tokens in all.

        With `hold_background`, background sequences have no rows in this step: those in the queue
        stay there, and those in slots may be pre-empted.
        """
        chunks: list[Chunk] = []
        if self._adapters.has_any:
            self._adapters.prepare(self._waiting.adapters(LOOK_AHEAD))
        place = 0
        while budget > 0 and place < LOOK_AHEAD:
            sequence = self._waiting.ready(place)
            if sequence is None or (hold_background and sequence.is_background):
                break
            may_preempt = hold_background and self._last_background() is not None
            if not self._running.slots.num_free and not may_preempt:
                break
            adapter: int | None = NO_ADAPTER
            if sequence.adapter:
                adapter = self._adapters.slot_for(sequence.adapter)
            if adapter is None:  # the sequences behind may go first
                place += 1
                continue
            if not self._running.slots.num_free:
                self._make_way()
            if not self._enter(sequence, adapter, may_preempt=may_preempt):
                break
            self._waiting.remove(sequence)
            chunk = self._prefills.begin(sequence, budget)
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        return chunks

    def _enter(self, sequence: Sequence, adapter: int, *, may_preempt: bool) -> bool:
        """Put a waiting sequence into a slot, if there is room."""
        while (shared := self._find_room(sequence)) is None:
            if not (may_preempt and self._make_way()):
                return False
        num_shared = self._running.enter(sequence, shared, adapter)
        if not sequence.has_entered:
            self._count(sequence, min(num_shared, sequence.num_prompt))
        return True

    def _last_background(self) -> Sequence | None:
        """The background sequence in a slot that is last in rank; None without any."""
        last = self._running.last()
        return last if last is not None and last.is_background else None

    def _make_way(self) -> bool:
        """Pre-empt the last background sequence; False if there is none."""
        last = self._last_background()
        if last is not None:
            self._running.preempt(last)
        return last is not None

    def _find_room(self, sequence: Sequence) -> SharedBlocks | None:
        """Existing blocks of a sequence that has room for the others; None without room."""
        blocks, num_running = self._blocks, self._running.count
        state = (sequence.owner, *blocks.room(), num_running, blocks.num_anchors)
        if state == self._refused:  # same state as at the last refusal: skip the search
            return None
        shared = blocks.find_shared(sequence)
        # Every running sequence will need a block soon. Leave a block for each, or the new
        # sequence would be pre-empted within a few steps.
        if blocks.has_room(sequence, shared, num_running):
            return shared
        if num_running:
            self._refused = state
            return None
        while blocks.num_anchors:
            blocks.drop_latest_prompt()
        shared = blocks.find_shared(sequence)
        if not blocks.has_room(sequence, shared, 0):
            blocks.drop_pins()
            shared = blocks.find_shared(sequence)
        # without room even now, the other blocks are in use by transfers
        return shared if blocks.has_room(sequence, shared, 0) else None

    def _count(self, sequence: Sequence, num_cached: int) -> None:
        """Count a sequence's first entry into a slot."""
        sequence.has_entered = True
        live = sequence.live
        live.num_not_entered -= 1
        if not live.num_not_entered:
            self._blocks.drop_prompt(live)
        if sequence.index == 0:  # other samples share the prompt; sharing is no cache hit
            sequence.num_cached = num_cached
            self.prompt_tokens += sequence.num_prompt
            self.cached_tokens += num_cached
            use = self.by_tenant[live.request.tenant]
            use.prompt_tokens += sequence.num_prompt
            use.cached_tokens += num_cached
