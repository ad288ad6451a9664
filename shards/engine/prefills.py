"""The prefill chunks of a step: how far each sequence with uncomputed tokens goes.

Knows the token budget, and the room of layers with chunked or windowed attention. Knows nothing of
the queue: a sequence is in a slot before its first chunk.
"""

from __future__ import annotations

from bisect import insort

from arriero.shards.config.priorities import BACKGROUND_CHUNK
from arriero.shards.engine.draft import Chunk
from arriero.shards.engine.running import RunningSequences, by_rank
from arriero.shards.engine.sequence import Sequence
from arriero.shards.engine.sequence_blocks import SequenceBlocks
from arriero.shards.protocol.step_plan import int32


class Prefills:
    """Cuts the known tokens of sequences into chunks.

    Args:
        running: sequences in slots.
        blocks: blocks of sequences.
    """

    def __init__(self, running: RunningSequences, blocks: SequenceBlocks) -> None:
        self._running, self._blocks = running, blocks

    def advance(self, budget: int, *, hold_background: bool = False) -> list[Chunk]:
        """Next chunks of the prefilling sequences, by rank, with at most `budget` tokens in all.

        With `hold_background`, background sequences have none.
        """
        running = self._running
        chunks = []
        for sequence in list(running.prefilling):
            if budget <= 0 or sequence.slot < 0:  # pre-empted by a sequence of higher precedence
                break
            if hold_background and sequence.is_background:
                break
            slot = int32([sequence.slot])
            running.pass_blocks(slot, running.slots.scheduled[slot])
            chunk = self._take_chunk(sequence, budget)
            if chunk.end == chunk.start:  # blocks come back when other sequences end
                break
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
        running.prefilling = [
            sequence for sequence in running.prefilling if sequence.slot not in running.decoding
        ]
        return chunks

    def begin(self, sequence: Sequence, budget: int) -> Chunk:
        """First chunk of a sequence that has just entered its slot, at most `budget` tokens."""
        chunk = self._take_chunk(sequence, budget)
        if not chunk.final:
            insort(self._running.prefilling, sequence, key=by_rank)
        return chunk

    def _take_chunk(self, sequence: Sequence, budget: int) -> Chunk:
        """Known tokens within the budget and the chunk-local blocks; maybe none."""
        running, slot, known = self._running, sequence.slot, len(sequence.tokens)
        if sequence.is_background:
            budget = min(budget, BACKGROUND_CHUNK)
        start = int(running.slots.scheduled[slot])
        end = self._reach(sequence, start, min(known, start + budget))
        running.extend_local(sequence, end)
        running.slots.scheduled[slot] = end
        if end == known:
            running.decoding.add(slot)
        return Chunk(sequence, start, end, end == known)

    def _reach(self, sequence: Sequence, start: int, end: int) -> int:
        """End of the next chunk, at most `end`; pre-empts later prefills rather than stay."""
        running, blocks = self._running, self._blocks
        while True:
            reach = blocks.local_reach(sequence, start, end, running.count)
            if reach > start:
                return reach
            if blocks.num_anchors:
                blocks.drop_latest_prompt()
            elif running.prefilling and running.prefilling[-1].rank > sequence.rank:
                running.preempt(running.prefilling[-1])
            else:
                return start
